"""Camera to three-dimensional occupancy, with five networks between the lift and the voxels.

Each pixel of a camera predicts a distribution over depth bins and a context vector. Their outer
products are summed into a volume of half the voxels' resolution, which a pyramid over three
resolutions reads; a head at full resolution gives every voxel its class. "SurroundOcc-like" and
"FlashOcc-like", neither of them itself:
- The rig is fixed: level cameras at the centre with evenly spaced yaws. A point's ground cell then
  does not depend on its image row, nor its level on its column. Both publications
  read calibrations.
- All share this lift, after Lift-Splat-Shoot as in FlashOcc; SurroundOcc and TPVFormer sample the
  images by deformable attention.
- The backbone is ResNet-50 with group norm where theirs is ResNet-50 or 101 with batch norm.
- The loss is the plain cross entropy; SurroundOcc adds affinity losses and FlashOcc class weights.

Images and the ground's resolution belong to the workload and are read from shapes.

Letters: `B` batch, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of features, `D`
depth bins, `P` points (cameras x columns x bins), `C` channels in, `F` channels out, `X` `Y` `Z`
the volume's edges (forward, left, up), `K` classes. A `2` marks the edges that a layer puts out.

Sources: Yu et al., "FlashOcc", 2023; Wei et al., "SurroundOcc", ICCV 2023; Huang et al.,
"TPVFormer", CVPR 2023; Philion and Fidler, "Lift, Splat, Shoot", ECCV 2020.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.convolution import ConvNorm, upsample
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.volume import ConvKind, Pyramid, Step, enlarge, run_block
from jaxbench.models.blocks.weights import Linear

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class OccupancyConfig:
    """Shape of the network and geometry of the rig.

    Attributes:
      volume: What reads the lifted volume: dense, factorised or depthwise convolutions over three
        dims; convolutions over the ground alone, with the height in the channels; three planes.
      norm: Norm of the volume's network.
      lift: How points are summed into the volume: scattered one by one, or multiplied by a one-hot
        matrix.
      remat: Which blocks keep only their input for the backward pass.
      stem: Channels after the first convolution and the pooling, at stride 4.
      camera_channels: Channels of the camera's stages; all but the first have stride 2.
      camera_depths: Bottleneck blocks of the camera's stages.
      neck: Channels of the map that the last two stages are merged into.
      context: Channels of a lifted point.
      num_bins: Depth bins.
      nearest_m: Depth of the first bin, along the optical axis.
      bin_m: Depth from one bin to the next.
      fov_degrees: Horizontal field of view of a camera; below 180.
      camera_height_m: Height of the cameras above the ego frame's origin.
      extent_m: Metres from the centre to each edge of the ground.
      floor_m: Height of the lowest level's underside.
      ceiling_m: Height of the highest level's top.
      num_levels: Levels of voxels that are told apart.
      channels: Channels of the volume's stages, from half of the voxels' resolution downwards.
      depths: Residual blocks of the volume's stages.
      voxel_channels: Channels of a voxel before its class.
      num_classes: Classes of a voxel; the last one is free space.
    """

    volume: Literal["conv3d", "factorised", "depthwise", "height", "triplane"] = "conv3d"
    norm: Literal["batch", "group", "none"] = "batch"
    lift: Literal["segment_sum", "product"] = "segment_sum"
    remat: Literal["none", "volume", "full"] = "none"
    stem: int
    camera_channels: tuple[int, ...]
    camera_depths: tuple[int, ...]
    neck: int
    context: int
    num_bins: int
    nearest_m: float
    bin_m: float
    fov_degrees: float = 70.0
    camera_height_m: float = 1.5
    extent_m: float
    floor_m: float = -1.0
    ceiling_m: float = 5.4
    num_levels: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    voxel_channels: int
    num_classes: int = 18


def rig_cells(
    config: OccupancyConfig, *, num_cameras: int, num_columns: int, edge: int
) -> Int[np.ndarray, "N W D"]:
    """Computes the ground cell of a camera's column and depth bin; `edge * edge` if it has none."""
    yaw = np.arange(num_cameras)[:, None, None] * (2 * math.pi / num_cameras)
    lateral = _slopes(num_columns)[:, None] * math.tan(math.radians(config.fov_degrees) / 2)
    depth = _depths(config)
    forward = depth * np.cos(yaw) - depth * lateral * np.sin(yaw)
    left = depth * np.sin(yaw) + depth * lateral * np.cos(yaw)
    cells_per_m = edge / (2 * config.extent_m)
    x = np.floor((forward + config.extent_m) * cells_per_m).astype(np.int32)
    y = np.floor((left + config.extent_m) * cells_per_m).astype(np.int32)
    inside = (x >= 0) & (x < edge) & (y >= 0) & (y < edge)
    return np.where(inside, x * edge + y, edge * edge).astype(np.int32)


