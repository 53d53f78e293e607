"""Bird's-eye-view segmentation that pulls image features into a volume, after Simple-BEV.

Every point of a volume over the map takes the image feature at its projection, averaged over the
cameras that see it; no parameters are involved. Heights are folded into channels, and a residual
encoder reads the map. "Simple-BEV-like", not Simple-BEV:
- The rig is fixed and level. Projections, and which camera sees which point, are tables made while
  tracing; a column of the image is then the same for all heights over a cell.
- Batch norm in place of instance norm; upsampling repeats cells; only the segmentation of vehicles
  is trained, without centres and offsets; cells weigh the same, whatever their label.

The two samplings are one function. Images, number of cameras and map resolution belong to the
workload and are read from shapes.

Letters: `B` batch, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of features, `C`
channels, `V` cells in the fullest camera, `Z` heights, `G` cells, `X` `Y` the map's edges.

Source: Harley et al., "Simple-BEV", ICRA 2023 (448x800, R101 to stride 8, latent 128, 200x8x200
cells of 0.5 m x 1.25 m, bilinear pull, ResNet-18 encoder).
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
from jaxbench.models.blocks.camera import (
    CAMERA_HEIGHT_M,
    BasicBlock,
    CameraEncoder,
    Sight,
    Stages,
    gather_pillars,
    see_pillars,
)
from jaxbench.models.blocks.convolution import Conv, ConvNorm, upsample
from jaxbench.models.blocks.losses import binary_cross_entropy

DTYPE = jnp.bfloat16

Interpolation = Literal["bilinear", "nearest"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PullConfig:
    """Sizes of the network and geometry of the volume.

    Attributes:
      stem, widths, depths: Backbone; its last two stages are merged at the finer one's stride.
      latent: Channels of image features, of the volume and of the map.
      num_heights: Points over a cell.
      reach_m: The volume goes from this far below the cameras to as far above.
      extent_m: Metres from the map's middle to each edge.
      fov_degrees: Horizontal field of view of a camera.
      sampling: Pixels are gathered; or image columns, then rows, are multiplied by matrices of
        their shares in every cell.
      interpolation: A point takes its four neighbours' mean by distance, or the nearest pixel.
      height: Heights become channels, or are averaged.
      bev_widths, bev_depths: Residual stages of the map, all but the first with stride 2.
    """

    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    latent: int
    num_heights: int
    reach_m: float = 5.0
    extent_m: float = 50.0
    fov_degrees: int = 70
    sampling: Literal["gather", "product"] = "gather"
    interpolation: Interpolation = "bilinear"
    height: Literal["concat", "mean"] = "concat"
    bev_widths: tuple[int, ...]
    bev_depths: tuple[int, ...]


def see_volume(config: PullConfig, *, edge: int, shape: tuple[int, int, int]) -> Sight:
    """Projects the volume's points; `shape` is cameras, rows and columns of features."""
    share = 2 * (np.arange(config.num_heights) + 0.5) / config.num_heights - 1
    return see_pillars(
        edge=edge,
        extent_m=config.extent_m,
        heights_m=tuple(float(z) for z in CAMERA_HEIGHT_M + config.reach_m * share),
        num_cameras=shape[0],
        num_rows=shape[1],
        num_columns=shape[2],
        fov_degrees=config.fov_degrees,
    )


def point_shares(sight: Sight) -> Float[Array, "N V Z"]:
    """Returns one over the cameras that see a point, or zero if this one does not."""
    counts = np.pad(sight.point_counts, ((0, 1), (0, 0)), constant_values=1)[sight.pillars]
    # Bytes, because the table becomes part of the program.
    table = jnp.asarray(np.where(sight.inside, counts, 0).astype(np.uint8)).astype(jnp.float32)
    return jnp.where(table > 0, 1 / jnp.maximum(table, 1.0), 0.0)


