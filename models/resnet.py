"""ResNet v1.5 with bottlenecks: how the stem reads an image, and what a block is made of.

A bottleneck narrows by a 1x1 convolution, filters by a 3x3 and widens by a 1x1 again; the shortcut
joins before the last activation. Version 1.5 strides in the 3x3, not in the first 1x1. Squeeze-
excite gates what a block adds (SENet); groups split the 3x3 into parts that do not mix (ResNeXt).
What differs from the publications:
- Without a norm, kernels have mean 0 and a fixed deviation by output channel, each with a learned
  factor that starts at 0 where a block ends; NF-ResNet also scales what enters a block.
- The patchify stem takes 4x4 patches in place of the 7x7 convolution and the max pool.
- Weights start with deviation 1 / sqrt(fan in). There is no augmentation and no label smoothing.
Images may have any dims before their edges, such as cameras; they are folded into the batch, so
that batch norm's statistics are those of all cameras of the global batch.

Letters: `B` batch (with cameras), `H` `W` image or feature map, `C` channels in, `F` channels out,
`I` `J` edges of a kernel, `K` classes. A `2` marks the edges that a layer puts out.

Sources: He et al., "Deep Residual Learning", CVPR 2016, table 1; torchvision's resnet (v1.5); Hu et
al., "Squeeze-and-Excitation Networks", CVPR 2018; Xie et al., "Aggregated Residual
Transformations", CVPR 2017, table 1; Brock et al., "Characterizing signal propagation", ICLR 2021.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.convolution import max_pool
from jaxbench.models.blocks.feedforward import ACTIVATIONS
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import make_norm
from jaxbench.models.blocks.stack import Layers, Stack
from jaxbench.models.blocks.weights import Linear, constant, weight

DTYPE = jnp.bfloat16
SQUEEZE = 16  # channels over those that squeeze-excite keeps; SENet's table 10
# What keeps the deviation of an activation's output at 1. Source: Brock et al., 2021.
GAINS = {"relu": 1.7139588594436646, "silu": 1.7881293296813965}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResNetConfig:
    """Shape of the network; the tuples have one entry per stage.

    Attributes:
      stem: A 7x7 convolution at stride 2 and a max pool; the same convolution, with the pixels of
        2x2 squares folded into channels; or 4x4 patches.
      stem_channels: Channels that the stem puts out.
      channels: Channels that a stage puts out.
      inner: Channels of a stage's 3x3 convolutions.
      depths: Blocks in a stage.
      groups: Parts of the 3x3 convolutions that do not mix.
      squeeze_excite: Gate the channels that a block adds.
      norm: What follows a convolution; `none` keeps kernels scaled instead.
      layers: The equal blocks of a stage as a loop, or written out.
      remat: `full` keeps only the input of each block for the backward pass.
      num_classes: Width of the classifier.
    """

    stem: Literal["conv7", "space_to_depth", "patchify"] = "conv7"
    stem_channels: int
    channels: tuple[int, ...]
    inner: tuple[int, ...]
    depths: tuple[int, ...]
    groups: int = 1
    squeeze_excite: bool = False
    norm: Literal["batch", "group", "none"] = "batch"
    activation: Literal["relu", "silu"] = "relu"
    layers: Layers = "scan"
    remat: Literal["none", "full"] = "none"
    num_classes: int


def convolve(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "I J _ F"],
    *,
    stride: int,
    padding: tuple[int, int],
    groups: int = 1,
) -> Float[Array, "B H2 W2 F"]:
    """Convolves both edges alike, with `padding` zeros before and after."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=(padding, padding),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def convolve_folded(
    x: Float[Array, "B H W C"], kernel: Float[Array, "7 7 C F"]
) -> Float[Array, "B H2 W2 F"]:
    """Computes the 7x7 convolution at stride 2 as a 4x4 one at stride 1 with four times the inputs.

    out[i] = sum over k < 7 of kernel[k] x[2i + k - 3]. A zero before the kernel makes it
    sum over k < 8 of padded[k] x[2i + k - 4]; with k = 2a + r that is
    sum over a < 4, r < 2 of padded[2a + r] x[2(i + a - 2) + r]: pairs of pixels, two before.
    Images must have even edges. Source: the ResNet that MLPerf's TPU submissions train.
    """
    B, H, W, C = x.shape
    pixels = x.reshape(B, H // 2, 2, W // 2, 2, C).transpose(0, 1, 3, 2, 4, 5)
    padded = jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0)))
    taps = padded.reshape(4, 2, 4, 2, C, -1).transpose(0, 2, 1, 3, 4, 5)
    return convolve(
        pixels.reshape(B, H // 2, W // 2, 4 * C),
        taps.reshape(4, 4, 4 * C, -1),
        stride=1,
        padding=(2, 1),
    )


def scale_kernel(kernel: Float[Array, "I J C F"], gain: float) -> Float[Array, "I J C F"]:
    """Gives each output channel's weights mean 0 and deviation gain / sqrt(fan in)."""
    fan_in = kernel.size // kernel.shape[-1]
    centred = kernel - jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=(0, 1, 2), keepdims=True)
    # 1e-4 as in NF-ResNet: a kernel near zero is not blown up.
    return centred * (gain * jax.lax.rsqrt(jnp.maximum(fan_in * variance, 1e-4)))


