"""ConvNeXt: a convolutional network in a transformer's shape, and what may stand in its places.

A block filters each channel on its own (7x7), normalises the channels of each pixel, widens them
four times, GELU, narrows, scales, and adds its input. Stages begin with a norm and a 2x2
convolution of stride 2. Stochastic depth is left out: a step is deterministic.

What may be put in place of its parts, openly:
- Batch norm stands for every layer norm but the last one, which sees one vector an image.
- Groups of eight channels stand for depthwise filters: eight times their FLOPs and parameters,
  which at T are 16 % more FLOPs and 8 % more parameters in all; the widths stay.
- The overlapping stem is one 7x7 convolution of stride 4.
Several cameras are so many images, each with a label of its own.

Letters: `B` batch, `I` `J` rows and columns of an image, `H` `W` of features, `C` channels, `F`
channels out, `K` classes. A `2` marks the edges that a layer puts out.

Source: Liu et al., "A ConvNet for the 2020s", CVPR 2022, table 9 (T, S, B: 29, 50 and 89 million
parameters; 4.5, 8.7 and 15.4 GFLOPs, which are multiply-adds).
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
from jaxbench.models.blocks.convolution import Conv
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import LayerNorm, make_norm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, constant, spread

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNeXtConfig:
    """Shape of the network; the tuples have one entry per stage.

    Attributes:
      channels: Channels of a stage.
      depths: Blocks in a stage.
      kernel: Edge of a block's filters.
      group: Channels that a block's filters mix; 1 is depthwise.
      expansion: Inner channels of a block over its channels.
      stem: Patches of 4x4 pixels, or a 7x7 convolution of stride 4.
      norm: Normalises channels pixel by pixel, or each channel over the batch.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    num_classes: int
    kernel: Literal[7, 5] = 7
    group: Literal[1, 8] = 1
    expansion: int = 4
    stem: Literal["patch", "overlap"] = "patch"
    norm: Literal["layer", "batch"] = "layer"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    layers: Layers = "scan"
    remat: Remat = "none"


class Block(nnx.Module):
    """x + scale * MLP(norm(filter(x))), the MLP over the channels of each pixel."""

    def __init__(self, config: ConvNeXtConfig, num_channels: int, *, rngs: nnx.Rngs) -> None:
        C = num_channels
        self.filter = Conv(
            C,
            C,
            kernel=(config.kernel, config.kernel),
            groups=C // config.group,
            bias=True,
            rngs=rngs,
        )
        self.norm: Any = make_norm(config.norm, C)
        self.mlp = FeedForward(
            C, config.expansion * C, activation=config.activation, bias=True, rngs=rngs
        )
        self.scale = constant((C,), (None,), 1e-6)

    @jax.named_scope("block")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = constrain(x, ("batch", None, None, None))
        y = self.mlp(self.norm(self.filter(x)))
        return x + y * spread(self.scale[...], y)