def rig_levels(
    config: OccupancyConfig, *, num_rows: int, num_columns: int, num_levels: int
) -> Float[np.ndarray, "H D Z"]:
    """Computes the level of an image row and depth bin, one-hot; zeros if above or below all."""
    # Pixels are square, so the columns' field of view gives the rows' one.
    tangent = math.tan(math.radians(config.fov_degrees) / 2) * num_rows / num_columns
    height = config.camera_height_m + _slopes(num_rows)[:, None] * tangent * _depths(config)
    levels_per_m = num_levels / (config.ceiling_m - config.floor_m)
    level = np.floor((height - config.floor_m) * levels_per_m).astype(np.int32)
    return (level[..., None] == np.arange(num_levels)).astype(np.float32)


def _depths(config: OccupancyConfig) -> Float[np.ndarray, " D"]:
    return config.nearest_m + config.bin_m * np.arange(config.num_bins)


def _slopes(num_pixels: int) -> Float[np.ndarray, " H"]:
    """Pixel centres between 1 (left or top) and -1."""
    return 1 - (2 * np.arange(num_pixels) + 1) / num_pixels


@jax.named_scope("lift")
def lift(
    depth: Float[Array, "B N H W D"],
    context: Float[Array, "B N H W C"],
    config: OccupancyConfig,
    *,
    edge: int,
    num_levels: int,
) -> Float[Array, "B X Y Z C"]:
    """Sums depth[b, n, h, w, d] * context[b, n, h, w] into the voxel that (n, h, w, d) falls into.

    Image rows are contracted first, into the levels of each column and bin, whose ground cell they
    share; then columns are summed into cells, in float32 or as a product that is rounded once.
    """
    B, N, H, W, _ = depth.shape
    levels = rig_levels(config, num_rows=H, num_columns=W, num_levels=num_levels)
    ids = rig_cells(config, num_cameras=N, num_columns=W, edge=edge).reshape(-1)
    by_level = depth[..., None] * jnp.asarray(levels, depth.dtype)[None, None, :, None]
    columns = jnp.einsum("BNHWDZ,BNHWC->BNWDZC", by_level, context)
    points = columns.reshape(B, ids.size, -1)
    if config.lift == "product":
        # Index `edge * edge` is out of range: a row of zeros.
        one_hot = jax.nn.one_hot(ids, edge * edge, dtype=points.dtype)
        cells = jnp.einsum("BPF,PG->BGF", points, one_hot)
    else:
        wide, num = points.astype(jnp.float32), edge * edge
        summed = jax.vmap(lambda p: jax.ops.segment_sum(p, ids, num_segments=num + 1))(wide)
        cells = summed[:, :num].astype(points.dtype)
    return cells.reshape(B, edge, edge, num_levels, -1)


