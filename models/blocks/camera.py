"""Cameras: a residual backbone with a pyramid on top, and the geometry of a fixed rig.

The rig is level, at one place, with evenly spaced yaws and one horizontal field of view. It is the
same for every sample, so that what depends on it alone is computed with NumPy while tracing.
Axes: x forward, y left, z up, in metres; image coordinates go right and down.

Letters: `B` batch, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of features, `C`
channels in, `F` channels out, `Q` pillars of a map, `Z` points of a pillar, `V` pillars in the
fullest camera, `R` cameras of the most seen pillar. A `2` marks the edges that a layer puts out.

Sources: He et al., "Deep Residual Learning", CVPR 2016 (ResNet-50 without its classifier:
23,508,032 parameters; ResNet-101: 42,500,160); Lin et al., "Feature Pyramid Networks", CVPR 2017.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbench.candidate import constrain
from jaxbench.models.blocks.convolution import Conv, ConvNorm, max_pool, upsample
from jaxbench.models.blocks.stack import Stack

CAMERA_HEIGHT_M = 1.6
# Images of all cameras as one batch; or one camera after another, in a loop. Batch norm's
# statistics are then those of a camera, so the two are not one function.
Cameras = Literal["fold", "loop"]


class Bottleneck(nnx.Module):
    """1x1 to `width` channels, 3x3, 1x1 to four times as many; beside a shortcut."""

    expansion = 4

    def __init__(self, num_in: int, width: int, *, stride: int = 1, rngs: nnx.Rngs) -> None:
        num_out = self.expansion * width
        self.reduce = ConvNorm(num_in, width, rngs=rngs)
        self.filter = ConvNorm(width, width, kernel=(3, 3), stride=stride, rngs=rngs)
        self.widen = ConvNorm(width, num_out, activation=None, rngs=rngs)
        self.shortcut = _shortcut(num_in, num_out, stride, rngs)

    @jax.named_scope("bottleneck")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = self.widen(self.filter(self.reduce(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, num_in: int, width: int, *, stride: int = 1, rngs: nnx.Rngs) -> None:
        self.first = ConvNorm(num_in, width, kernel=(3, 3), stride=stride, rngs=rngs)
        self.second = ConvNorm(width, width, kernel=(3, 3), activation=None, rngs=rngs)
        self.shortcut = _shortcut(num_in, width, stride, rngs)

    @jax.named_scope("basic_block")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = self.second(self.first(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


def _shortcut(num_in: int, num_out: int, stride: int, rngs: nnx.Rngs) -> ConvNorm | None:
    """The convolution that a shortcut needs where the shape changes."""
    if stride == 1 and num_in == num_out:
        return None
    return ConvNorm(num_in, num_out, stride=stride, activation=None, rngs=rngs)


class Stage(nnx.Module):
    """`depth` residual blocks; the first strides, the others are equal and loop over a stack."""

    def __init__(
        self, block: Any, num_in: int, width: int, depth: int, *, stride: int, rngs: nnx.Rngs
    ) -> None:
        num_out = block.expansion * width
        self.first = block(num_in, width, stride=stride, rngs=rngs)
        make = functools.partial(_again, block, num_out, width)
        self.rest: Any = Stack(make, depth - 1, rngs=rngs) if depth > 1 else None

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.first(x)
        x = x if self.rest is None else self.rest(x)
        return constrain(x, ("batch", None, None, None))


def _again(block: Any, num_out: int, width: int, rngs: nnx.Rngs) -> nnx.Module:
    return block(num_out, width, rngs=rngs)


class Stages(nnx.Module):
    """Stages one after another; gives what each puts out. `strides` has one entry a stage."""

    def __init__(
        self,
        block: Any,
        num_in: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        strides: tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        stages = []
        for width, depth, stride in zip(widths, depths, strides, strict=True):
            stages.append(Stage(block, num_in, width, depth, stride=stride, rngs=rngs))
            num_in = block.expansion * width
        self.stages = nnx.List(stages)

    @jax.named_scope("stages")
    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


class Backbone(nnx.Module):
    """ResNet without its classifier: 7x7/2, pooling, bottlenecks at strides 4, 8, 16, ..."""

    def __init__(
        self, *, stem: int, widths: tuple[int, ...], depths: tuple[int, ...], rngs: nnx.Rngs
    ) -> None:
        self.stem = ConvNorm(3, stem, kernel=(7, 7), stride=2, rngs=rngs)
        strides = (1, *(2,) * (len(widths) - 1))
        self.stages = Stages(Bottleneck, stem, widths, depths, strides=strides, rngs=rngs)

    @jax.named_scope("backbone")
    def __call__(self, x: Float[Array, "B H W 3"]) -> list[Float[Array, "B _ _ _"]]:
        return self.stages(max_pool(self.stem(x)))


class Pyramid(nnx.Module):
    """The two coarsest maps merged at the finer one's stride, with `neck` channels."""

    def __init__(self, num_fine: int, num_coarse: int, neck: int, *, rngs: nnx.Rngs) -> None:
        self.fine = Conv(num_fine, neck, bias=True, rngs=rngs)
        self.coarse = Conv(num_coarse, neck, bias=True, rngs=rngs)
        self.smooth = Conv(neck, neck, kernel=(3, 3), bias=True, rngs=rngs)

    @jax.named_scope("pyramid")
    def __call__(
        self, fine: Float[Array, "B H W _"], coarse: Float[Array, "B _ _ _"]
    ) -> Float[Array, "B H W C"]:
        return self.smooth(self.fine(fine) + upsample(self.coarse(coarse)))