class Unit(nnx.Module):
    """Convolution without bias, norm, and the activation if `active`.

    Args:
      edge: Edge of the kernel; odd ones are centred, even ones read patches.
      folded: Compute a 7x7 convolution at stride 2 by `convolve_folded`.
    """

    def __init__(
        self,
        config: ResNetConfig,
        num_in: int,
        num_out: int,
        *,
        edge: int = 1,
        stride: int = 1,
        groups: int = 1,
        active: bool = True,
        folded: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        if num_in % groups or num_out % groups:
            raise ValueError(f"{num_in} to {num_out} channels do not divide into {groups} groups.")
        self.stride, self.groups, self.folded = stride, groups, folded
        pad = edge // 2 if edge % 2 else 0
        self.padding = (pad, pad)
        self.activation = ACTIVATIONS[config.activation] if active else None
        self.gain = GAINS[config.activation] if config.norm == "none" else None
        # XLA's partitioner aborts on grouped convolutions whose groups the devices do not divide.
        axes = (None, None, "conv_in", "conv_out" if groups == 1 else None)
        shape = (edge, edge, num_in // groups, num_out)
        self.kernel = weight(rngs, shape, axes, fan_in=edge * edge * num_in // groups)
        self.norm: Any = make_norm(config.norm, num_out)

    @jax.named_scope("unit")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        kernel = self.kernel[...]
        if self.gain is not None:
            kernel = scale_kernel(kernel, self.gain)
        kernel = kernel.astype(x.dtype)
        if self.folded:
            y = convolve_folded(x, kernel)
        else:
            y = convolve(x, kernel, stride=self.stride, padding=self.padding, groups=self.groups)
        y = self.norm(y)
        return y if self.activation is None else self.activation(y)


class Stem(nnx.Module):
    """Image to features at a quarter of its edges."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        self.pooled = config.stem != "patchify"
        edge, stride = (7, 2) if self.pooled else (4, 4)
        folded = config.stem == "space_to_depth"
        self.unit = Unit(
            config, 3, config.stem_channels, edge=edge, stride=stride, folded=folded, rngs=rngs
        )

    @jax.named_scope("stem")
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 F"]:
        x = self.unit(images)
        return max_pool(x) if self.pooled else x


class SqueezeExcite(nnx.Module):
    """Gates channels by a two-layer network of their mean over the image."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs) -> None:
        squeezed = max(1, num_channels // SQUEEZE)
        self.reduce = Linear(num_channels, squeezed, ("embed", None), rngs=rngs)
        self.expand = Linear(squeezed, num_channels, (None, "embed"), rngs=rngs)

    @jax.named_scope("squeeze_excite")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(nnx.relu(self.reduce(mean))))


class Bottleneck(nnx.Module):
    """act(shortcut(x) + expand(filter(reduce(x)))); the shortcut projects where shapes change."""

    def __init__(
        self, config: ResNetConfig, num_in: int, *, stage: int, stride: int, rngs: nnx.Rngs
    ) -> None:
        inner, num_out = config.inner[stage], config.channels[stage]
        self.activation = ACTIVATIONS[config.activation]
        self.reduce = Unit(config, num_in, inner, rngs=rngs)
        self.filter = Unit(
            config, inner, inner, edge=3, stride=stride, groups=config.groups, rngs=rngs
        )
        self.expand = Unit(config, inner, num_out, active=False, rngs=rngs)
        if config.norm == "none":
            # Blocks start as their shortcuts, or the sum would double with each of them.
            self.expand.norm.scale = constant((num_out,), ("conv_out",), 0.0)
        gated = config.squeeze_excite
        self.gate = SqueezeExcite(num_out, rngs=rngs) if gated else None
        changes = stride != 1 or num_in != num_out
        self.shortcut = (
            Unit(config, num_in, num_out, stride=stride, active=False, rngs=rngs)
            if changes
            else None
        )

    @jax.named_scope("bottleneck")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        # Batch-split before the grouped convolution: the partitioner must not split its channels.
        y = self.filter(constrain(self.reduce(x), ("batch", None, None, None)))
        y = self.expand(y)
        y = y if self.gate is None else self.gate(y)
        y = self.activation(y + (x if self.shortcut is None else self.shortcut(x)))
        return constrain(y, ("batch", None, None, None))


class Stage(nnx.Module):
    """A block that changes the shape, and the equal ones after it; all but stage 0 stride."""

    def __init__(self, config: ResNetConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        num_in = (config.stem_channels, *config.channels)[stage]
        num_out, num_equal = config.channels[stage], config.depths[stage] - 1

        def change(rngs: nnx.Rngs) -> Bottleneck:
            return Bottleneck(config, num_in, stage=stage, stride=2 if stage else 1, rngs=rngs)

        def keep(rngs: nnx.Rngs) -> Bottleneck:
            return Bottleneck(config, num_out, stage=stage, stride=1, rngs=rngs)

        self.first = Stack(change, 1, layers="unroll", remat=config.remat, rngs=rngs)
        self.rest = (
            Stack(keep, num_equal, layers=config.layers, remat=config.remat, rngs=rngs)
            if num_equal
            else None
        )

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.first(x)
        return x if self.rest is None else self.rest(x)


class ResNet(nnx.Module):
    """Stem, stages, mean over the image, classifier."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs) -> None:
        self.stem = Stem(config, rngs=rngs)
        stages = range(len(config.channels))
        self.stages = nnx.List([Stage(config, stage, rngs=rngs) for stage in stages])
        self.classify = Linear(config.channels[-1], config.num_classes, ("embed", None), rngs=rngs)

    @jax.named_scope("resnet")
    def __call__(self, images: Float[Array, "*lead H W 3"]) -> Float[Array, "*lead K"]:
        images = constrain(images, ("batch", *(None,) * (images.ndim - 1)))
        x = images.astype(DTYPE).reshape(-1, *images.shape[-3:])
        x = self.stem(constrain(x, ("batch", None, None, None)))
        for stage in self.stages:
            x = stage(x)
        with jax.named_scope("head"):
            logits = self.classify(jnp.mean(x, axis=(1, 2)))
        return logits.reshape(*images.shape[:-3], logits.shape[-1])


def build(config: ResNetConfig, rngs: nnx.Rngs) -> ResNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return ResNet(config, rngs=rngs)


def loss(module: ResNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean softmax cross entropy of `images` against one label for each."""
    return cross_entropy(module(batch["images"]), batch["labels"])


CPU = ResNetConfig(
    stem_channels=16,
    channels=(32, 64),
    inner=(16, 32),
    depths=(1, 3),
    num_classes=10,
)
PAPER_50 = ResNetConfig(
    stem_channels=64,
    channels=(256, 512, 1024, 2048),
    inner=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    num_classes=1000,
)
PAPER_101 = dataclasses.replace(PAPER_50, depths=(3, 4, 23, 3))
PAPER_SE50 = dataclasses.replace(PAPER_50, squeeze_excite=True)
PAPER_NEXT50 = dataclasses.replace(PAPER_50, groups=32, inner=(128, 256, 512, 1024))
# A device holds dozens of HD images; without remat their features alone overflow 32 GB.
FLEET_101 = dataclasses.replace(PAPER_101, remat="full")

Variant = tuple[str, Validity, dict[str, Any], str]


def _variants(config: ResNetConfig, groups: int) -> tuple[Variant, ...]:
    """Returns change, validity, fields and words of each variant; the first one is the fleet's."""
    twice = tuple(2 * channels for channels in config.inner)
    return (
        (
            "s2d",
            "T0",
            {"stem": "space_to_depth"},
            "the stem's 7x7 convolution with a 4x4 one over folded 2x2 squares, of the same kernel",
        ),
        ("patchify", "T2", {"stem": "patchify"}, "the stem's convolution and pool with patches"),
        ("groupnorm", "T2", {"norm": "group"}, "batch norm with group norm"),
        ("nonorm", "T2", {"norm": "none"}, "batch norm with scaled kernels"),
        (
            "grouped",
            "T2",
            {"groups": groups, "inner": twice},
            f"the dense 3x3 convolution with one of {groups} groups over twice the channels",
        ),
        ("silu", "T1", {"activation": "silu"}, "ReLU with SiLU"),
        ("remat", "T0", {"remat": "full"}, "kept activations with those made again by block"),
        ("unrolled", "T0", {"layers": "unroll"}, "the loop over equal blocks with them unrolled"),
    )


def _rivals(
    size: str,
    base: str,
    config: ResNetConfig,
    workload: Workload,
    source: str,
    variants: tuple[Variant, ...] = (),
) -> list[Candidate]:
    """Returns the base and its variants; a cpu variant's name has no part for its base."""
    prefix = f"resnet-{size}" if base == "base" else f"resnet-{size}-{base}"
    first: Variant = ("", "base", {}, "")
    return [
        Candidate(
            name=f"{prefix}-{change}" if change else f"resnet-{size}-{base}",
            family="resnet",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=f"resnet-{size}-{base}",
            replaces=replaces,
            validity=validity,
            source=source,
        )
        for change, validity, fields, replaces in (first, *variants)
    ]


def _workload(images: tuple[int, ...], num_classes: int, global_batch: int) -> Workload:
    """Returns a training step on images, with a label for each."""
    labels = Input(shape=images[:-3], dtype="int32", high=num_classes)
    return Workload(
        global_batch=global_batch,
        inputs=(("images", Input(shape=images)), ("labels", labels)),
    )


CPU_SOURCE = "ResNet's parts, narrow and two stages deep, to step on two cores"
SOURCES = {
    "50": "He et al., CVPR 2016, table 1: 25,557,032 parameters as torchvision's v1.5, 224x224",
    "101": "He et al., CVPR 2016, table 1: 44,549,160 parameters as torchvision's v1.5, 224x224",
    "se50": "Hu et al., CVPR 2018, SE-ResNet-50, reduction 16: 28.1 million parameters, 224x224",
    "next50": "Xie et al., CVPR 2017, ResNeXt-50 32x4d: 25,028,904 parameters, 224x224",
}
FLEET_SOURCE = (
    "He et al., CVPR 2016, ResNet-101, on eight cameras of 1280x960 as Tesla described them in "
    "2021; remat and the batch are ours"
)
_CPU_WORK = _workload((32, 32, 3), 10, 8)
_PAPER_WORK = _workload((224, 224, 3), 1000, 512)
_FLEET_WORK = _workload((8, 960, 1280, 3), 1000, 32)
_SQUEEZE: Variant = ("se", "T2", {"squeeze_excite": True}, "plain blocks with gated ones")

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("cpu", "base", CPU, _CPU_WORK, CPU_SOURCE, (*_variants(CPU, 8), _SQUEEZE)),
    *_rivals("paper", "50", PAPER_50, _PAPER_WORK, SOURCES["50"], _variants(PAPER_50, 32)),
    *_rivals("paper", "101", PAPER_101, _PAPER_WORK, SOURCES["101"]),
    *_rivals("paper", "se50", PAPER_SE50, _PAPER_WORK, SOURCES["se50"]),
    *_rivals("paper", "next50", PAPER_NEXT50, _PAPER_WORK, SOURCES["next50"]),
    *_rivals("fleet", "101", FLEET_101, _FLEET_WORK, FLEET_SOURCE, _variants(FLEET_101, 32)[:1]),
)