@jax.named_scope("pull")
def pull_by_gather(
    features: Float[Array, "B N H W C"], sight: Sight, interpolation: Interpolation
) -> Float[Array, "B N V Z C"]:
    """Takes a camera's features at the projections of its points, over the cameras that see them.

    Pixels outside the image count as zero.
    """
    B, N, H, W, C = features.shape
    # All heights over a cell stand in one column.
    column, row = jnp.asarray(sight.column[..., :1]), jnp.asarray(sight.row)
    corners = ((0, 0), (0, 1), (1, 0), (1, 1))
    if interpolation == "nearest":
        column, row, corners = jnp.floor(column + 0.5), jnp.floor(row + 0.5), ((0, 0),)
    left, top = jnp.floor(column), jnp.floor(row)
    shares = point_shares(sight)
    flat = features.reshape(B, N, H * W, C)
    take = jax.vmap(jax.vmap(lambda v, i: v.at[i].get(mode="promise_in_bounds")), (0, None))
    total = jnp.zeros((), jnp.float32)[None, None, None, None]
    for down, right in corners:
        x, y = left + right, top + down
        share = shares * (1 - jnp.abs(column - x)) * (1 - jnp.abs(row - y))
        inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        index = jnp.where(inside, y * W + x, 0.0).astype(jnp.int32)
        share = jnp.where(inside, share, 0.0).reshape(1, N, -1, 1)
        total = total + take(flat, index.reshape(N, -1)).astype(jnp.float32) * share
    return total.reshape(B, *row.shape, C).astype(features.dtype)


@jax.named_scope("pull")
def pull_by_product(
    features: Float[Array, "B N H W C"], sight: Sight, interpolation: Interpolation
) -> Float[Array, "B N V Z C"]:
    """Computes `pull_by_gather` by columns, which all heights over a cell share, then by rows."""
    _, _, H, W, _ = features.shape
    columns = spread_pixels(jnp.asarray(sight.column[..., 0]), W, interpolation)
    rows = spread_pixels(jnp.asarray(sight.row), H, interpolation)
    rows = rows * point_shares(sight)[..., None]
    lines = jnp.einsum("NVW,BNHWC->BNVHC", columns.astype(features.dtype), features)
    return jnp.einsum("NVZH,BNVHC->BNVZC", rows.astype(features.dtype), lines)


def spread_pixels(
    place: Float[Array, "*dims"], num_pixels: int, interpolation: Interpolation
) -> Float[Array, "*dims W"]:
    """Gives every pixel its share of a point: a hat of one pixel to each side, or a box."""
    pixels = jnp.arange(num_pixels, dtype=jnp.float32).reshape((1,) * place.ndim + (-1,))
    offset = place[..., None] - pixels
    if interpolation == "nearest":
        return ((offset >= -0.5) & (offset < 0.5)).astype(jnp.float32)
    return jnp.maximum(0.0, 1 - jnp.abs(offset))


PULLS = {"gather": pull_by_gather, "product": pull_by_product}