class Stage(nnx.Module):
    """A convolution that makes the map smaller, with its norm before or after, and blocks."""

    def __init__(self, config: ConvNeXtConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        num_out = config.channels[stage]
        self.is_stem = stage == 0
        num_in = 3 if self.is_stem else config.channels[stage - 1]
        overlap = self.is_stem and config.stem == "overlap"
        stride = 4 if self.is_stem else 2
        edge = 7 if overlap else stride
        self.norm: Any = make_norm(config.norm, num_out if self.is_stem else num_in)
        self.shrink = Conv(
            num_in,
            num_out,
            kernel=(edge, edge),
            stride=stride,
            padding="SAME" if overlap else "VALID",
            bias=True,
            rngs=rngs,
        )
        self.blocks = Stack(
            lambda rngs: Block(config, num_out, rngs=rngs),
            config.depths[stage],
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.norm(self.shrink(x)) if self.is_stem else self.shrink(self.norm(x))
        return constrain(self.blocks(x), ("batch", None, None, None))


class ConvNeXt(nnx.Module):
    """Stages, mean over the image, norm, classifier."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: nnx.Rngs) -> None:
        stages = range(len(config.channels))
        self.stages = nnx.List([Stage(config, stage, rngs=rngs) for stage in stages])
        self.norm = LayerNorm(config.channels[-1])
        self.classify = Linear(config.channels[-1], config.num_classes, ("embed", None), rngs=rngs)

    @jax.named_scope("convnext")
    def __call__(self, images: Float[Array, "B *cameras I J 3"]) -> Float[Array, "B *cameras K"]:
        images = constrain(images.astype(DTYPE), ("batch", *(None,) * (images.ndim - 1)))
        x = images.reshape(-1, *images.shape[-3:])
        for stage in self.stages:
            x = stage(x)
        with jax.named_scope("head"):
            y = self.classify(self.norm(jnp.mean(x, axis=(1, 2))))
        return y.reshape(*images.shape[:-3], -1)


def build(config: ConvNeXtConfig, rngs: nnx.Rngs) -> ConvNeXt:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return ConvNeXt(config, rngs=rngs)


def loss(module: ConvNeXt, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of `labels`, one for each image of `images`."""
    return cross_entropy(module(batch["images"]), batch["labels"])


def _workload(
    images: tuple[int, ...], num_classes: int, global_batch: int, learning_rate: float = 1e-3
) -> Workload:
    """Returns a training step on images [..., I, J], each with a label."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("labels", Input(shape=images[:-2], dtype="int32", high=num_classes)),
    )
    return Workload(global_batch=global_batch, inputs=inputs, learning_rate=learning_rate)


Change = tuple[str, str, Validity, dict[str, Any]]

_TANH: Change = ("tanh", "exact GELU by its tanh form", "T1", {"activation": "gelu_tanh"})
_GROUPED: Change = ("grouped", "depthwise filters by groups of eight", "T2", {"group": 8})
_CHANGES: tuple[Change, ...] = (
    _TANH,
    ("k5", "7x7 filters by 5x5", "T2", {"kernel": 5}),
    _GROUPED,
    ("bn", "layer norm by batch norm", "T2", {"norm": "batch"}),
    ("overlap", "the stem of patches by a 7x7 convolution", "T2", {"stem": "overlap"}),
    ("unrolled", "the loops over blocks by blocks written out", "T0", {"layers": "unroll"}),
    ("rematdots", "kept activations by kept products", "T0", {"remat": "dots"}),
    ("rematfull", "kept activations by kept block inputs", "T0", {"remat": "full"}),
)


def _rivals(
    base: str,
    config: ConvNeXtConfig,
    workload: Workload,
    source: str,
    changes: tuple[Change, ...] = (),
) -> tuple[Candidate, ...]:
    """Returns the base and its variants."""
    root = Candidate(
        name=base,
        family="convnext",
        size=base.split("-")[1],
        config=config,
        build=build,
        loss=loss,
        workload=workload,
        base=base,
        source=source,
    )
    stem = base.removesuffix("-base")
    variants = (
        dataclasses.replace(
            root,
            name=f"{stem}-{change}",
            config=dataclasses.replace(config, **fields),
            replaces=replaces,
            validity=validity,
        )
        for change, replaces, validity, fields in changes
    )
    return (root, *variants)


CPU = ConvNeXtConfig(channels=(16, 32), depths=(2, 2), num_classes=10)
T = ConvNeXtConfig(channels=(96, 192, 384, 768), depths=(3, 3, 9, 3), num_classes=1000)
S = dataclasses.replace(T, depths=(3, 3, 27, 3))
B = dataclasses.replace(S, channels=(128, 256, 512, 1024))
FLEET = dataclasses.replace(B, remat="full")

CPU_SOURCE = "no publication: ConvNeXt's parts, narrow and two stages deep, to step on two cores"
PAPER_SOURCE = "Liu et al., ConvNeXt, CVPR 2022, table 9, at 224 x 224; the batch is ours"
FLEET_SOURCE = (
    "ConvNeXt-B of Liu et al., CVPR 2022; eight cameras of 960 x 1280 and the batch are ours"
)
_PAPER_WORK = _workload((224, 224), 1000, 512)
_FLEET_WORK = _workload((8, 960, 1280), 1000, 32)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("convnext-cpu-base", CPU, _workload((32, 32), 10, 8, 3e-3), CPU_SOURCE, _CHANGES),
    *_rivals("convnext-paper-t", T, _PAPER_WORK, PAPER_SOURCE, _CHANGES),
    *_rivals("convnext-paper-s", S, _PAPER_WORK, PAPER_SOURCE),
    *_rivals("convnext-paper-b", B, _PAPER_WORK, PAPER_SOURCE),
    *_rivals("convnext-fleet-b", FLEET, _FLEET_WORK, FLEET_SOURCE, (_TANH, _GROUPED)),
)
