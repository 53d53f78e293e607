"""RegNetY: a few numbers give all widths and depths; what should a block's 3x3 convolution be?

Block j of the network wants initial_width + slope * j channels. Wishes are rounded to powers of
`multiplier`, then to multiples of 8 and of the group width; blocks of one width make a stage, and
each stage halves the edges. A block mixes by a 1x1 convolution, filters by a grouped 3x3, gates the
channels (squeeze-excite, a quarter of the block's input channels) and mixes again; its shortcut
joins before the last activation. Batch norm's statistics are those of the global batch.

In place of the grouped 3x3 there may be a dense one, over as many fewer channels as cost the block
the same products; or groups twice as wide in a narrower network. Group norm, where it stands for
batch norm, has the convolutions' groups.

Images may have any dims before their edges, such as cameras; they are folded into the batch.

Letters: `B` batch (with cameras), `H` `W` image or feature map, `C` channels in, `F` channels out,
`K` classes. A `2` marks the edges that a layer puts out.

Sources: Radosavovic et al., "Designing Network Design Spaces", CVPR 2020, section 3.3 and table 4;
torchvision's regnet_y, whose rounding and parameter counts these are.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.convolution import ConvNorm
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import GroupNorm
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.weights import Linear

DTYPE = jnp.bfloat16
QUANTUM = 8  # widths are multiples of it
STEM = 32  # channels of the first convolution, in all published RegNets
DIVISOR = 32  # devices that parameters are split over; RegNet's widths are not all multiples


@dataclass(frozen=True, kw_only=True, slots=True)
class RegNetConfig:
    """The numbers that give the shape of the network.

    Attributes:
      depth: Blocks over all stages.
      initial_width: Channels that the first block wants (the paper's w_0).
      slope: Channels that each block wants more than the one before (w_a).
      multiplier: Stages' widths are near powers of it, times `initial_width` (w_m).
      group_width: Channels of a group of the 3x3 convolutions.
      filter: The 3x3 convolutions are grouped, or dense over fewer channels.
      squeeze_excite: Gate the channels; RegNetX does not.
      norm: What follows each convolution.
      remat: `full` keeps only the input of each block for the backward pass.
      num_classes: Width of the classifier.
    """

    depth: int
    initial_width: int
    slope: float
    multiplier: float
    group_width: int
    filter: Literal["grouped", "dense"] = "grouped"
    squeeze_excite: bool = True
    norm: Literal["batch", "group"] = "batch"
    remat: Literal["none", "full"] = "none"
    num_classes: int


def stage_shapes(config: RegNetConfig) -> tuple[tuple[int, int], ...]:
    """Computes width and depth of each stage.

    Block j has width w_0 * w_m^round(log_{w_m}(1 + slope * j / w_0)), rounded to multiples of 8;
    a stage's width is then rounded to a multiple of the group width, as torchvision does it.
    """
    start, base = config.initial_width, config.multiplier
    widths = []
    for block in range(config.depth):
        power = round(math.log(1 + config.slope * block / start, base))
        widths.append(round(start * base**power / QUANTUM) * QUANTUM)
    stages = sorted(set(widths))
    return tuple((_fit(width, config.group_width), widths.count(width)) for width in stages)


def _fit(width: int, group_width: int) -> int:
    """Rounds to a multiple of the group width, but by no more than a tenth down."""
    unit = min(group_width, width)
    fitted = max(unit, int(width + unit / 2) // unit * unit)
    return fitted + unit if fitted < 0.9 * width else fitted


def dense_width(width: int, group_width: int) -> int:
    """Computes the channels at which a dense 3x3 costs an equal block what a grouped one does.

    A block with 1x1 convolutions of `width` to b and back has 2 width b + 9 b^2 products a pixel,
    the grouped one 2 width^2 + 9 group_width width. With b = f width this is
    9 f^2 + 2 f = 2 + 9 group_width / width, solved for f; rounded to a multiple of 8.
    """
    right = 2 + 9 * group_width / width
    fraction = (math.sqrt(1 + 9 * right) - 1) / 9
    return max(1, round(fraction * width / QUANTUM)) * QUANTUM


def _conv_norm(
    config: RegNetConfig, num_in: int, num_out: int, *, edge: int = 1, **rest: Any
) -> ConvNorm:
    """Makes a convolution with symmetric padding and the norm that the config asks for."""
    padding = ((edge // 2, edge // 2),) * 2
    unit = ConvNorm(num_in, num_out, kernel=(edge, edge), padding=padding, **rest)
    if config.norm == "group":
        group = math.gcd(num_out, config.group_width)
        unit.norm = GroupNorm(num_out, num_groups=num_out // group)
    return unit


class SqueezeExcite(nnx.Module):
    """Gates channels by a two-layer network of their mean over the image."""

    def __init__(self, num_channels: int, num_squeezed: int, *, rngs: nnx.Rngs) -> None:
        self.reduce = Linear(num_channels, num_squeezed, ("embed", None), rngs=rngs)
        self.expand = Linear(num_squeezed, num_channels, (None, "embed"), rngs=rngs)

    @jax.named_scope("squeeze_excite")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(nnx.relu(self.reduce(mean))))


class Block(nnx.Module):
    """relu(shortcut(x) + expand(gate(filter(reduce(x))))); the first of a stage strides."""

    def __init__(
        self, config: RegNetConfig, num_in: int, width: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        group_width = min(config.group_width, width)
        dense = config.filter == "dense"
        inner = dense_width(width, group_width) if dense else width
        groups = 1 if dense else width // group_width
        make = functools.partial(_conv_norm, config, rngs=rngs)
        self.reduce = make(num_in, inner)
        self.filter = make(inner, inner, edge=3, stride=stride, groups=groups)
        squeezed = max(1, round(num_in / 4))
        gated = config.squeeze_excite
        self.gate = SqueezeExcite(inner, squeezed, rngs=rngs) if gated else None
        self.expand = make(inner, width, activation=None)
        changes = stride != 1 or num_in != width
        self.shortcut = make(num_in, width, stride=stride, activation=None) if changes else None

    @jax.named_scope("block")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        # Batch-split before the grouped convolution: the partitioner must not split its channels.
        y = self.filter(constrain(self.reduce(x), ("batch", None, None, None)))
        y = self.expand(y if self.gate is None else self.gate(y))
        y = nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))
        return constrain(y, ("batch", None, None, None))


class Stage(nnx.Module):
    """A block that halves the edges and changes the width, and the equal ones after it."""

    def __init__(
        self, config: RegNetConfig, num_in: int, width: int, depth: int, *, rngs: nnx.Rngs
    ) -> None:
        def change(rngs: nnx.Rngs) -> Block:
            return Block(config, num_in, width, stride=2, rngs=rngs)

        def keep(rngs: nnx.Rngs) -> Block:
            return Block(config, width, width, stride=1, rngs=rngs)

        self.first = Stack(change, 1, layers="unroll", remat=config.remat, rngs=rngs)
        self.rest = Stack(keep, depth - 1, remat=config.remat, rngs=rngs) if depth > 1 else None

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.first(x)
        return x if self.rest is None else self.rest(x)


class RegNet(nnx.Module):
    """Stem, stages, mean over the image, classifier."""

    def __init__(self, config: RegNetConfig, *, rngs: nnx.Rngs) -> None:
        self.stem = _conv_norm(config, 3, STEM, edge=3, stride=2, rngs=rngs)
        stages, width = [], STEM
        for num_out, depth in stage_shapes(config):
            stages.append(Stage(config, width, num_out, depth, rngs=rngs))
            width = num_out
        self.stages = nnx.List(stages)
        self.classify = Linear(width, config.num_classes, ("embed", None), rngs=rngs)

    @jax.named_scope("regnet")
    def __call__(self, images: Float[Array, "*lead H W 3"]) -> Float[Array, "*lead K"]:
        images = constrain(images, ("batch", *(None,) * (images.ndim - 1)))
        x = images.astype(DTYPE).reshape(-1, *images.shape[-3:])
        x = constrain(x, ("batch", None, None, None))
        with jax.named_scope("stem"):
            x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        with jax.named_scope("head"):
            logits = self.classify(jnp.mean(x, axis=(1, 2)))
        return logits.reshape(*images.shape[:-3], logits.shape[-1])


def _keep_whole(module: nnx.Module) -> None:
    """Takes the logical axis from every dim that `DIVISOR` devices do not divide."""
    for _, variable in nnx.iter_graph(module):
        if isinstance(variable, nnx.Param):
            axes = variable.get_metadata()["out_sharding"]
            pairs = zip(axes, variable.shape, strict=True)
            whole = tuple(None if size % DIVISOR else axis for axis, size in pairs)
            variable.set_metadata(out_sharding=whole)


def build(config: RegNetConfig, rngs: nnx.Rngs) -> RegNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    module = RegNet(config, rngs=rngs)
    _keep_whole(module)
    return module


def loss(module: RegNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean softmax cross entropy of `images` against one label for each."""
    return cross_entropy(module(batch["images"]), batch["labels"])


def _published(
    depth: int, initial_width: int, slope: float, multiplier: float, group_width: int
) -> RegNetConfig:
    return RegNetConfig(
        depth=depth,
        initial_width=initial_width,
        slope=slope,
        multiplier=multiplier,
        group_width=group_width,
        num_classes=1000,
    )


CPU = dataclasses.replace(_published(3, 32, 28.0, 1.5, 8), num_classes=10)
PAPER_1600MF = _published(27, 48, 20.71, 2.65, 24)
PAPER_8GF = _published(17, 192, 76.82, 2.19, 56)
PAPER_16GF = _published(18, 200, 106.23, 2.48, 112)
# A device holds dozens of HD images; without remat their features alone overflow 32 GB.
FLEET_32GF = dataclasses.replace(_published(20, 232, 115.89, 2.53, 232), remat="full")

Variant = tuple[str, Validity, dict[str, Any], str]


DENSE: Variant = (
    "dense",
    "T2",
    {"filter": "dense"},
    "the grouped 3x3 convolution with a dense one over fewer channels, near equal FLOPs",
)
NO_SQUEEZE: Variant = (
    "nose",
    "T2",
    {"squeeze_excite": False},
    "gated blocks with plain ones, as RegNetX has",
)
GROUP_NORM: Variant = ("groupnorm", "T2", {"norm": "group"}, "batch norm with group norm")


def _variants(**narrower: Any) -> tuple[Variant, ...]:
    """Returns all variants; `narrower` are the numbers of the network with twice as wide groups.

    It has the base's depths, and its FLOPs to 3 %; found by search over the other three numbers.
    """
    what = "groups with groups twice as wide in a narrower network, equal FLOPs"
    return (("group2x", "T1", narrower, what), DENSE, NO_SQUEEZE, GROUP_NORM)


def _rivals(
    size: str,
    base: str,
    config: RegNetConfig,
    workload: Workload,
    source: str,
    variants: tuple[Variant, ...],
) -> list[Candidate]:
    """Returns the base and its variants; a cpu variant's name has no part for its base."""
    prefix = f"regnet-{size}" if base == "base" else f"regnet-{size}-{base}"
    first: Variant = ("", "base", {}, "")
    return [
        Candidate(
            name=f"{prefix}-{change}" if change else f"regnet-{size}-{base}",
            family="regnet",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=f"regnet-{size}-{base}",
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


CPU_SOURCE = "RegNetY's parts, narrow and two stages deep, to step on two cores"
PAPER_SOURCE = (
    "Radosavovic et al., CVPR 2020, as torchvision's {name} at 224x224; the batch is ours"
)
FLEET_SOURCE = (
    "Radosavovic et al., CVPR 2020, as torchvision's regnet_y_32gf, on eight cameras of 1280x960 "
    "as Tesla described them in 2021; remat and the batch are ours"
)
_CPU_WORK = _workload((32, 32, 3), 10, 8)
_PAPER_WORK = _workload((224, 224, 3), 1000, 512)
_FLEET_WORK = _workload((8, 960, 1280, 3), 1000, 32)
_PAPER = (
    (
        "1600mf",
        "regnet_y_1_6gf",
        PAPER_1600MF,
        _variants(initial_width=40, slope=16.71, group_width=48),
    ),
    (
        "8gf",
        "regnet_y_8gf",
        PAPER_8GF,
        _variants(initial_width=152, slope=57.97, group_width=112),
    ),
    (
        "16gf",
        "regnet_y_16gf",
        PAPER_16GF,
        _variants(initial_width=208, slope=74.73, multiplier=2.15, group_width=224),
    ),
)

_CPU_VARIANTS = _variants(initial_width=24, slope=16.0, multiplier=2.0, group_width=16)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("cpu", "base", CPU, _CPU_WORK, CPU_SOURCE, _CPU_VARIANTS),
    *(
        candidate
        for base, name, config, variants in _PAPER
        for candidate in _rivals(
            "paper", base, config, _PAPER_WORK, PAPER_SOURCE.format(name=name), variants
        )
    ),
    *_rivals("fleet", "32gf", FLEET_32GF, _FLEET_WORK, FLEET_SOURCE, (DENSE,)),
)