class Volume(nnx.Module):
    """Pulls features into the volume, and compresses its heights into a map's channels."""

    def __init__(self, config: PullConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        heights = config.num_heights if config.height == "concat" else 1
        self.compress = ConvNorm(heights * config.latent, config.latent, kernel=(3, 3), rngs=rngs)

    @jax.named_scope("volume")
    def __call__(self, features: Float[Array, "B N H W C"], edge: int) -> Float[Array, "B X Y C"]:
        config, (B, N, H, W, C) = self.config, features.shape
        sight = see_volume(config, edge=edge, shape=(N, H, W))
        found = PULLS[config.sampling](features, sight, config.interpolation)
        found = constrain(found, ("batch", None, None, None, None))
        volume = gather_pillars(found.reshape(B, -1, config.num_heights * C), sight)
        if config.height == "mean":
            points = volume.reshape(B, edge * edge, -1, C)
            volume = jnp.mean(points, axis=2, dtype=jnp.float32).astype(points.dtype)
        grid = constrain(volume.reshape(B, edge, edge, -1), ("batch", None, None, None))
        return self.compress(grid)


class BevEncoder(nnx.Module):
    """ResNet-18 without its last stage; three steps up, each added to a finer map; a logit a cell.

    Source: the published code's `Decoder`.
    """

    def __init__(self, config: PullConfig, *, rngs: nnx.Rngs) -> None:
        widths, latent = config.bev_widths, config.latent
        strides = (1, *(2,) * (len(widths) - 1))
        self.stem = ConvNorm(latent, widths[0], kernel=(7, 7), stride=2, rngs=rngs)
        self.stages = Stages(
            BasicBlock, widths[0], widths, config.bev_depths, strides=strides, rngs=rngs
        )
        ups = zip(widths[::-1], (*widths[-2::-1], latent), strict=True)
        self.ups = nnx.List([ConvNorm(i, o, activation=None, rngs=rngs) for i, o in ups])
        self.refine = ConvNorm(latent, latent, kernel=(3, 3), rngs=rngs)
        self.out = Conv(latent, 1, bias=True, sharded=False, rngs=rngs)

    @jax.named_scope("bev")
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y"]:
        maps = self.stages(self.stem(x))
        y = maps[-1]
        for up, finer in zip(self.ups, (*maps[-2::-1], x), strict=True):
            y = finer + up(upsample(y))
            y = constrain(y, ("batch", None, None, None))
        return self.out(self.refine(y))[..., 0]


class PullNet(nnx.Module):
    """Cameras, volume, map."""

    def __init__(self, config: PullConfig, *, rngs: nnx.Rngs) -> None:
        self.camera = CameraEncoder(
            stem=config.stem,
            widths=config.widths,
            depths=config.depths,
            neck=config.latent,
            rngs=rngs,
        )
        self.volume = Volume(config, rngs=rngs)
        self.bev = BevEncoder(config, rngs=rngs)

    @jax.named_scope("pull_net")
    def __call__(self, images: Float[Array, "B N I J 3"], edge: int) -> Float[Array, "B X Y"]:
        images = constrain(images.astype(DTYPE), ("batch", None, None, None, None))
        return self.bev(self.volume(self.camera(images), edge))


def build(config: PullConfig, rngs: nnx.Rngs) -> PullNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return PullNet(config, rngs=rngs)


def loss(module: PullNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean binary cross entropy of the map against 0/1 `labels`."""
    labels: Int[Array, "B X Y"] = batch["labels"]
    return binary_cross_entropy(module(batch["images"], labels.shape[-1]), labels)


_CPU = PullConfig(
    stem=16,
    widths=(16, 16),
    depths=(1, 1),
    latent=16,
    num_heights=2,
    extent_m=16.0,
    bev_widths=(16, 32),
    bev_depths=(1, 1),
)
_PAPER = PullConfig(
    stem=64,
    widths=(64, 128, 256),
    depths=(3, 4, 23),
    latent=128,
    num_heights=8,
    bev_widths=(64, 128, 256),
    bev_depths=(2, 2, 2),
)
_FLEET = dataclasses.replace(_PAPER, extent_m=80.0)


def _workload(images: tuple[int, int, int], *, edge: int, batch: int, rate: float) -> Workload:
    """Returns a training step; `images` is cameras, rows, columns."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("labels", Input(shape=(edge, edge), dtype="int32")),
    )
    return Workload(global_batch=batch, inputs=inputs, learning_rate=rate)


_WORK = {
    "cpu": _workload((2, 32, 64), edge=16, batch=2, rate=3e-3),
    "paper": _workload((6, 448, 800), edge=200, batch=64, rate=3e-4),
    "fleet": _workload((8, 960, 1280), edge=320, batch=32, rate=3e-4),
}
_SOURCE = {
    "cpu": "Simple-BEV's parts, made small to step on two cores",
    "paper": "Harley et al., Simple-BEV, ICRA 2023; see the file's differences",
    "fleet": "no publication: Simple-BEV with eight cameras of 960x1280 and a map of 160 m",
}
_CHANGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "product": (
        "gathered pixels by products with the shares of columns and of rows",
        "T0",
        {"sampling": "product"},
    ),
    "nearest": ("four neighbours by the nearest pixel", "T2", {"interpolation": "nearest"}),
    "mean": ("heights as channels by their mean", "T2", {"height": "mean"}),
}


def _rivals(size: str, config: PullConfig, changes: tuple[str, ...]) -> tuple[Candidate, ...]:
    """Returns a base and those of `_CHANGES`."""

    def rival(change: str, replaces: str, validity: Any, fields: dict[str, Any]) -> Candidate:
        return Candidate(
            name=f"pull-{size}-{change}",
            family="pull",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=_WORK[size],
            base=f"pull-{size}-base",
            replaces=replaces,
            validity=validity,
            source=_SOURCE[size],
        )

    variants = (rival(change, *_CHANGES[change]) for change in changes)
    return (rival("base", "", "base", {}), *variants)


CANDIDATES = (
    *_rivals("cpu", _CPU, tuple(_CHANGES)),
    *_rivals("paper", _PAPER, tuple(_CHANGES)),
    *_rivals("fleet", _FLEET, ("product", "nearest")),
)
