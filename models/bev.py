"""Camera to bird's-eye-view segmentation after Lift-Splat-Shoot, with three ways to lift.

Each pixel of a camera's feature map predicts a distribution over depth bins and a context vector;
their outer product gives a point in space for every bin. Points are summed into the ground cells
that they fall into, and a convolutional encoder reads the map. "LSS-like", not LSS:
- The backbone is a plain residual one with stride 16; the published one is EfficientNet-B0.
- The rig is fixed: level cameras at the map's centre with evenly spaced yaws. Then a point's cell
  does not depend on its image row, and image rows can be contracted before the lift. LSS reads
  calibrations with every sample, so it cannot precompute cells; nor is its height limit kept here.
- Upsampling repeats cells; the published encoder interpolates.

The lifts are one function of the same parameters; only the order of accumulation differs. Images,
number of cameras and map resolution belong to the workload and are read from shapes.

Letters: `B` batch, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of features, `C`
channels in, `F` channels out, `D` depth bins, `P` points (cameras x columns x bins), `G` cells of
the map, `K` points in the fullest cell, `X` `Y` the map's edges (forward, left). A `2` marks the
edges that a layer puts out.

Source: Philion and Fidler, "Lift, Splat, Shoot", ECCV 2020 (128x352 images, 41 bins from 4 m,
200x200 cells of 0.5 m, 64 context channels).
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain

DTYPE = jnp.bfloat16

Depth = Float[Array, "B N H W D"]
Context = Float[Array, "B N H W C"]
Lifted = Float[Array, "B G C"]
Cells = Int[np.ndarray, "N W D"]


@dataclass(frozen=True, kw_only=True, slots=True)
class BevConfig:
    """Shape of the network and geometry of the rig.

    Attributes:
      lift: How points are summed into cells: scattered one by one; columns gathered by a table of
        each cell's points; columns multiplied by a one-hot matrix.
      stem: Channels after a camera's first convolution, at stride 2.
      camera_channels: Channels of the camera stages, each with stride 2.
      camera_depths: Residual blocks of the camera stages.
      context: Channels of a lifted point.
      num_bins: Depth bins.
      nearest_m: Depth of the first bin, along the optical axis.
      bin_m: Depth from one bin to the next.
      fov_degrees: Horizontal field of view of a camera; below 180.
      extent_m: Metres from the map's centre to each edge.
      bev_channels: Channels of the map's stages; all but the first have stride 2.
      bev_depths: Residual blocks of the map's stages.
    """

    lift: Literal["segment_sum", "gather", "product"] = "segment_sum"
    stem: int
    camera_channels: tuple[int, ...]
    camera_depths: tuple[int, ...]
    context: int
    num_bins: int
    nearest_m: int
    bin_m: int
    fov_degrees: int = 70
    extent_m: int
    bev_channels: tuple[int, ...]
    bev_depths: tuple[int, ...]


def rig_cells(config: BevConfig, *, num_cameras: int, num_columns: int, edge: int) -> Cells:
    """Computes which cell a camera's column and depth bin fall into; `edge * edge` if into none."""
    yaw = np.arange(num_cameras)[:, None, None] * (2 * math.pi / num_cameras)
    # Pixel centres, from the left; an image column to the left has a positive lateral offset.
    slope = (1 - (2 * np.arange(num_columns) + 1) / num_columns)[:, None]
    slope = slope * math.tan(math.radians(config.fov_degrees) / 2)
    depth = config.nearest_m + config.bin_m * np.arange(config.num_bins)
    forward = depth * np.cos(yaw) - depth * slope * np.sin(yaw)
    left = depth * np.sin(yaw) + depth * slope * np.cos(yaw)
    cells_per_m = edge / (2 * config.extent_m)
    x = np.floor((forward + config.extent_m) * cells_per_m).astype(np.int32)
    y = np.floor((left + config.extent_m) * cells_per_m).astype(np.int32)
    inside = (x >= 0) & (x < edge) & (y >= 0) & (y < edge)
    return np.where(inside, x * edge + y, edge * edge).astype(np.int32)


@jax.named_scope("lift")
def lift_by_segment_sum(depth: Depth, context: Context, cells: Cells, num_cells: int) -> Lifted:
    """Adds the outer product of every pixel to its cells one by one, in float32, as LSS does.

    out[b, g, c] = sum of depth[b, n, h, w, d] * context[b, n, h, w, c] over n, h, w, d whose
    cells[n, w, d] = g; cell `num_cells` takes what falls outside and is dropped.
    """
    wide_depth, wide_context = depth.astype(jnp.float32), context.astype(jnp.float32)
    points = wide_depth[..., :, None] * wide_context[..., None, :]
    points = points.reshape(depth.shape[0], -1, context.shape[-1])
    ids = jnp.broadcast_to(jnp.asarray(cells)[:, None], depth.shape[1:]).reshape(-1)
    out = jax.vmap(lambda p: jax.ops.segment_sum(p, ids, num_segments=num_cells + 1))(points)
    return out[:, :num_cells].astype(context.dtype)


