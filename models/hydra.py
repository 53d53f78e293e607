"""Several cameras over several frames to objects, lanes, occupancy and a way: "HydraNet-like".

Tesla's talks name the parts, and this file has them: a RegNet on every camera, a BiFPN, queries of
a bird's-eye raster that attend to all cameras' tokens, a queue of such maps, a video module, a
trunk, heads. Widths, depths and losses were not published: all of them here are ours. Also ours:
- Images are taken as rectified: level cameras at the centre with evenly spaced yaws.
- Raster queries carry no summary of the images. The queue holds the frames of one sample, which is
  not moved with the vehicle; the ego motion is added to each frame's map as features.
- Lanes are one sequence of tokens. Objects are dense, their centres single cells where CenterPoint
  draws Gaussians; there is no matching.
- Group norm where RegNet has batch norm, so that blocks can be looped over.

The resolution of images, cameras, frames, map, and the lengths of lanes and way belong to the
workload and are read from shapes.

Letters: `B` batch, `T` frames from old to new, `N` cameras, `I` `J` rows and columns of an image,
`H` `W` of features, `C` channels in, `F` channels out, `X` `Y` the map's
edges, `D` model, `Z` levels, `K` classes, `L` lane tokens, `V` vocabulary, `P`
waypoints, `M` numbers of the ego motion. A `2` marks the edges that a layer puts out.

Sources: Tesla AI Day, 2021 and 2022; Radosavovic et al., "Designing Network Design Spaces", CVPR
2020 (RegNet); Tan et al., "EfficientDet", CVPR 2020 (BiFPN).
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks import losses
from jaxbench.models.blocks.attention import AttentionKind
from jaxbench.models.blocks.convolution import ConvNorm, upsample
from jaxbench.models.blocks.heads import (
    BOX_NUMBERS,
    DetectionHead,
    LaneHead,
    OccupancyHead,
    WaypointHead,
)
from jaxbench.models.blocks.pyramid import Neck, NeckKind
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.video import (
    ConvGru,
    LinearRecurrence,
    VideoAttention,
    VideoConvolution,
)
from jaxbench.models.blocks.view import View
from jaxbench.models.blocks.volume import run_block
from jaxbench.models.blocks.weights import Linear

DTYPE = jnp.bfloat16

NUM_MOTION = 4  # ego motion since the frame before: forward, left, turn, time
# The total loss is the sum of these parts; the shares are ours.
SHARES = {"heat": 10.0, "box": 0.25, "lanes": 1.0, "occupancy": 1.0, "waypoints": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class HydraConfig:
    """Sizes of the network and its choices.

    Attributes:
      neck: Weighted sums down and up, or plain sums down.
      view: Raster cells attend to all cameras, or to the one that looks their way.
      attention: How attention to cameras is written; `chunked` takes a camera at a time.
      video: What reads the queue of maps.
      cameras: Cameras go through the backbone as one batch, or one after another.
      frames: Gradients go through all frames, or the newest alone.
      remat: `full` keeps only the input of each block for the backward pass.
      stem: Channels after the first convolution, at stride 2.
      camera_channels: Channels of the backbone's stages, each with stride 2.
      camera_depths: Blocks of the backbone's stages.
      group_width: Channels of one group of the grouped convolutions.
      neck_channels: Channels of the neck, which reads the last three stages.
      neck_rounds: Rounds of the weighted neck.
      fov_degrees: Horizontal field of view of a camera; below 180.
      dim: Width of the raster, the map and the heads.
      num_heads: Heads of all attention.
      mlp_dim: Width of the feed-forward layers.
      view_layers: Layers of attention to cameras.
      trunk_layers: Residual blocks on the map.
      num_classes: Classes of objects.
      num_levels: Levels of occupancy.
      vocab_size: Lane tokens.
      lane_layers: Layers of the lane decoder.
    """

    neck: NeckKind = "bifpn"
    view: Literal["dense", "local"] = "dense"
    attention: AttentionKind = "einsum"
    video: Literal["gru", "conv3d", "attention", "linear"] = "gru"
    cameras: Literal["fold", "scan"] = "fold"
    frames: Literal["all", "newest"] = "all"
    remat: Literal["none", "full"] = "none"
    stem: int
    camera_channels: tuple[int, ...]
    camera_depths: tuple[int, ...]
    group_width: int
    neck_channels: int
    neck_rounds: int
    fov_degrees: float = 60.0
    dim: int
    num_heads: int
    mlp_dim: int
    view_layers: int
    trunk_layers: int
    num_classes: int
    num_levels: int
    vocab_size: int
    lane_layers: int


class GroupedBlock(nnx.Module):
    """RegNet's Y block: 1x1, grouped 3x3, squeeze and excitation, 1x1, beside a shortcut."""

    def __init__(
        self, num_in: int, num_out: int, *, group_width: int, stride: int = 1, rngs: nnx.Rngs
    ) -> None:
        squeezed, groups = num_in // 4, num_out // group_width
        make = partial(ConvNorm, norm="group", rngs=rngs)
        self.reduce = make(num_in, num_out)
        self.mix = make(num_out, num_out, kernel=(3, 3), stride=stride, groups=groups)
        self.squeeze = Linear(num_out, squeezed, ("conv_in", None), rngs=rngs)
        self.excite = Linear(squeezed, num_out, (None, "conv_out"), rngs=rngs)
        self.expand = make(num_out, num_out, activation=None)
        same = stride == 1 and num_in == num_out
        self.shortcut = None if same else make(num_in, num_out, stride=stride, activation=None)

    @jax.named_scope("grouped_block")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = self.mix(self.reduce(x))
        mean = jnp.mean(y, axis=(1, 2), keepdims=True, dtype=jnp.float32).astype(y.dtype)
        y = y * nnx.sigmoid(self.excite(nnx.relu(self.squeeze(mean))))
        return nnx.relu(self.expand(y) + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """A block that strides, then a loop over equal ones."""

    def __init__(
        self, num_in: int, num_out: int, depth: int, *, config: HydraConfig, rngs: nnx.Rngs
    ) -> None:
        def make(rngs: nnx.Rngs) -> GroupedBlock:
            return GroupedBlock(num_out, num_out, group_width=config.group_width, rngs=rngs)

        width, remat = config.group_width, config.remat
        self.remat = remat == "full"
        self.first = GroupedBlock(num_in, num_out, group_width=width, stride=2, rngs=rngs)
        self.rest = Stack(make, depth - 1, remat=remat, rngs=rngs) if depth > 1 else None

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = run_block(self.first, x, remat=self.remat)
        return constrain(x if self.rest is None else self.rest(x), ("batch", None, None, None))


class CameraEncoder(nnx.Module):
    """Image to a map of tokens, at the stride of the last stage."""

    def __init__(self, config: HydraConfig, *, rngs: nnx.Rngs) -> None:
        channels, depths = (config.stem, *config.camera_channels), config.camera_depths
        self.stem = ConvNorm(3, config.stem, kernel=(3, 3), stride=2, norm="group", rngs=rngs)
        self.stages = nnx.List(
            [
                Stage(num_in, num_out, depth, config=config, rngs=rngs)
                for num_in, num_out, depth in zip(channels[:-1], channels[1:], depths, strict=True)
            ]
        )
        self.neck = Neck(
            config.camera_channels[-3:],
            config.neck_channels,
            kind=config.neck,
            num_rounds=config.neck_rounds,
            rngs=rngs,
        )

    @jax.named_scope("camera")
    def __call__(self, x: Float[Array, "B I J 3"]) -> Float[Array, "B H W C"]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.neck(maps[-3:])


class TrunkBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        make = partial(ConvNorm, dim, dim, kernel=(3, 3), norm="group", rngs=rngs)
        self.first, self.second = make(), make(activation=None)

    @jax.named_scope("trunk_block")
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y D"]:
        return nnx.relu(x + self.second(self.first(x)))


class Outputs(NamedTuple):
    """What the heads put out."""

    heat: Float[Array, "B X Y K"]
    box: Float[Array, "B X Y _"]
    lanes: Float[Array, "B L V"]
    occupancy: Float[Array, "B X Y Z"]
    waypoints: Float[Array, "B P 2"]


class HydraNet(nnx.Module):
    """Cameras, view, queue, video module, trunk, heads."""

    def __init__(self, config: HydraConfig, *, rngs: nnx.Rngs) -> None:
        dim, sizes = config.dim, {"num_heads": config.num_heads, "mlp_dim": config.mlp_dim}
        self.config = config
        self.camera = CameraEncoder(config, rngs=rngs)
        self.view = View(
            config.neck_channels,
            dim,
            local=config.view == "local",
            fov_degrees=config.fov_degrees,
            num_layers=config.view_layers,
            kind=config.attention,
            remat=config.remat,
            rngs=rngs,
            **sizes,
        )
        self.motion = Linear(NUM_MOTION, dim, (None, "embed"), bias=False, rngs=rngs)
        self.video = _make_video(config, rngs=rngs)
        self.trunk = Stack(
            lambda r: TrunkBlock(dim, rngs=r), config.trunk_layers, remat=config.remat, rngs=rngs
        )
        self.detection = DetectionHead(dim, config.num_classes, rngs=rngs)
        self.occupancy = OccupancyHead(dim, config.num_levels, rngs=rngs)
        self.lanes = LaneHead(
            dim,
            config.vocab_size,
            num_layers=config.lane_layers,
            remat=config.remat,
            rngs=rngs,
            **sizes,
        )
        self.waypoints = WaypointHead(dim, NUM_MOTION, rngs=rngs, **sizes)

    @jax.named_scope("hydra")
    def __call__(
        self,
        images: Float[Array, "B T N I J 3"],
        motion: Float[Array, "B T M"],
        lanes: Int[Array, "B L"],
        *,
        edge: int,
        num_waypoints: int,
    ) -> Outputs:
        images = constrain(images.astype(DTYPE), ("batch", *(None,) * 5))
        motion = constrain(motion.astype(DTYPE), ("batch", None, None))
        queue = self._observe_frames(images, edge // 2)
        with jax.named_scope("video"):
            queue = queue + self.motion(motion)[:, :, None, None]
            x = self.video(constrain(queue, ("batch", *(None,) * 4)))
        with jax.named_scope("trunk"):
            x = constrain(self.trunk(x), ("batch", None, None, None))
        with jax.named_scope("heads"):
            cells, fine = x.reshape(x.shape[0], -1, x.shape[-1]), upsample(x)
            heat, box = self.detection(fine)
            return Outputs(
                heat=heat,
                box=box,
                lanes=self.lanes(lanes, cells),
                occupancy=self.occupancy(fine),
                waypoints=self.waypoints(motion[:, -1], cells, num_waypoints),
            )

    def _observe_frames(
        self, images: Float[Array, "B T N I J 3"], edge: int
    ) -> Float[Array, "B T X Y D"]:
        """Returns the queue of maps, of which only the newest is trained with `newest`."""
        if self.config.frames == "all":
            return self._observe(images, edge)
        old = jax.lax.stop_gradient(self._observe(images[:, :-1], edge))
        return jnp.concatenate([old, self._observe(images[:, -1:], edge)], axis=1)

    def _observe(self, images: Float[Array, "B T N I J 3"], edge: int) -> Float[Array, "B T X Y D"]:
        B, T, N = images.shape[:3]
        if self.config.cameras == "scan":
            graphdef, state = nnx.split(self.camera)
            one_by_one = jnp.moveaxis(images, 2, 0).reshape(N, B * T, *images.shape[3:])
            # Copied: only what the loop itself made can be looped over once more inside.
            maps = jax.lax.map(lambda x: nnx.merge(graphdef, state, copy=True)(x), one_by_one)
            maps = jnp.moveaxis(maps, 0, 1)
        else:
            maps = self.camera(images.reshape(-1, *images.shape[3:]))
            maps = maps.reshape(B * T, N, *maps.shape[1:])
        x = self.view(constrain(maps, ("batch", *(None,) * 4)), edge)
        return x.reshape(B, T, *x.shape[1:])


def _make_video(config: HydraConfig, *, rngs: nnx.Rngs) -> Any:
    if config.video == "attention":
        sizes = {"num_heads": config.num_heads, "mlp_dim": config.mlp_dim}
        return VideoAttention(config.dim, rngs=rngs, **sizes)
    makers = {"gru": ConvGru, "conv3d": VideoConvolution, "linear": LinearRecurrence}
    return makers[config.video](config.dim, rngs=rngs)


def build(config: HydraConfig, rngs: nnx.Rngs) -> HydraNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return HydraNet(config, rngs=rngs)


def loss(module: HydraNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the sum of the heads' losses by `SHARES`.

    Focal loss of `objects`, integers of which those below the number of classes are centres of that
    class and all others are none; absolute error of `boxes` at centres; cross entropy of each next
    token of `lanes`; binary cross entropy of the voxels, which are occupied where `occupied` is 0,
    where neighbours share a label if the network tells more levels apart than there are labels;
    absolute error of `waypoints`.
    """
    config, objects, lanes = module.config, batch["objects"], batch["lanes"]
    found = module(
        batch["images"],
        batch["motion"],
        lanes[:, :-1],
        edge=objects.shape[-1],
        num_waypoints=batch["waypoints"].shape[1],
    )
    is_object = (objects < config.num_classes)[..., None]
    level = np.arange(config.num_levels) * batch["occupied"].shape[-1] // config.num_levels
    occupied = (batch["occupied"][..., level] == 0).astype(jnp.int32)
    parts = {
        # A class past the last is a row of zeros.
        "heat": losses.focal(found.heat, jax.nn.one_hot(objects, config.num_classes)),
        "box": losses.absolute_error(
            found.box, batch["boxes"], jnp.broadcast_to(is_object, found.box.shape)
        ),
        "lanes": losses.cross_entropy(found.lanes, lanes[:, 1:]),
        "occupancy": losses.binary_cross_entropy(found.occupancy, occupied),
        "waypoints": losses.absolute_error(found.waypoints, batch["waypoints"]),
    }
    return sum((SHARES[name] * part for name, part in parts.items()), jnp.zeros(()))


CPU = HydraConfig(
    stem=16,
    camera_channels=(16, 32, 64),
    camera_depths=(1, 1, 2),
    group_width=8,
    neck_channels=16,
    neck_rounds=1,
    dim=32,
    num_heads=4,
    mlp_dim=64,
    view_layers=2,
    trunk_layers=1,
    num_classes=3,
    num_levels=4,
    vocab_size=64,
    lane_layers=1,
)
PAPER = HydraConfig(
    stem=32,
    camera_channels=(128, 192, 512, 1088),
    camera_depths=(2, 6, 12, 2),
    group_width=64,
    neck_channels=128,
    neck_rounds=2,
    dim=256,
    num_heads=8,
    mlp_dim=1024,
    view_layers=3,
    trunk_layers=4,
    num_classes=10,
    num_levels=16,
    vocab_size=512,
    lane_layers=4,
)
FLEET = dataclasses.replace(PAPER, attention="chunked", remat="full")


def _workload(
    config: HydraConfig,
    cameras: tuple[int, int, int, int],
    edge: int,
    *,
    num_lanes: int,
    num_waypoints: int,
    batch: int,
) -> Workload:
    """Returns a training step on frames of cameras, a square map and a sequence of lane tokens."""
    # One cell in fifty is an object's centre, one voxel in ten is occupied.
    inputs = {
        "images": Input(shape=(*cameras, 3)),
        "motion": Input(shape=(cameras[0], NUM_MOTION)),
        "objects": Input(shape=(edge, edge), dtype="int32", high=50 * config.num_classes),
        "boxes": Input(shape=(edge, edge, BOX_NUMBERS)),
        "lanes": Input(shape=(num_lanes + 1,), dtype="int32", high=config.vocab_size),
        "occupied": Input(shape=(edge, edge, config.num_levels), dtype="int32", high=10),
        "waypoints": Input(shape=(num_waypoints, 2)),
    }
    return Workload(global_batch=batch, inputs=tuple(inputs.items()), learning_rate=3e-3)


WORKLOADS = {
    "cpu": _workload(CPU, (2, 4, 32, 48), 16, num_lanes=8, num_waypoints=4, batch=2),
    "paper": _workload(PAPER, (4, 8, 480, 640), 96, num_lanes=64, num_waypoints=10, batch=32),
    "fleet": _workload(FLEET, (8, 8, 960, 1280), 128, num_lanes=64, num_waypoints=10, batch=32),
}
SOURCES = {
    "cpu": "the paper size's parts, made small to step on two cores",
    "paper": (
        "parts, eight cameras and queue as in Tesla AI Day, 2021; backbone RegNetY-4.0GF of "
        "Radosavovic et al., CVPR 2020; all other sizes are ours: none were published"
    ),
    "fleet": "the paper size on cameras of 960x1280 (AI Day: 1280x960), eight frames; sizes ours",
}
VARIANTS: tuple[tuple[str, str, Validity, dict[str, Any]], ...] = (
    ("base", "", "base", {}),
    ("conv3d", "ConvGRU over frames with 3-D convolutions", "T2", {"video": "conv3d"}),
    ("attention", "ConvGRU over frames with attention", "T2", {"video": "attention"}),
    ("linear", "ConvGRU over frames with a linear recurrence", "T2", {"video": "linear"}),
    ("fpn", "BiFPN with FPN", "T2", {"neck": "fpn"}),
    ("local", "attention to all cameras with the one that looks there", "T2", {"view": "local"}),
    ("newest", "gradients of all frames with the newest's alone", "T2", {"frames": "newest"}),
    ("chunked", "all scores at once with a camera's at a time", "T0", {"attention": "chunked"}),
    ("scancameras", "one batch of cameras with one after another", "T0", {"cameras": "scan"}),
    ("remat", "stored activations with recomputed ones", "T0", {"remat": "full"}),
)


def _rivals(size: str, config: HydraConfig, *, changes: tuple[str, ...]) -> list[Candidate]:
    """Returns the variants named in `changes` at one size; all of them if it is empty."""
    return [
        Candidate(
            name=f"hydra-{size}-{change}",
            family="hydra",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=WORKLOADS[size],
            base=f"hydra-{size}-base",
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
    *_rivals("fleet", FLEET, changes=("base", "linear", "newest")),
)
