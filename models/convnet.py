"""EfficientNet with MBConv blocks fused by stage: where does a dense convolution pay?

An MBConv block widens by a 1x1 convolution, filters each channel on its own (depthwise), gates the
channels (squeeze-excite) and projects back. A Fused-MBConv block widens and filters in one dense
convolution: several times the FLOPs. It stands in no stage, in stages 1-3, in 1-5 or in all seven.

EfficientNetV2's table 3 has these four rows for B4; the same are here for B0, whose blocks are
written out. The table leaves two details of the fused block open; here
- it has squeeze-excite after the dense convolution, as figure 2 draws it;
- stage 3 goes from 5x5 to 3x3, stages 5 and 6 stay 5x5. At B4's size that gives 20.0, 43.2 and
  134.3 million parameters against the table's 20.0, 43.4 and 132.0; 3x3 everywhere would end at
  68.6 million.
The published V2 networks have neither that gate nor, where a block does not widen, the projection.
Dropout and stochastic depth are left out: a step is deterministic. Batch norm's statistics are
those of the global batch, over all cameras where a sample has several.

Letters: `B` batch (with cameras), `H` `W` image or feature map, `C` channels in, `F` channels out,
`K` classes. A `2` marks the edges that a layer puts out.

Sources: Tan and Le, "EfficientNetV2", ICML 2021, figure 2, tables 3 and 4; Tan and Le,
"EfficientNet", ICML 2019, table 1 and section 3.3; torchvision's efficientnet, whose rounding of
widths and parameter counts these are.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.stack import Layers, Remat, Stack, make_apply

DTYPE = jnp.bfloat16
# So many stages, from the first on, are Fused-MBConv.
FUSED = {"mbconv": 0, "fused13": 3, "fused15": 5, "fusedall": 7, "v2": 3}


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNetConfig:
    """Shape of the network; the tuples have one entry per stage.

    Attributes:
      stem: Channels after the first convolution.
      channels: Channels that a stage puts out.
      depths: Blocks in a stage.
      kernels: Edge of the depthwise kernel, or of the dense one where the stage is fused.
      strides: Stride of a stage's first block.
      expansions: Inner channels of a block over its input channels; at 1 MBConv does not widen.
      block: Which stages are Fused-MBConv; in `v2` without a gate, as published.
      squeeze: Block input channels over squeeze-excite channels.
      head: Channels of the last convolution, before pooling.
      num_classes: Width of the classifier.
      layers: The equal blocks of a stage as a loop, or written out.
    """

    stem: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    block: Literal["mbconv", "fused13", "fused15", "fusedall", "v2"] = "mbconv"
    squeeze: int = 4
    head: int
    num_classes: int
    layers: Layers = "scan"
    remat: Remat = "none"


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, and SiLU if `active`."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        active: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.active = active
        axes = (None, None, None if depthwise else "conv_in", "conv_out")
        self.conv = nnx.Conv(
            num_in,
            num_out,
            (kernel, kernel),
            strides=(stride, stride),
            feature_group_count=num_in if depthwise else 1,
            use_bias=False,
            dtype=DTYPE,
            kernel_init=nnx.with_partitioning(nnx.initializers.he_normal(), axes),
            rngs=rngs,
        )
        # Momentum and epsilon are EfficientNet's.
        self.norm = nnx.BatchNorm(
            num_out,
            momentum=0.99,
            epsilon=1e-3,
            dtype=DTYPE,
            scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("conv_out",)),
            bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), ("conv_out",)),
            rngs=rngs,
        )

    @jax.named_scope("conv_norm")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.norm(self.conv(x), use_running_average=False)
        return nnx.silu(x) if self.active else x


class SqueezeExcite(nnx.Module):
    """Gates channels by a two-layer network of their mean over the image."""

    def __init__(self, num_channels: int, num_squeezed: int, *, rngs: nnx.Rngs) -> None:
        self.reduce = _linear(num_channels, num_squeezed, axes=("conv_in", None), rngs=rngs)
        self.expand = _linear(num_squeezed, num_channels, axes=(None, "conv_out"), rngs=rngs)

    @jax.named_scope("squeeze_excite")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(nnx.silu(self.reduce(mean))))


class MBConv(nnx.Module):
    """Inverted bottleneck: widen and filter, gate, project; residual where the shape stays.

    Args:
      first: The block is its stage's first, which may stride and change the channels.
    """

    def __init__(self, config: ConvNetConfig, stage: int, *, first: bool, rngs: nnx.Rngs) -> None:
        num_out = config.channels[stage]
        num_in = (config.stem, *config.channels)[stage] if first else num_out
        num_inner = num_in * config.expansions[stage]
        stride = config.strides[stage] if first else 1
        fused = stage < FUSED[config.block]
        gated = not fused or config.block != "v2"
        projects = gated or num_inner != num_in
        widens = not fused and num_inner != num_in
        self.residual = stride == 1 and num_in == num_out
        self.widen = ConvNorm(num_in, num_inner, rngs=rngs) if widens else None
        self.filter = ConvNorm(
            num_in if fused else num_inner,
            num_inner if projects else num_out,
            kernel=config.kernels[stage],
            stride=stride,
            depthwise=not fused,
            rngs=rngs,
        )
        # The gate's width follows the block's input, not the widened channels.
        squeezed = max(1, num_in // config.squeeze)
        self.gate = SqueezeExcite(num_inner, squeezed, rngs=rngs) if gated else None
        self.project = ConvNorm(num_inner, num_out, active=False, rngs=rngs) if projects else None

    @jax.named_scope("mbconv")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = x if self.widen is None else self.widen(x)
        y = self.filter(y)
        y = y if self.gate is None else self.gate(y)
        y = y if self.project is None else self.project(y)
        return x + y if self.residual else y


class Stage(nnx.Module):
    """Blocks of one width; the first one may stride, the others are equal."""

    def __init__(self, config: ConvNetConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        num_equal = config.depths[stage] - 1

        def change(rngs: nnx.Rngs) -> MBConv:
            return MBConv(config, stage, first=True, rngs=rngs)

        def keep(rngs: nnx.Rngs) -> MBConv:
            return MBConv(config, stage, first=False, rngs=rngs)

        looped = config.layers == "scan" and num_equal > 0
        self.remat: Remat = config.remat
        written_out = 0 if looped else num_equal
        self.blocks = nnx.List([change(rngs), *(keep(rngs) for _ in range(written_out))])
        self.rest = Stack(keep, num_equal, remat=config.remat, rngs=rngs) if looped else None

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        apply = make_apply(self.remat)
        for block in self.blocks:
            x = apply(x, block)
        x = x if self.rest is None else self.rest(x)
        return constrain(x, ("batch", None, None, None))


class Head(nnx.Module):
    """Last convolution, mean over the image, classifier."""

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs) -> None:
        self.conv = ConvNorm(config.channels[-1], config.head, rngs=rngs)
        self.classify = _linear(config.head, config.num_classes, axes=("embed", None), rngs=rngs)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.classify(jnp.mean(self.conv(x), axis=(1, 2)))


class ConvNet(nnx.Module):
    """Stem, stages, head."""

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(3, config.stem, kernel=3, stride=2, rngs=rngs)
        stages = range(len(config.channels))
        self.stages = nnx.List([Stage(config, stage, rngs=rngs) for stage in stages])
        self.head = Head(config, rngs=rngs)

    @jax.named_scope("convnet")
    def __call__(self, images: Float[Array, "*lead H W 3"]) -> Float[Array, "*lead K"]:
        images = constrain(images, ("batch", *(None,) * (images.ndim - 1)))
        x = images.reshape(-1, *images.shape[-3:])
        with jax.named_scope("stem"):
            x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        logits = self.head(x)
        return logits.reshape(*images.shape[:-3], logits.shape[-1])


def _linear(
    num_in: int, num_out: int, *, axes: tuple[str | None, str | None], rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a biased linear layer whose parameters carry `axes`."""
    return nnx.Linear(
        num_in,
        num_out,
        dtype=DTYPE,
        kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), axes),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), axes[1:]),
        rngs=rngs,
    )