@jax.named_scope("lift")
def lift_by_gather(depth: Depth, context: Context, cells: Cells, num_cells: int) -> Lifted:
    """Computes `lift_by_segment_sum`: contracts rows, then each cell gathers its own points."""
    table = _points_of_cells(cells.reshape(-1), num_cells)
    # Padding points one past the end, which "fill" reads as a row of zeros.
    found = jnp.take(_contract_rows(depth, context), table, axis=1, mode="fill", fill_value=0)
    return jnp.sum(found, axis=2, dtype=jnp.float32).astype(context.dtype)


@jax.named_scope("lift")
def lift_by_product(depth: Depth, context: Context, cells: Cells, num_cells: int) -> Lifted:
    """Computes `lift_by_segment_sum`: contracts rows, then multiplies by a one-hot matrix.

    The product is rounded once, to the dtype that the map's encoder reads; a float32 result would
    be rounded to the same and would make the products of the backward pass float32.
    """
    points = _contract_rows(depth, context)
    # Built in the program from the indices; index `num_cells` is out of range: a row of zeros.
    one_hot = jax.nn.one_hot(cells.reshape(-1), num_cells, dtype=points.dtype)
    return jnp.einsum("bpc,pg->bgc", points, one_hot)


LIFTS = {
    "segment_sum": lift_by_segment_sum,
    "gather": lift_by_gather,
    "product": lift_by_product,
}


def _contract_rows(depth: Depth, context: Context) -> Float[Array, "B P C"]:
    """Sums the outer products over image rows, which share a cell; H times fewer points remain."""
    columns = jnp.einsum("bnhwd,bnhwc->bnwdc", depth, context)
    return columns.reshape(depth.shape[0], -1, context.shape[-1])


def _points_of_cells(cells: Int[np.ndarray, " P"], num_cells: int) -> Int[np.ndarray, "G K"]:
    """Lists each cell's points, padded with the number of points to the longest list."""
    order = np.argsort(cells, kind="stable").astype(np.int32)
    order = order[: np.count_nonzero(cells < num_cells)]
    counts = np.bincount(cells[order], minlength=num_cells)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((num_cells, max(1, counts.max())), len(cells), np.int32)
    table[cells[order], rank] = order
    return table