class Bottleneck(nnx.Module):
    """1x1, 3x3 and 1x1 convolutions, a quarter as wide inside; the stride is in the 3x3."""

    def __init__(self, num_in: int, num_out: int, *, stride: int = 1, rngs: nnx.Rngs) -> None:
        inner = num_out // 4
        self.reduce = ConvNorm(num_in, inner, norm="group", rngs=rngs)
        self.mix = ConvNorm(inner, inner, kernel=(3, 3), stride=stride, norm="group", rngs=rngs)
        self.expand = ConvNorm(inner, num_out, norm="group", activation=None, rngs=rngs)
        shortcut = partial(ConvNorm, norm="group", activation=None, rngs=rngs)
        same = stride == 1 and num_in == num_out
        self.shortcut = None if same else shortcut(num_in, num_out, stride=stride)

    @jax.named_scope("bottleneck")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = self.expand(self.mix(self.reduce(x)))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """A bottleneck that changes the shape, then a loop over equal ones."""

    def __init__(
        self, num_in: int, num_out: int, depth: int, *, stride: int, remat: bool, rngs: nnx.Rngs
    ) -> None:
        def make(rngs: nnx.Rngs) -> Bottleneck:
            return Bottleneck(num_out, num_out, rngs=rngs)

        self.remat = remat
        self.first = Bottleneck(num_in, num_out, stride=stride, rngs=rngs)
        kept = "full" if remat else "none"
        self.rest = Stack(make, depth - 1, remat=kept, rngs=rngs) if depth > 1 else None

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = run_block(self.first, x, remat=self.remat)
        return constrain(x if self.rest is None else self.rest(x), ("batch", None, None, None))


class CameraEncoder(nnx.Module):
    """Images to a distribution over depth bins and a context vector at every pixel."""

    def __init__(self, config: OccupancyConfig, *, rngs: nnx.Rngs) -> None:
        channels, neck = (config.stem, *config.camera_channels), config.neck
        self.num_bins = config.num_bins
        self.stem = ConvNorm(3, config.stem, kernel=(7, 7), stride=2, norm="group", rngs=rngs)
        stages = []
        for index, depth in enumerate(config.camera_depths):
            num_in, num_out, stride = channels[index], channels[index + 1], 2 if index else 1
            remat = config.remat == "full"
            stages.append(Stage(num_in, num_out, depth, stride=stride, remat=remat, rngs=rngs))
        self.stages = nnx.List(stages)
        axes = ("conv_in", "conv_out")
        self.fine = Linear(channels[-2], neck, axes, rngs=rngs)
        self.coarse = Linear(channels[-1], neck, axes, rngs=rngs)
        self.smooth = ConvNorm(neck, neck, kernel=(3, 3), norm="group", rngs=rngs)
        self.head = Linear(neck, config.num_bins + config.context, ("conv_in", None), rngs=rngs)

    @jax.named_scope("camera")
    def __call__(
        self, images: Float[Array, "B N I J 3"]
    ) -> tuple[Float[Array, "B N H W D"], Float[Array, "B N H W C"]]:
        x = self.stem(images.reshape(-1, *images.shape[2:]))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        x = self.smooth(self.fine(maps[-2]) + upsample(self.coarse(maps[-1])))
        x = self.head(x).reshape(*images.shape[:2], *x.shape[1:3], -1)
        depth = jax.nn.softmax(x[..., : self.num_bins].astype(jnp.float32))
        return depth.astype(x.dtype), x[..., self.num_bins :]


class ConvVolume(nnx.Module):
    """Convolutions over all three dims, dense or not."""

    def __init__(self, config: OccupancyConfig, *, kind: ConvKind, rngs: nnx.Rngs) -> None:
        width, axes = config.voxel_channels, ("conv_in", "conv_out")
        self.pyramid = _pyramid(config, kind, rngs=rngs)
        self.narrow = Linear(config.channels[0], width, axes, rngs=rngs)
        self.refine = Step(width, width, kind=kind, norm=config.norm, activate=True, rngs=rngs)
        self.head = Linear(width, config.num_classes, ("conv_in", None), rngs=rngs)

    @jax.named_scope("volume")
    def __call__(self, x: Float[Array, "B X Y Z C"]) -> Float[Array, "B X2 Y2 Z2 K"]:
        return self.head(self.refine(enlarge(self.narrow(self.pyramid(x)))))