def build(config: ConvNetConfig, rngs: nnx.Rngs) -> ConvNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return ConvNet(config, rngs=rngs)


def loss(module: ConvNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean softmax cross entropy, in float32, of `images` against `labels`."""
    log_probs = jax.nn.log_softmax(module(batch["images"]).astype(jnp.float32))
    picked = log_probs * jax.nn.one_hot(batch["labels"], log_probs.shape[-1])
    return -jnp.mean(jnp.sum(picked, axis=-1))


CPU = ConvNetConfig(
    stem=8,
    channels=(8, 8, 16, 16, 24, 32, 32),
    depths=(1, 1, 2, 1, 1, 1, 1),
    kernels=(3, 3, 5, 3, 5, 5, 3),
    strides=(1, 2, 2, 2, 1, 2, 1),
    head=64,
    num_classes=10,
    layers="unroll",
)
# Its few blocks are written out, as the published programs write all of theirs.
B0 = ConvNetConfig(
    stem=32,
    channels=(16, 24, 40, 80, 112, 192, 320),
    depths=(1, 2, 2, 3, 3, 4, 1),
    kernels=(3, 3, 5, 3, 5, 5, 3),
    strides=(1, 2, 2, 2, 1, 2, 1),
    head=1280,
    num_classes=1000,
    layers="unroll",
)


def scale(width: float, depth: float) -> ConvNetConfig:
    """Scales B0's channels, rounded to multiples of 8 but not down by a tenth, and its depths."""

    def channels(num: int) -> int:
        rounded = max(8, int(num * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * num * width else rounded

    stages = tuple(channels(num) for num in B0.channels)
    return dataclasses.replace(
        B0,
        stem=channels(B0.stem),
        channels=stages,
        depths=tuple(math.ceil(num * depth) for num in B0.depths),
        head=4 * stages[-1],
        layers="scan",
    )


def _v2(stem: int, channels: tuple[int, ...], depths: tuple[int, ...]) -> ConvNetConfig:
    """Returns a V2 network; the smallest one has no seventh stage."""
    num_stages = len(channels)
    return ConvNetConfig(
        stem=stem,
        channels=channels,
        depths=depths,
        kernels=(3,) * num_stages,
        strides=(1, 2, 2, 2, 1, 2, 1)[:num_stages],
        expansions=(1, 4, 4, 4, 6, 6, 6)[:num_stages],
        block="v2",
        head=1280,
        num_classes=1000,
    )


# Width, depth, edge of the image, global batch. Source: the published program's `efficientnet`
# table; the batch, smaller for larger images, is ours.
SCALES = {
    "b1": (1.0, 1.1, 240, 512),
    "b2": (1.1, 1.2, 260, 512),
    "b3": (1.2, 1.4, 300, 256),
    "b4": (1.4, 1.8, 380, 256),
    "b5": (1.6, 2.2, 456, 128),
    "b6": (1.8, 2.6, 528, 128),
    "b7": (2.0, 3.1, 600, 64),
}
V2S = _v2(24, (24, 48, 64, 128, 160, 256), (2, 4, 4, 6, 9, 15))
V2M = _v2(24, (24, 48, 80, 160, 176, 304, 512), (3, 5, 5, 7, 14, 18, 5))
V2L = _v2(32, (32, 64, 96, 192, 224, 384, 640), (4, 7, 7, 10, 19, 25, 7))
# A device holds several HD images; without remat their features alone overflow it.
FLEET = dataclasses.replace(V2S, remat="full")

Variant = tuple[str, Validity, dict[str, Any], str]


def _fused(config: ConvNetConfig) -> tuple[Variant, ...]:
    """Returns the table's rows but the first; stage 3 filters by 3x3 in all of them."""
    kernels = (*config.kernels[:2], 3, *config.kernels[3:])
    return tuple(
        (
            block,
            "T2",
            {"block": block, "kernels": kernels},
            f"MBConv with Fused-MBConv in stages 1-{FUSED[block]}",
        )
        for block in ("fused13", "fused15", "fusedall")
    )


LOOPED: Variant = ("looped", "T0", {"layers": "scan"}, "equal blocks written out with a loop")
REMAT: Variant = ("remat", "T0", {"remat": "full"}, "kept activations with those made again")
UNFUSED: Variant = (
    "unfused",
    "T2",
    {"block": "mbconv"},
    "Fused-MBConv with MBConv in stages 1-3",
)


def _rivals(
    base: str,
    config: ConvNetConfig,
    workload: Workload,
    source: str,
    variants: tuple[Variant, ...] = (),
) -> list[Candidate]:
    """Returns the base and its variants, named after it but for its change."""
    first: Variant = ("", "base", {}, "")
    stem = base.removesuffix("-mbconv")
    return [
        Candidate(
            name=f"{stem}-{change}" if change else base,
            family="convnet",
            size=base.split("-")[1],
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=base,
            replaces=replaces,
            validity=validity,
            source=source,
        )
        for change, validity, fields, replaces in (first, *variants)
    ]


def _workload(images: tuple[int, ...], num_classes: int, global_batch: int) -> Workload:
    """Returns a training step on images [..., H, W], with a label for each."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("labels", Input(shape=images[:-2], dtype="int32", high=num_classes)),
    )
    return Workload(global_batch=global_batch, inputs=inputs)


CPU_SOURCE = "EfficientNet's stages, narrow and shallow, to step on two cores"
PAPER_SOURCE = (
    "Tan and Le, EfficientNet, ICML 2019: B0 at 224x224; fused stages as in EfficientNetV2, ICML "
    "2021, table 3, which has them for B4; the batch is ours"
)
SCALED_SOURCE = "Tan and Le, EfficientNet, ICML 2019, {name} at {edge}x{edge}; the batch is ours"
V2_SOURCE = (
    "Tan and Le, EfficientNetV2, ICML 2021, as torchvision's {name}; the image's edge is the "
    "largest in training, the batch ours"
)
FLEET_SOURCE = (
    "Tan and Le, EfficientNetV2, ICML 2021, V2-S, on eight cameras of 1280x960 as Tesla described "
    "them in 2021; remat and the batch are ours"
)
_V2 = (
    ("v2s", "efficientnet_v2_s", V2S, _workload((300, 300), 1000, 512), (UNFUSED,)),
    ("v2m", "efficientnet_v2_m", V2M, _workload((384, 384), 1000, 256), ()),
    ("v2l", "efficientnet_v2_l", V2L, _workload((384, 384), 1000, 128), ()),
)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals(
        "convnet-cpu-mbconv",
        CPU,
        _workload((48, 48), 10, 8),
        CPU_SOURCE,
        (*_fused(CPU), LOOPED, REMAT),
    ),
    *_rivals(
        "convnet-paper-mbconv", B0, _workload((224, 224), 1000, 512), PAPER_SOURCE, _fused(B0)
    ),
    *(
        candidate
        for name, (width, depth, edge, batch) in SCALES.items()
        for candidate in _rivals(
            f"convnet-paper-{name}",
            scale(width, depth),
            _workload((edge, edge), 1000, batch),
            SCALED_SOURCE.format(name=name.upper(), edge=edge),
            _fused(scale(width, depth)) if name == "b4" else (),
        )
    ),
    *(
        candidate
        for name, published, config, workload, variants in _V2
        for candidate in _rivals(
            f"convnet-paper-{name}", config, workload, V2_SOURCE.format(name=published), variants
        )
    ),
    *_rivals(
        "convnet-fleet-v2s", FLEET, _workload((8, 960, 1280), 1000, 32), FLEET_SOURCE, (UNFUSED,)
    ),
)
