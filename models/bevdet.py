"""Boxes from a lifted bird's-eye view, after BEVDet and BEVDet4D, with lifts and temporal fusions.

Pixels spread their features over depth bins; points are summed into cells of a map; a residual
encoder reads the map, and a centre head finds boxes as peaks of a heat map. "BEVDet-like":
- The rig is fixed and level, so cells are known while tracing and image rows can be contracted.
- The vehicle stands still: earlier frames' maps are not shifted. All frames are trained through;
  BEVDet4D takes no gradient through the earlier one, and encodes each frame before they meet.
- One group of all classes; published are six groups with six branches each. An object's peak is as
  wide whatever its size. Merged image features are at stride 16 as published, in 512 channels.

The lifts are one function of the same parameters; the temporal fusions are not.

Letters: `B` batch, `T` frames, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of
features, `C` channels, `D` depth bins, `P` points (cameras x columns x bins), `G` cells, `X` `Y`
the map's edges (forward, left), `K` classes, `M` objects.

Sources: Huang et al., "BEVDet", 2021 (R50: 256x704, 1-60 m at 1 m, 64 channels, 128x128 cells of
0.8 m); Huang and Huang, "BEVDet4D", 2022; Yin et al., "CenterPoint", CVPR 2021 (head and losses);
Ballas et al., "ConvGRU", ICLR 2016; Philion and Fidler, "Lift, Splat, Shoot", ECCV 2020 (sums by
sorting); Martin and Cundy, "Linear RNNs", ICLR 2018 (gated scan).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Workload, constrain
from jaxbench.models.bev import LIFTS as SPLATS
from jaxbench.models.blocks.attention import Attention
from jaxbench.models.blocks.camera import (
    BasicBlock,
    CameraEncoder,
    Cameras,
    Stages,
    rig_directions,
)
from jaxbench.models.blocks.convolution import Conv, ConvNorm, upsample
from jaxbench.models.blocks.losses import absolute_error
from jaxbench.models.blocks.queries import BOX, BOX_WEIGHT, CODES, decode_boxes
from jaxbench.models.blocks.weights import Linear, constant

DTYPE = jnp.bfloat16
PRIOR = -2.19  # CenterPoint's first logit of the heat map
FRAME_THETA = 100.0  # base of the rotary ages: a queue is a few frames long


@dataclass(frozen=True, kw_only=True, slots=True)
class BevDetConfig:
    """Sizes of the network and geometry of the rig.

    Attributes:
      stem, widths, depths, neck: Backbone and its merged map, as in `CameraEncoder`.
      cameras: All cameras as one batch, or one after another with their own batch statistics.
      context: Channels of a lifted point.
      num_bins, nearest_m, bin_m: Depth bins, the first one's depth and the step between them.
      fov_degrees: Horizontal field of view of a camera.
      grid: Cells along an edge of the map.
      extent_m: Metres from the map's middle to each edge.
      lift: How points are summed into cells: one by one; gathered by a table; multiplied by a
        one-hot matrix; sorted by cell and taken as differences of a running sum.
      temporal: How frames meet: the last alone; beside the one before it; by a gated recurrence of
        convolutions; by attention over frames in every cell; by a gated linear scan in every cell.
      bev_widths, bev_depths: Residual stages of the map, each with stride 2.
      bev_neck: Channels that the map's encoder puts out.
      head: Channels of the centre head's branches.
    """

    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    neck: int
    cameras: Cameras = "fold"
    context: int
    num_bins: int
    nearest_m: int = 1
    bin_m: int = 1
    fov_degrees: int = 70
    grid: int
    extent_m: float = 51.2
    lift: Literal["segment_sum", "gather", "product", "sorted"] = "segment_sum"
    temporal: Literal["none", "concat", "gru", "attention", "scan"] = "none"
    bev_widths: tuple[int, ...]
    bev_depths: tuple[int, ...]
    bev_neck: int
    head: int
    num_classes: int = 10


def rig_cells(
    config: BevDetConfig, *, num_cameras: int, num_columns: int
) -> Int[np.ndarray, "N W D"]:
    """Computes which cell a camera's column and depth bin fall into; `grid` squared if none."""
    directions = rig_directions(
        num_cameras=num_cameras, num_columns=num_columns, fov_degrees=config.fov_degrees
    )
    depths = config.nearest_m + config.bin_m * np.arange(config.num_bins)
    grid = config.grid
    scaled = (directions[:, :, None] * depths[:, None] / config.extent_m + 1) * grid / 2
    x, y = np.moveaxis(np.floor(scaled).astype(np.int32), -1, 0)
    inside = (x >= 0) & (x < grid) & (y >= 0) & (y < grid)
    return np.where(inside, x * grid + y, grid * grid).astype(np.int32)