class ConvNorm(nnx.Module):
    """Convolution without bias and batch norm."""

    def __init__(
        self, num_in: int, num_out: int, *, kernel: int = 3, stride: int = 1, rngs: nnx.Rngs
    ) -> None:
        axes = (None, None, "conv_in", "conv_out")
        self.conv = nnx.Conv(
            num_in,
            num_out,
            (kernel, kernel),
            strides=(stride, stride),
            use_bias=False,
            dtype=DTYPE,
            kernel_init=nnx.with_partitioning(nnx.initializers.he_normal(), axes),
            rngs=rngs,
        )
        self.norm = nnx.BatchNorm(
            num_out,
            momentum=0.9,
            dtype=DTYPE,
            scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("conv_out",)),
            bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), ("conv_out",)),
            rngs=rngs,
        )

    @jax.named_scope("conv_norm")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        return self.norm(self.conv(x), use_running_average=False)


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, num_in: int, num_out: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.first = ConvNorm(num_in, num_out, stride=stride, rngs=rngs)
        self.second = ConvNorm(num_out, num_out, rngs=rngs)
        changes = stride != 1 or num_in != num_out
        shortcut = (
            ConvNorm(num_in, num_out, kernel=1, stride=stride, rngs=rngs) if changes else None
        )
        self.shortcut = shortcut

    @jax.named_scope("residual")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = self.second(nnx.relu(self.first(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stages(nnx.Module):
    """Residual blocks by stage; the first block of each stage strides."""

    def __init__(
        self,
        num_in: int,
        channels: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        strides: tuple[int, ...],
        rngs: nnx.Rngs,
    ) -> None:
        stages = []
        for num_out, depth, stride in zip(channels, depths, strides, strict=True):
            shapes = [(num_in, num_out, stride), *[(num_out, num_out, 1)] * (depth - 1)]
            blocks = [ResidualBlock(i, o, stride=s, rngs=rngs) for i, o, s in shapes]
            stages.append(nnx.List(blocks))
            num_in = num_out
        self.stages = nnx.List(stages)

    @jax.named_scope("stages")
    def __call__(self, x: Float[Array, "B H W C"]) -> list[Float[Array, "B _ _ _"]]:
        outputs = []
        for blocks in self.stages:
            for block in blocks:
                x = block(x)
            x = constrain(x, ("batch", None, None, None))
            outputs.append(x)
        return outputs


class CameraEncoder(nnx.Module):
    """Images to a distribution over depth bins and a context vector at every pixel."""

    def __init__(self, config: BevConfig, *, rngs: nnx.Rngs) -> None:
        channels, depths = config.camera_channels, config.camera_depths
        self.num_bins = config.num_bins
        self.stem = ConvNorm(3, config.stem, stride=2, rngs=rngs)
        strides = (2,) * len(channels)
        self.stages = Stages(config.stem, channels, depths, strides=strides, rngs=rngs)
        self.head = pointwise(channels[-1], config.num_bins + config.context, rngs=rngs)

    @jax.named_scope("camera")
    def __call__(self, images: Float[Array, "B N I J 3"]) -> tuple[Depth, Context]:
        x = nnx.relu(self.stem(images.reshape(-1, *images.shape[2:])))
        x = self.head(self.stages(x)[-1])
        x = x.reshape(*images.shape[:2], *x.shape[1:])
        depth = jax.nn.softmax(x[..., : self.num_bins].astype(jnp.float32))
        return depth.astype(DTYPE), x[..., self.num_bins :]


class BevEncoder(nnx.Module):
    """ResNet-18 without its last stage, one skip connection back up, and a logit for each cell."""

    def __init__(self, config: BevConfig, *, rngs: nnx.Rngs) -> None:
        channels, top = config.bev_channels, config.bev_channels[-1]
        strides = (1, *(2,) * (len(channels) - 1))
        self.stem = ConvNorm(config.context, channels[0], kernel=7, stride=2, rngs=rngs)
        self.stages = Stages(channels[0], channels, config.bev_depths, strides=strides, rngs=rngs)
        self.merge = ConvNorm(channels[0] + top, top, rngs=rngs)
        self.refine = ConvNorm(top, top // 2, rngs=rngs)
        self.head = pointwise(top // 2, 1, rngs=rngs)

    @jax.named_scope("bev")
    def __call__(self, x: Float[Array, "B X Y C"]) -> Float[Array, "B X Y"]:
        skip, *_, x = self.stages(nnx.relu(self.stem(x)))
        x = jnp.concatenate([skip, enlarge(x, skip.shape[1] // x.shape[1])], axis=-1)
        x = enlarge(nnx.relu(self.merge(x)), 2)
        return self.head(nnx.relu(self.refine(x)))[..., 0]


class BevNet(nnx.Module):
    """Cameras, lift, map."""

    def __init__(self, config: BevConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.camera = CameraEncoder(config, rngs=rngs)
        self.bev = BevEncoder(config, rngs=rngs)

    @jax.named_scope("bev_net")
    def __call__(self, images: Float[Array, "B N I J 3"], edge: int) -> Float[Array, "B X Y"]:
        images = constrain(images, ("batch", None, None, None, None))
        depth, context = self.camera(images)
        cells = rig_cells(
            self.config, num_cameras=depth.shape[1], num_columns=depth.shape[3], edge=edge
        )
        lifted = LIFTS[self.config.lift](depth, context, cells, edge * edge)
        grid = lifted.reshape(-1, edge, edge, lifted.shape[-1])
        return self.bev(constrain(grid, ("batch", None, None, None)))


def pointwise(num_in: int, num_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a 1x1 convolution with bias; few channels come out, so only its input is sharded."""
    return nnx.Linear(
        num_in,
        num_out,
        dtype=DTYPE,
        kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), ("conv_in", None)),
        rngs=rngs,
    )


def enlarge(x: Float[Array, "B H W C"], factor: int) -> Float[Array, "B H2 W2 C"]:
    """Repeats every pixel `factor` times along both edges."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)


def build(config: BevConfig, rngs: nnx.Rngs) -> BevNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return BevNet(config, rngs=rngs)


def loss(module: BevNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean binary cross entropy, in float32, of the map against 0/1 `labels`."""
    labels = batch["labels"].astype(jnp.float32)
    logits = module(batch["images"], labels.shape[-1]).astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - logits * labels)


CPU = BevConfig(
    stem=8,
    camera_channels=(32,),
    camera_depths=(1,),
    context=16,
    num_bins=8,
    nearest_m=2,
    bin_m=2,
    extent_m=16,
    bev_channels=(16, 32),
    bev_depths=(1, 1),
)
PAPER = BevConfig(
    stem=64,
    camera_channels=(64, 128, 256),
    camera_depths=(2, 2, 2),
    context=64,
    num_bins=41,
    nearest_m=4,
    bin_m=1,
    extent_m=50,
    bev_channels=(64, 128, 256),
    bev_depths=(2, 2, 2),
)


FLEET = dataclasses.replace(PAPER, num_bins=77, extent_m=80)
DRIVE = BevConfig(
    stem=4,
    camera_channels=(4, 8),
    camera_depths=(2, 2),
    context=4,
    num_bins=16,
    nearest_m=2,
    bin_m=2,
    extent_m=32,
    bev_channels=(4, 8),
    bev_depths=(2, 2),
)


def _workload(
    height: int,
    width: int,
    edge: int,
    global_batch: int,
    *,
    cameras: int = 6,
    rate: float = 1e-3,
) -> Workload:
    """Returns a training step on some cameras and a square map."""
    images = Input(shape=(cameras, height, width, 3))
    labels = Input(shape=(edge, edge), dtype="int32")
    inputs = (("images", images), ("labels", labels))
    return Workload(global_batch=global_batch, inputs=inputs, learning_rate=rate)


CHANGES = {
    "segsum": ("segment_sum", ""),
    "gather": ("gather", "segment sum with row contraction and a precomputed gather"),
    "product": ("product", "segment sum with row contraction and a one-hot product"),
}


def _rivals(
    size: str,
    config: BevConfig,
    workload: Workload,
    source: str,
    changes: tuple[str, ...] = tuple(CHANGES),
) -> list[Candidate]:
    """Returns one candidate for each lift."""
    return [
        Candidate(
            name=f"bev-{size}-{change}",
            family="bev",
            size=size,
            config=dataclasses.replace(config, lift=CHANGES[change][0]),
            build=build,
            loss=loss,
            workload=workload,
            base=f"bev-{size}-segsum",
            replaces=CHANGES[change][1],
            validity="T0" if CHANGES[change][1] else "base",
            source=source,
        )
        for change in changes
    ]


def _drivers() -> list[Candidate]:
    """Returns the network that trains here, the same with other lifts, and smaller ones."""
    base = dataclasses.replace(DRIVE, lift="gather")

    def driver(change: str, replaces: str, validity: Validity, **fields: Any) -> Candidate:
        return Candidate(
            name=f"bev-drive-{change}",
            family="bev",
            size="drive",
            config=dataclasses.replace(base, **fields),
            build=build,
            loss=loss,
            workload=_workload(48, 128, 64, 8, rate=8e-3),
            base="bev-drive-gather",
            replaces=replaces,
            validity=validity,
            source=DRIVE_SOURCE,
        )

    return [
        driver("gather", "", "base"),
        driver("segsum", "gather by a segment sum", "T0", lift="segment_sum"),
        driver("product", "gather by a one-hot product", "T0", lift="product"),
        driver("shallow", "two blocks a camera stage by one", "T1", camera_depths=(1, 1)),
        driver("flat", "two blocks a map stage by one", "T1", bev_depths=(1, 1)),
        driver("thin", "4 channels of a lifted point by 2", "T1", context=2),
        driver(
            "early",
            "two camera stages by one, at half the stride",
            "T2",
            camera_channels=(8,),
            camera_depths=(2,),
        ),
        driver("coarse", "depth bins of 2 m by bins of 8 m", "T2", num_bins=4, bin_m=8),
    ]


DRIVE_SOURCE = (
    "no publication: the parts of Lift-Splat-Shoot for the simulator's cameras and map, so narrow "
    "that half of its width is seen to be too little within minutes on two cores"
)
CPU_SOURCE = "Lift-Splat-Shoot's parts, made small to step on two cores"
PAPER_SOURCE = (
    "Philion and Fidler, Lift-Splat-Shoot, ECCV 2020: images, bins, map and context; the residual "
    "backbone, the field of view and the batch are ours"
)
FLEET_SOURCE = (
    "no publication: Lift-Splat-Shoot with eight cameras of 960x1280 and a map of 160 m; there the "
    "one-hot product's matrix would have 10 GB"
)
CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("cpu", CPU, _workload(16, 32, 16, 2), CPU_SOURCE),
    *_drivers(),
    *_rivals("paper", PAPER, _workload(128, 352, 200, 64), PAPER_SOURCE),
    *_rivals(
        "fleet",
        FLEET,
        _workload(960, 1280, 320, 32, cameras=8),
        FLEET_SOURCE,
        ("segsum", "gather"),
    ),
)