class HeightVolume(nnx.Module):
    """Convolutions over the ground; the last channels are unfolded into levels, as in FlashOcc."""

    def __init__(self, config: OccupancyConfig, *, rngs: nnx.Rngs) -> None:
        width, levels = config.channels[0], config.num_levels
        inner = config.voxel_channels * levels
        self.num_levels = levels
        self.pyramid = _pyramid(config, "plane", rngs=rngs)
        self.refine = Step(width, width, kind="plane", norm=config.norm, activate=True, rngs=rngs)
        self.widen = Linear(width, inner, ("conv_in", "conv_out"), rngs=rngs)
        self.head = Linear(inner, levels * config.num_classes, ("conv_in", None), rngs=rngs)

    @jax.named_scope("volume")
    def __call__(self, x: Float[Array, "B X Y 1 C"]) -> Float[Array, "B X2 Y2 Z2 K"]:
        x = self.refine(enlarge(self.pyramid(x[..., 0, :])))
        x = self.head(jax.nn.softplus(self.widen(x)))
        return x.reshape(*x.shape[:3], self.num_levels, -1)


class TriplaneVolume(nnx.Module):
    """Convolutions over three planes, the volume's means along each dim; a voxel sums its three."""

    def __init__(self, config: OccupancyConfig, *, rngs: nnx.Rngs) -> None:
        width, axes = config.voxel_channels, ("conv_in", "conv_out")
        self.pyramids = nnx.List([_pyramid(config, "plane", rngs=rngs) for _ in range(3)])
        self.narrow = nnx.List(
            [Linear(config.channels[0], width, axes, rngs=rngs) for _ in range(3)]
        )
        self.mix = Linear(width, width, axes, rngs=rngs)
        self.head = Linear(width, config.num_classes, ("conv_in", None), rngs=rngs)

    @jax.named_scope("volume")
    def __call__(self, x: Float[Array, "B X Y Z C"]) -> Float[Array, "B X2 Y2 Z2 K"]:
        voxels = jnp.zeros((), x.dtype)
        for axis, pyramid, narrow in zip((1, 2, 3), self.pyramids, self.narrow, strict=True):
            plane = pyramid(jnp.mean(x, axis=axis, dtype=jnp.float32).astype(x.dtype))
            voxels = voxels + jnp.expand_dims(enlarge(narrow(plane)), axis)
        return self.head(nnx.relu(self.mix(nnx.relu(voxels))))


VOLUMES: dict[str, Any] = {
    "conv3d": partial(ConvVolume, kind="conv3d"),
    "factorised": partial(ConvVolume, kind="factorised"),
    "depthwise": partial(ConvVolume, kind="depthwise"),
    "height": HeightVolume,
    "triplane": TriplaneVolume,
}