@jax.named_scope("lift")
def lift_by_sorted_sum(
    depth: Float[Array, "B N H W D"],
    context: Float[Array, "B N H W C"],
    cells: Int[np.ndarray, "N W D"],
    num_cells: int,
) -> Float[Array, "B G C"]:
    """Contracts rows, sorts points by cell, and takes differences of their running sum.

    The order is known while tracing; sums run in float32 over all points, so that rounding grows
    with their number.
    """
    flat = cells.reshape(-1)
    order = np.argsort(flat, kind="stable").astype(np.int32)
    ends = np.searchsorted(flat[order], np.arange(num_cells), side="right").astype(np.int32)
    starts = np.concatenate([np.zeros(1, np.int32), ends[:-1]])
    points = jnp.einsum("bnhwd,bnhwc->bnwdc", depth, context)
    points = points.reshape(depth.shape[0], -1, context.shape[-1])[:, order]
    sums = jnp.pad(jnp.cumsum(points.astype(jnp.float32), axis=1), ((0, 0), (1, 0), (0, 0)))
    return (sums[:, ends] - sums[:, starts]).astype(context.dtype)


LIFTS = {**SPLATS, "sorted": lift_by_sorted_sum}


class Lift(nnx.Module):
    """Image features to depths and contexts, and those to a map."""

    def __init__(self, config: BevDetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        num_out = config.num_bins + config.context
        self.weigh = Linear(config.neck, num_out, ("conv_in", None), rngs=rngs)

    @jax.named_scope("view")
    def __call__(self, features: Float[Array, "B N H W C"]) -> Float[Array, "B X Y _"]:
        config, (_, N, _, W, _) = self.config, features.shape
        x = self.weigh(features)
        depth = jax.nn.softmax(x[..., : config.num_bins].astype(jnp.float32)).astype(x.dtype)
        cells = rig_cells(config, num_cameras=N, num_columns=W)
        lifted = LIFTS[config.lift](depth, x[..., config.num_bins :], cells, config.grid**2)
        grid = lifted.reshape(-1, config.grid, config.grid, config.context)
        return constrain(grid, ("batch", None, None, None))


class NewestFrame(nnx.Module):
    """The last frame's map."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        del dim, rngs

    def __call__(self, maps: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y C"]:
        return maps[:, -1]


class BesideEarlier(nnx.Module):
    """The last two maps side by side, and a convolution back to the width of one."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.merge = ConvNorm(2 * dim, dim, kernel=(3, 3), rngs=rngs)

    @jax.named_scope("temporal")
    def __call__(self, maps: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y C"]:
        return self.merge(jnp.concatenate([maps[:, -2], maps[:, -1]], axis=-1))


class ConvGru(nnx.Module):
    """h = (1 - z) h + z tanh(conv(x, r h)), with gates z and r of a convolution of (x, h)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.gates = Conv(2 * dim, 2 * dim, kernel=(3, 3), bias=True, rngs=rngs)
        self.candidate = Conv(2 * dim, dim, kernel=(3, 3), bias=True, rngs=rngs)

    @jax.named_scope("temporal")
    def __call__(self, maps: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y C"]:
        loop = nnx.scan(_turn, in_axes=(nnx.Carry, None, 1), out_axes=nnx.Carry)
        return loop(jnp.zeros_like(maps[:, 0]), self, maps)


def _turn(state: Any, module: ConvGru, frame: Any) -> Any:
    """One frame of the recurrence; sigmoid and tanh in the maps' dtype."""
    gates = jax.nn.sigmoid(module.gates(jnp.concatenate([frame, state], axis=-1)))
    update, reset = jnp.split(gates, 2, axis=-1)
    new = jnp.tanh(module.candidate(jnp.concatenate([frame, reset * state], axis=-1)))
    return constrain((1 - update) * state + update * new, ("batch", None, None, None))


class FrameAttention(nnx.Module):
    """In every cell the last frame attends to all; rotary positions tell their ages."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(dim, 4, theta=FRAME_THETA, rngs=rngs)

    @jax.named_scope("temporal")
    def __call__(self, maps: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y C"]:
        B, T, X, Y, C = maps.shape
        # Newest first: the query stands at position 0.
        cells = jnp.moveaxis(maps[:, ::-1], 1, 3).reshape(B * X * Y, T, C)
        found = self.attention(cells[:, :1], cells)
        return maps[:, -1] + found.reshape(B, X, Y, C)


class LinearScan(nnx.Module):
    """h = a h + (1 - a) v in every cell and channel, with a and v of the frame alone.

    Without h in the gates all frames are combined as a tree, in float32.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.keep = Linear(dim, dim, ("conv_in", "conv_out"), rngs=rngs)
        self.value = Linear(dim, dim, ("conv_in", "conv_out"), rngs=rngs)
        self.out = Linear(dim, dim, ("conv_in", "conv_out"), rngs=rngs)

    @jax.named_scope("temporal")
    def __call__(self, maps: Float[Array, "B T X Y C"]) -> Float[Array, "B X Y C"]:
        keep = jax.nn.sigmoid(self.keep(maps).astype(jnp.float32))
        added = (1 - keep) * self.value(maps).astype(jnp.float32)
        _, states = jax.lax.associative_scan(_compose, (keep, added), axis=1)
        return maps[:, -1] + self.out(states[:, -1].astype(maps.dtype))


def _compose(first: Any, second: Any) -> Any:
    """Composes h -> a h + b with another of its kind."""
    return first[0] * second[0], second[0] * first[1] + second[1]


# With each fusion the number of frames that it reads; all without one.
FUSIONS: dict[str, tuple[Any, int | None]] = {
    "none": (NewestFrame, 1),
    "concat": (BesideEarlier, 2),
    "gru": (ConvGru, None),
    "attention": (FrameAttention, None),
    "scan": (LinearScan, None),
}


class BevEncoder(nnx.Module):
    """Residual stages at strides 2, 4, ...; the last is merged into the first, and enlarged."""

    def __init__(self, config: BevDetConfig, *, rngs: nnx.Rngs) -> None:
        widths, neck = config.bev_widths, config.bev_neck
        strides = (2,) * len(widths)
        self.stages = Stages(
            BasicBlock, config.context, widths, config.bev_depths, strides=strides, rngs=rngs
        )
        edges = (3, 3)
        self.merge = ConvNorm(widths[0] + widths[-1], 2 * neck, kernel=edges, rngs=rngs)
        self.refine = ConvNorm(2 * neck, 2 * neck, kernel=edges, rngs=rngs)
        self.narrow = ConvNorm(2 * neck, neck, kernel=edges, rngs=rngs)
        self.out = Conv(neck, neck, bias=True, rngs=rngs)

    @jax.named_scope("bev")
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y _"]:
        fine, *_, coarse = self.stages(x)
        coarse = upsample(coarse, fine.shape[1] // coarse.shape[1])
        y = self.refine(self.merge(jnp.concatenate([fine, coarse], axis=-1)))
        return self.out(self.narrow(upsample(constrain(y, ("batch", None, None, None)))))


class CenterHead(nnx.Module):
    """Logits of a heat map for each class, and a box in every cell."""

    def __init__(self, config: BevDetConfig, *, rngs: nnx.Rngs) -> None:
        C, edges = config.head, (3, 3)
        self.shared = ConvNorm(config.bev_neck, C, kernel=edges, rngs=rngs)
        self.branches = nnx.List([ConvNorm(C, C, kernel=edges, rngs=rngs) for _ in range(2)])
        outs = (config.num_classes, BOX)
        self.outs = nnx.List(
            [Conv(C, num, kernel=edges, bias=True, sharded=False, rngs=rngs) for num in outs]
        )
        self.prior = constant((config.num_classes,), (None,), PRIOR)

    @jax.named_scope("center_head")
    def __call__(
        self, x: Float[Array, "B X Y C"]
    ) -> tuple[Float[Array, "B X Y K"], Float[Array, "B X Y 10"]]:
        x = self.shared(x)
        heat, boxes = (
            out(branch(x)).astype(jnp.float32)
            for branch, out in zip(self.branches, self.outs, strict=True)
        )
        return heat + self.prior[...][None, None, None], boxes


class BevDet(nnx.Module):
    """Cameras, lift, frames, map, head."""

    def __init__(self, config: BevDetConfig, *, rngs: nnx.Rngs) -> None:
        fusion, self.num_frames = FUSIONS[config.temporal]
        self.camera = CameraEncoder(
            stem=config.stem,
            widths=config.widths,
            depths=config.depths,
            neck=config.neck,
            cameras=config.cameras,
            rngs=rngs,
        )
        self.lift = Lift(config, rngs=rngs)
        self.fusion: Any = fusion(config.context, rngs=rngs)
        self.bev = BevEncoder(config, rngs=rngs)
        self.head = CenterHead(config, rngs=rngs)

    @jax.named_scope("bevdet")
    def __call__(
        self, images: Float[Array, "B T N I J 3"]
    ) -> tuple[Float[Array, "B X Y K"], Float[Array, "B X Y 10"]]:
        images = images if self.num_frames is None else images[:, -self.num_frames :]
        images = constrain(images.astype(DTYPE), ("batch", *(None,) * 5))
        B, T = images.shape[:2]
        folded = images.reshape(B * T, *images.shape[2:])
        maps = self.lift(self.camera(constrain(folded, ("batch", *(None,) * 4))))
        maps = maps.reshape(B, T, *maps.shape[1:])
        maps = constrain(maps, ("batch", *(None,) * 4))
        return self.head(self.bev(self.fusion(maps)))


@jax.named_scope("heat_loss")
def heat_loss(
    logits: Float[Array, "B X Y K"], cells: Int[Array, "B M 2"], classes: Int[Array, "B M"]
) -> Float[Array, ""]:
    """Computes the penalty-reduced focal loss of peaks, over the objects.

    A peak is exp(-d^2 / 2) at a distance of d cells; of several the highest counts. With p the
    probability and t the peak: -(1 - p)^2 log p where t = 1, else -(1 - t)^4 p^2 log(1 - p).

    Source: Law and Deng, "CornerNet", ECCV 2018, in CenterPoint's form.
    """
    _, X, Y, K = logits.shape
    along, across = (
        jnp.square(jnp.arange(edge, dtype=jnp.int32)[None, None] - cells[..., axis, None])
        for axis, edge in ((0, X), (1, Y))
    )
    square = along[:, :, :, None, None] + across[:, :, None, :, None]
    mine = (classes[..., None] == jnp.arange(K)[None, None])[:, :, None, None]
    nearest = jnp.min(jnp.where(mine, square, X * X + Y * Y), axis=1)
    peak = jnp.exp(-0.5 * nearest.astype(jnp.float32))
    chance, off = jax.nn.sigmoid(logits), jax.nn.sigmoid(-logits)
    hit = off**2 * jax.nn.softplus(-logits)
    miss = (1 - peak) ** 4 * chance**2 * jax.nn.softplus(logits)
    return jnp.sum(jnp.where(nearest == 0, hit, miss)) / classes.size


def build(config: BevDetConfig, rngs: nnx.Rngs) -> BevDet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return BevDet(config, rngs=rngs)


def loss(module: BevDet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes heat loss and L1 of the boxes in the cells of their centres, in the last frame.

    `boxes` are whole codes; the first two, forward and left, give the cell and the place in it,
    which the head is asked for.
    """
    heat, boxes = module(batch["images"])
    grid, wanted = heat.shape[1], decode_boxes(batch["boxes"])
    cells = batch["boxes"][..., :2] * grid // CODES
    index = cells[..., 0] * grid + cells[..., 1]
    flat = boxes.reshape(boxes.shape[0], -1, BOX)
    found = jnp.take_along_axis(flat, index[..., None], axis=1)
    part = wanted[..., :2] * grid - cells.astype(jnp.float32)
    wanted = jnp.concatenate([part, wanted[..., 2:]], axis=-1)
    return heat_loss(heat, cells, batch["classes"]) + BOX_WEIGHT * BOX * absolute_error(
        found, wanted
    )


_CPU = BevDetConfig(
    stem=16,
    widths=(16, 16),
    depths=(1, 1),
    neck=32,
    context=16,
    num_bins=8,
    nearest_m=2,
    bin_m=2,
    grid=16,
    extent_m=16.0,
    bev_widths=(16, 32),
    bev_depths=(1, 1),
    bev_neck=16,
    head=16,
)
_PAPER = BevDetConfig(
    stem=64,
    widths=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    neck=512,
    context=64,
    num_bins=59,
    grid=128,
    bev_widths=(128, 256, 512),
    bev_depths=(2, 2, 2),
    bev_neck=256,
    head=64,
)
_FLEET = dataclasses.replace(_PAPER, depths=(3, 4, 23, 3), num_bins=118, grid=256, extent_m=102.4)


def _workload(
    images: tuple[int, int, int, int], *, objects: int, batch: int, rate: float
) -> Workload:
    """Returns a training step; `images` is frames, cameras, rows, columns."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("classes", Input(shape=(objects,), dtype="int32", high=10)),
        ("boxes", Input(shape=(objects, BOX), dtype="int32", high=CODES)),
    )
    return Workload(global_batch=batch, inputs=inputs, learning_rate=rate)


_WORK = {
    "cpu": _workload((3, 2, 32, 64), objects=4, batch=2, rate=3e-3),
    "paper": _workload((4, 6, 256, 704), objects=32, batch=64, rate=2e-4),
    "fleet": _workload((8, 8, 960, 1280), objects=64, batch=32, rate=2e-4),
}
_SOURCE = {
    "cpu": "BEVDet's parts, made small to step on two cores",
    "paper": "Huang et al., BEVDet, 2021, R50 at 256x704; a queue of four frames is our choice",
    "fleet": "no publication: R101, eight cameras of 960x1280, eight frames, a map of 204.8 m",
}
_CHANGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "gather": ("segment sum by a precomputed gather", "T0", {"lift": "gather"}),
    "product": ("segment sum by a one-hot product", "T0", {"lift": "product"}),
    "sorted": ("segment sum by differences of a running sum", "T0", {"lift": "sorted"}),
    "loop": ("cameras as one batch by one after another", "T2", {"cameras": "loop"}),
    "concat": ("one frame by two side by side", "T2", {"temporal": "concat"}),
    "gru": ("one frame by a convolutional GRU over the queue", "T2", {"temporal": "gru"}),
    "attention": ("one frame by attention over the queue", "T2", {"temporal": "attention"}),
    "scan": ("one frame by a gated linear scan over the queue", "T2", {"temporal": "scan"}),
}


def _rivals(size: str, config: BevDetConfig, changes: tuple[str, ...]) -> tuple[Candidate, ...]:
    """Returns a base and those of `_CHANGES`."""

    def rival(change: str, replaces: str, validity: Any, fields: dict[str, Any]) -> Candidate:
        return Candidate(
            name=f"bevdet-{size}-{change}",
            family="bevdet",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=_WORK[size],
            base=f"bevdet-{size}-base",
            replaces=replaces,
            validity=validity,
            source=_SOURCE[size],
        )

    variants = (rival(change, *_CHANGES[change]) for change in changes)
    return (rival("base", "", "base", {}), *variants)


CANDIDATES = (
    *_rivals("cpu", _CPU, tuple(_CHANGES)),
    *_rivals("paper", _PAPER, tuple(_CHANGES)),
    *_rivals("fleet", _FLEET, ("sorted", "scan")),
)