class CameraEncoder(nnx.Module):
    """Backbone and pyramid over all cameras; the images' edges divide by the coarsest stride."""

    def __init__(
        self,
        *,
        stem: int,
        widths: tuple[int, ...],
        depths: tuple[int, ...],
        neck: int,
        cameras: Cameras = "fold",
        rngs: nnx.Rngs,
    ) -> None:
        self.cameras = cameras
        self.backbone = Backbone(stem=stem, widths=widths, depths=depths, rngs=rngs)
        fine, coarse = (Bottleneck.expansion * width for width in widths[-2:])
        self.pyramid = Pyramid(fine, coarse, neck, rngs=rngs)

    @jax.named_scope("camera")
    def __call__(self, images: Float[Array, "B N I J 3"]) -> Float[Array, "B N H W C"]:
        if self.cameras == "loop":
            state = nnx.StateAxes({nnx.BatchStat: nnx.Carry, ...: None})
            return nnx.scan(_encode, in_axes=(state, 1), out_axes=1)(self, images)
        folded = images.reshape(-1, *images.shape[2:])
        features = _encode(self, constrain(folded, ("batch", None, None, None)))
        return features.reshape(*images.shape[:2], *features.shape[1:])


def _encode(module: CameraEncoder, images: Any) -> Any:
    fine, coarse = module.backbone(images)[-2:]
    return constrain(module.pyramid(fine, coarse), ("batch", None, None, None))


def rig_yaws(num_cameras: int) -> Float[np.ndarray, " N"]:
    """Returns the cameras' angles to the left of forward, in radians."""
    return np.arange(num_cameras) * (2 * math.pi / num_cameras)


def rig_directions(
    *, num_cameras: int, num_columns: int, fov_degrees: int
) -> Float[np.ndarray, "N W 2"]:
    """Computes how far forward and left a column's ray goes in a metre along its camera's axis."""
    yaw = rig_yaws(num_cameras)[:, None]
    slope = _slopes(num_columns, fov_degrees)[None]
    forward = np.cos(yaw) - slope * np.sin(yaw)
    left = np.sin(yaw) + slope * np.cos(yaw)
    return np.stack([forward, left], axis=-1)


def rig_climbs(*, num_rows: int, num_columns: int, fov_degrees: int) -> Float[np.ndarray, " H"]:
    """Computes how far up a row's ray goes in a metre along its camera's axis; square pixels."""
    return _slopes(num_rows, fov_degrees) * num_rows / num_columns


def _slopes(num_pixels: int, fov_degrees: int) -> Float[np.ndarray, " P"]:
    """Slopes of pixel centres, from the left or from the top."""
    centres = 1 - (2 * np.arange(num_pixels) + 1) / num_pixels
    return centres * math.tan(math.radians(fov_degrees) / 2)