class OccupancyNet(nnx.Module):
    """Cameras, lift, volume."""

    def __init__(self, config: OccupancyConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.camera = CameraEncoder(config, rngs=rngs)
        self.volume = VOLUMES[config.volume](config, rngs=rngs)

    @jax.named_scope("occupancy")
    def __call__(self, images: Float[Array, "B N I J 3"], edge: int) -> Float[Array, "B X Y Z K"]:
        images = constrain(images.astype(DTYPE), ("batch", None, None, None, None))
        depth, context = self.camera(images)
        # With the height in the channels the lift collapses it: one level that takes all.
        num_levels = 1 if self.config.volume == "height" else self.config.num_levels // 2
        x = lift(depth, context, self.config, edge=edge // 2, num_levels=num_levels)
        return self.volume(constrain(x, ("batch", None, None, None, None)))


def _pyramid(config: OccupancyConfig, kind: ConvKind, *, rngs: nnx.Rngs) -> Pyramid:
    """Makes the pyramid that reads the lifted volume, or a plane of it."""
    return Pyramid(
        config.context,
        config.channels,
        config.depths,
        kind=kind,
        norm=config.norm,
        remat=config.remat != "none",
        rngs=rngs,
    )


def build(config: OccupancyConfig, rngs: nnx.Rngs) -> OccupancyNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return OccupancyNet(config, rngs=rngs)


def loss(module: OccupancyNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy, in float32, over all voxels and all classes.

    `labels` holds integers below twenty times the number of classes. Those that name no class are
    free space, so that nineteen of twenty voxels are free, as in recorded scenes. Where the network
    tells more levels apart than there are labels, neighbours share one.
    """
    labels = batch["labels"]
    config = module.config
    level = np.arange(config.num_levels) * labels.shape[-1] // config.num_levels
    labels = jnp.minimum(labels[..., level], config.num_classes - 1)
    logits = module(batch["images"], labels.shape[1]).astype(jnp.float32)
    with jax.named_scope("loss"):
        # A comparison, not a gather: classes are few and voxels many.
        chosen = labels[..., None] == jnp.arange(config.num_classes)[(None,) * labels.ndim]
        picked = jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1)
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


CPU = OccupancyConfig(
    stem=16,
    camera_channels=(64, 128),
    camera_depths=(2, 1),
    neck=32,
    context=16,
    num_bins=8,
    nearest_m=2.0,
    bin_m=2.0,
    extent_m=16.0,
    num_levels=4,
    channels=(16, 32),
    depths=(1, 1),
    voxel_channels=16,
)
PAPER = OccupancyConfig(
    stem=64,
    camera_channels=(256, 512, 1024, 2048),
    camera_depths=(3, 4, 6, 3),
    neck=512,
    context=64,
    num_bins=88,
    nearest_m=1.0,
    bin_m=0.5,
    extent_m=40.0,
    num_levels=16,
    channels=(128, 256, 512),
    depths=(1, 1, 1),
    voxel_channels=32,
)
FLEET = dataclasses.replace(PAPER, extent_m=51.2, remat="full")


def _workload(cameras: tuple[int, int, int], grid: tuple[int, ...], batch: int) -> Workload:
    """Returns a training step on some cameras and a grid of voxels."""
    images = Input(shape=(*cameras, 3))
    labels = Input(shape=grid, dtype="int32", high=360)
    return Workload(
        global_batch=batch, inputs=(("images", images), ("labels", labels)), learning_rate=3e-3
    )


WORKLOADS = {
    "cpu": _workload((6, 32, 64), (16, 16, 4), 2),
    "paper": _workload((6, 256, 704), (200, 200, 16), 32),
    "fleet": _workload((8, 960, 1280), (256, 256, 16), 32),
}
SOURCES = {
    "cpu": "the paper size's parts, made small to step on two cores",
    "paper": (
        "images, ResNet-50, bins and 200x200x16 voxels of 18 classes as in FlashOcc, 2023; volumes "
        "of 100, 50 and 25 cells and 128, 256 and 512 channels as in SurroundOcc, ICCV 2023; "
        "everything else is ours"
    ),
    "fleet": "the paper size on eight cameras of 960x1280 and 256x256x16 voxels; ours",
}
VARIANTS: tuple[tuple[str, str, Validity, dict[str, Any]], ...] = (
    ("conv3d", "", "base", {}),
    ("factorised", "3x3x3 convolutions with 3x3x1 and 1x1x3", "T2", {"volume": "factorised"}),
    ("depthwise", "3x3x3 convolutions with depthwise and 1x1x1", "T2", {"volume": "depthwise"}),
    ("height", "3-D convolutions with 2-D, height in channels", "T2", {"volume": "height"}),
    ("triplane", "3-D convolutions with 2-D ones over three planes", "T2", {"volume": "triplane"}),
    ("groupnorm", "the volume's batch norm with group norm", "T2", {"norm": "group"}),
    ("nonorm", "the volume's batch norm with scale and bias", "T2", {"norm": "none"}),
    ("product", "segment sum of the lift with a one-hot product", "T0", {"lift": "product"}),
    ("remat", "stored activations of the volume with recomputed ones", "T0", {"remat": "volume"}),
)


def _rivals(size: str, config: OccupancyConfig, *, changes: tuple[str, ...]) -> list[Candidate]:
    """Returns the variants named in `changes` at one size; all of them if it is empty."""
    return [
        Candidate(
            name=f"occupancy-{size}-{change}",
            family="occupancy",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=WORKLOADS[size],
            base=f"occupancy-{size}-conv3d",
            replaces=replaces,
            validity=validity,
            source=SOURCES[size],
        )
        for change, replaces, validity, fields in VARIANTS
        if not changes or change in changes
    ]


CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("cpu", CPU, changes=()),
    *_rivals("paper", PAPER, changes=()),
    *_rivals("fleet", FLEET, changes=("conv3d", "height", "triplane")),
)