def project(
    points: Float[np.ndarray, "P 3"],
    *,
    num_cameras: int,
    num_rows: int,
    num_columns: int,
    fov_degrees: int,
) -> tuple[Float[np.ndarray, "N P"], Float[np.ndarray, "N P"], Float[np.ndarray, "N P"]]:
    """Projects points into every camera.

    Returns:
      Column, row (pixel centres are whole numbers) and depth along the optical axis. Of points not
      in front of a camera, column and row mean nothing; their depth is not above 1 mm.
    """
    yaw = rig_yaws(num_cameras)[:, None]
    x, y, z = points.T
    depth = x * np.cos(yaw) + y * np.sin(yaw)
    left = y * np.cos(yaw) - x * np.sin(yaw)
    reach = np.maximum(depth, 1e-3) * math.tan(math.radians(fov_degrees) / 2)
    column = (1 - left / reach) * num_columns / 2 - 0.5
    row = num_rows / 2 - 0.5 - (z[None] - CAMERA_HEIGHT_M) / reach * num_columns / 2
    return column, row, depth


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """Which camera sees which pillars of a map, and where.

    A pillar stands on a cell of the map (rows forward, columns left) and has Z points.

    Attributes:
      pillars: Pillars of which a camera sees any point, padded with their number Q.
      column, row: Where their points project, in pixels of the feature map.
      inside: Whether the camera sees that point; false where padded.
      places: Where a pillar stands in the flat `pillars`, padded with N V.
      counts: Cameras that see any point of a pillar, at least 1.
      point_counts: Cameras that see a point, at least 1.
    """

    pillars: Int[np.ndarray, "N V"]
    column: Float[np.ndarray, "N V Z"]
    row: Float[np.ndarray, "N V Z"]
    inside: Bool[np.ndarray, "N V Z"]
    places: Int[np.ndarray, "Q R"]
    counts: Float[np.ndarray, " Q"]
    point_counts: Float[np.ndarray, "Q Z"]


@functools.cache
def see_pillars(
    *,
    edge: int,
    extent_m: float,
    heights_m: tuple[float, ...],
    num_cameras: int,
    num_rows: int,
    num_columns: int,
    fov_degrees: int,
) -> Sight:
    """Projects the pillars of a square map into every camera.

    Args:
      edge: Cells along an edge of the map; Q is its square.
      extent_m: Metres from the map's middle to each edge.
      heights_m: Heights of a pillar's points over the ground.
    """
    Q, Z, N = edge * edge, len(heights_m), num_cameras
    middles = (np.arange(edge) + 0.5) / edge * 2 * extent_m - extent_m
    points = np.stack(np.meshgrid(middles, middles, heights_m, indexing="ij"), axis=-1)
    column, row, depth = (
        values.reshape(N, Q, Z)
        for values in project(
            points.reshape(-1, 3),
            num_cameras=N,
            num_rows=num_rows,
            num_columns=num_columns,
            fov_degrees=fov_degrees,
        )
    )
    inside = np.abs(column - (num_columns - 1) / 2) < num_columns / 2
    inside &= (np.abs(row - (num_rows - 1) / 2) < num_rows / 2) & (depth > 0.1)
    seen = np.any(inside, axis=-1)
    pillars = list_true(seen)
    V = pillars.shape[1]
    spot = np.where(seen, np.cumsum(seen, axis=1) - 1 + np.arange(N)[:, None] * V, N * V)
    most = max(1, seen.sum(axis=0).max())
    found = np.minimum(pillars, Q - 1)[..., None]
    return Sight(
        pillars=pillars,
        column=np.take_along_axis(column, found, axis=1).astype(np.float32),
        row=np.take_along_axis(row, found, axis=1).astype(np.float32),
        inside=np.take_along_axis(inside, found, axis=1) & (pillars < Q)[..., None],
        places=np.sort(spot.T, axis=1)[:, :most].astype(np.int32),
        counts=np.maximum(1, seen.sum(axis=0)).astype(np.float32),
        point_counts=np.maximum(1, inside.sum(axis=0)).astype(np.float32),
    )


def list_true(seen: Bool[np.ndarray, "N Q"]) -> Int[np.ndarray, "N V"]:
    """Lists the columns that are true in each row, padded with the number of columns."""
    lists = [np.flatnonzero(row) for row in seen]
    table = np.full((len(lists), max(1, *map(len, lists))), seen.shape[1], np.int32)
    for row, found in zip(table, lists, strict=True):
        row[: len(found)] = found
    return table


@jax.named_scope("gather_pillars")
def gather_pillars(found: Float[Array, "B NV *dims"], sight: Sight) -> Float[Array, "B Q *dims"]:
    """Sums what the cameras found of each pillar, in float32; the result is in `found`'s dtype."""
    mine = jnp.take(found, sight.places, axis=1, mode="fill", fill_value=0)
    return jnp.sum(mine, axis=2, dtype=jnp.float32).astype(found.dtype)
