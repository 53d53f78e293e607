"""Imitation planner on a raster of the road: features once, then a recurrent net, point by point.

A convolutional net turns channels drawn from above into features. A recurrent net is called once a
waypoint with the features, a memory of the waypoints so far and the last box; it gives a heat map
of the next waypoint, a map of the car's box there and the waypoint's finer place, heading and
speed. "ChauffeurNet-like": kernels, depths and channels are unpublished and ours; further
- the memory adds the heat map itself, so that gradients pass; published is its maximum's place;
- no nets for the road mask and for other agents, no losses of collision, road and geometry that
  need them, no dropout of the past;
- maps have a quarter of the raster's edge; edges are padded with zeros at every convolution;
- the true path, of which the batch holds normal noise only, starts at 8 m/s and turns and speeds
  up at random; the rasters are noise.
A one-shot net, which gives all waypoints at once, stands for the recurrent one in a variant; in
another, what the features add to the recurrent net's first convolution is computed once.

Letters: `B` batch, `I` `J` rows and columns of the raster, `H` `W` of the maps, `C` channels in,
`F` out, `P` waypoints. A `2` marks the edges that a layer puts out.

Source: Bansal et al., "ChauffeurNet", RSS 2019: raster of 400x400 at 0.2 m, ten waypoints 0.2 s
apart, and the imitation losses: cross entropy of the waypoint and of the box, absolute errors of
the finer place, heading and speed.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.convolution import Conv, ConvNorm
from jaxbench.models.blocks.losses import absolute_error, binary_cross_entropy, cross_entropy
from jaxbench.models.blocks.norms import GroupNorm, NormKind
from jaxbench.models.blocks.weights import Linear

DTYPE = jnp.bfloat16
NUM_CHANNELS = 20  # of the raster: road 3, lights 5, speed limit, route, car, its past, others 8
NUM_DETAILS = 4  # of a waypoint: two places within the cell, heading, speed
STEP_S = 0.2
EXTENT_M = 80.0  # edge of the raster
LENGTH_M, WIDTH_M = 4.8, 2.1  # of the car
START = 0.75  # of the raster's rows lie ahead of the car, which looks up

Map = Float[Array, "B H W C"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannerConfig:
    """Sizes of one network.

    Attributes:
      stem: Channels after the first convolution, at stride 2.
      channels: Channels of the stages; the first has stride 2, the others look further: dilation
        2, 4 and so on.
      depth: Residual blocks of a stage.
      plan_channels: Channels of the net that finds waypoints.
      plan_depth: Its residual blocks.
      num_steps: Most waypoints.
      convolution: 3x3 over all channels, or channel by channel and then 1x1.
      norm: Of the features; the waypoints' net has group norm, as no averages fit into a loop.
      decode: One call a waypoint, or all waypoints in one.
      entry: The first convolution of a call reads features and maps together; or the features' part
        is computed once.
      loop: Calls in a loop, or written out.
      remat: `full` keeps only what goes from call to call for the backward pass.
    """

    stem: int
    channels: tuple[int, ...]
    depth: int
    plan_channels: int
    plan_depth: int
    num_steps: int = 10
    convolution: Literal["dense", "depthwise"] = "dense"
    norm: NormKind = "batch"
    decode: Literal["recurrent", "oneshot"] = "recurrent"
    entry: Literal["joint", "hoisted"] = "joint"
    loop: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "full"] = "none"

    def __post_init__(self) -> None:
        recurrent = (self.entry, self.loop, self.remat)
        if self.decode == "oneshot" and recurrent != ("joint", "scan", "none"):
            raise ValueError(
                f"decode='oneshot' makes one call, so that entry={self.entry!r}, loop={self.loop!r}"
                f" and remat={self.remat!r} say nothing. Leave them at their defaults."
            )


class Separable(nnx.Module):
    """3x3 channel by channel, then 1x1, with a norm and an activation after each."""

    def __init__(
        self, num_in: int, num_out: int, *, norm: NormKind, rngs: nnx.Rngs, **fields: Any
    ) -> None:
        act, kernel = fields.pop("activation", nnx.relu), fields.pop("kernel")
        self.filter = ConvNorm(
            num_in, num_in, kernel=kernel, groups=num_in, norm=norm, rngs=rngs, **fields
        )
        self.mix = ConvNorm(num_in, num_out, norm=norm, activation=act, rngs=rngs)

    @jax.named_scope("separable")
    def __call__(self, x: Map) -> Float[Array, "B H2 W2 F"]:
        return self.mix(self.filter(x))


class Residual(nnx.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        separable: bool = False,
        norm: NormKind,
        rngs: nnx.Rngs,
    ) -> None:
        make: Any = Separable if separable else ConvNorm
        kernel, both = (3, 3), {"norm": norm, "dilation": dilation, "rngs": rngs}
        self.first = make(num_in, num_out, kernel=kernel, stride=stride, **both)
        self.second = make(num_out, num_out, kernel=kernel, activation=None, **both)
        changes = stride != 1 or num_in != num_out
        short = {"stride": stride, "activation": None, "norm": norm, "rngs": rngs}
        self.shortcut = ConvNorm(num_in, num_out, **short) if changes else None

    @jax.named_scope("residual")
    def __call__(self, x: Map) -> Float[Array, "B H2 W2 F"]:
        y = self.second(self.first(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class FeatureNet(nnx.Module):
    """The raster's features, at a quarter of its edge."""

    def __init__(self, config: PlannerConfig, *, rngs: nnx.Rngs) -> None:
        norm, separable = config.norm, config.convolution == "depthwise"
        self.stem = ConvNorm(
            NUM_CHANNELS, config.stem, kernel=(7, 7), stride=2, norm=norm, rngs=rngs
        )
        blocks, num_in = [], config.stem
        for stage, num_out in enumerate(config.channels):
            for block in range(config.depth):
                first = stage == 0 and block == 0
                shape = {"stride": 2 if first else 1, "dilation": 1 if first else 2**stage}
                blocks.append(
                    Residual(num_in, num_out, separable=separable, norm=norm, rngs=rngs, **shape)
                )
                num_in = num_out
        self.blocks = nnx.List(blocks)

    @jax.named_scope("feature_net")
    def __call__(self, raster: Float[Array, "B I J C"]) -> Float[Array, "B H W F"]:
        x = self.stem(constrain(raster.astype(DTYPE), ("batch", None, None, None)))
        for block in self.blocks:
            x = constrain(block(x), ("batch", None, None, None))
        return x


class Entry(nnx.Module):
    """A 3x3 convolution over features and maps, as one or as the sum of its two parts."""

    def __init__(self, num_features: int, num_maps: int, num_out: int, *, rngs: nnx.Rngs) -> None:
        self.num_features = num_features
        self.conv = Conv(num_features + num_maps, num_out, kernel=(3, 3), rngs=rngs)
        self.norm = GroupNorm(num_out)

    @jax.named_scope("entry")
    def whole(self, features: Map, *maps: Float[Array, "B H W _"]) -> Float[Array, "B H W F"]:
        """Convolves all channels together."""
        return nnx.relu(self.norm(self.conv(jnp.concatenate([features, *maps], axis=-1))))

    @jax.named_scope("entry")
    def begin(self, features: Map) -> Float[Array, "B H W F"]:
        """Convolves the features only."""
        return self._part(features, slice(None, self.num_features))

    @jax.named_scope("entry")
    def finish(
        self, begun: Float[Array, "B H W F"], *maps: Float[Array, "B H W _"]
    ) -> Float[Array, "B H W F"]:
        """Adds what the maps give."""
        more = self._part(jnp.concatenate(maps, axis=-1), slice(self.num_features, None))
        return nnx.relu(self.norm(begun + more))

    def _part(self, x: Map, channels: slice) -> Float[Array, "B H W F"]:
        kernel = self.conv.kernel[...].astype(x.dtype)[:, :, channels]
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


class Plan(nnx.Module):
    """Logits of waypoints, logits of boxes and the waypoints' details, waypoints outermost."""

    def __init__(self, config: PlannerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        recurrent, F = config.decode == "recurrent", config.plan_channels
        num_points = 1 if recurrent else config.num_steps
        self.entry = Entry(config.channels[-1], 2 if recurrent else 0, F, rngs=rngs)
        self.blocks = nnx.List(
            [Residual(F, F, norm="group", rngs=rngs) for _ in range(config.plan_depth)]
        )
        self.maps = Conv(F, 2 * num_points, bias=True, sharded=False, rngs=rngs)
        self.details = Linear(F, NUM_DETAILS, ("embed", None), rngs=rngs)

    @jax.named_scope("heads")
    def _heads(self, x: Map) -> tuple[Array, Array, Array]:
        """Returns point logits and box logits [P, B, H, W], and details [P, B, 4]."""
        for block in self.blocks:
            x = block(x)
        maps = jnp.moveaxis(self.maps(x).astype(jnp.float32), -1, 0)
        points, boxes = jnp.split(maps, 2)
        heat = _softmax(points).astype(x.dtype)
        return points, boxes, self.details(jnp.einsum("PBHW,BHWC->PBC", heat, x))

    @jax.named_scope("plan")
    def __call__(self, features: Map) -> tuple[Array, Array, Array]:
        config, entry = self.config, self.entry
        if config.decode == "oneshot":
            return self._heads(entry.whole(features))
        hoisted = config.entry == "hoisted"
        begun = entry.begin(features) if hoisted else features
        enter = entry.finish if hoisted else entry.whole

        def step(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Any]:
            memory, box = carry
            state = (part.astype(DTYPE)[..., None] for part in carry)
            points, boxes, details = (part[0] for part in self._heads(enter(begun, *state)))
            carry = (memory + _softmax(points), jax.nn.sigmoid(boxes))
            return carry, (points, boxes, details)

        if config.remat == "full":
            step = jax.checkpoint(step)
        empty = jnp.zeros(features.shape[:3], jnp.float32)
        carry, found = (empty, empty), []
        if config.loop == "scan":
            return jax.lax.scan(step, carry, None, length=config.num_steps)[1]
        for _ in range(config.num_steps):
            carry, outputs = step(carry, None)
            found.append(outputs)
        points, boxes, details = (jnp.stack(parts) for parts in zip(*found, strict=True))
        return points, boxes, details


def _softmax(logits: Float[Array, "*dims H W"]) -> Float[Array, "*dims H W"]:
    """Softmax over all cells of a map."""
    flat = logits.reshape(*logits.shape[:-2], -1)
    return jax.nn.softmax(flat, axis=-1).reshape(logits.shape)


class Planner(nnx.Module):
    """Features, then waypoints."""

    def __init__(self, config: PlannerConfig, *, rngs: nnx.Rngs) -> None:
        self.features = FeatureNet(config, rngs=rngs)
        self.plan = Plan(config, rngs=rngs)

    @jax.named_scope("planner")
    def __call__(
        self, raster: Float[Array, "B I J C"]
    ) -> tuple[Float[Array, "P B H W"], Float[Array, "P B H W"], Float[Array, "P B 4"]]:
        return self.plan(self.features(raster))


def build(config: PlannerConfig, rngs: nnx.Rngs) -> Planner:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return Planner(config, rngs=rngs)


def true_path(
    noise: Float[Array, "P B 2"], edge: int
) -> tuple[Float[Array, "P B 2"], Float[Array, "P B"], Float[Array, "P B"]]:
    """Drives from 8 m/s straight up, with random acceleration (2 m/s2) and yaw rate (0.3 rad/s).

    Returns:
      Places (row, column) in cells of a map of `edge` cells, kept on the map; headings, left of up
      positive; and speeds in 10 m/s.
    """
    speed = 8 + jnp.cumsum(2 * STEP_S * noise[..., 0], axis=0)
    heading = jnp.cumsum(0.3 * STEP_S * noise[..., 1], axis=0)
    cells = speed * STEP_S * edge / EXTENT_M
    row = START * edge - jnp.cumsum(cells * jnp.cos(heading), axis=0)
    column = 0.5 * edge - jnp.cumsum(cells * jnp.sin(heading), axis=0)
    places = jnp.clip(jnp.stack([row, column], axis=-1), 0.0, edge - 0.01)
    return places, heading, speed / 10


def draw_boxes(
    places: Float[Array, "P B 2"], headings: Float[Array, "P B"], edge: int
) -> Bool[Array, "P B H W"]:
    """Marks the cells whose centres the car covers; it is drawn at least two cells wide."""
    half_length, half_width = (max(size * edge / EXTENT_M, 2.0) / 2 for size in (LENGTH_M, WIDTH_M))
    centre = jnp.arange(edge) + 0.5
    up = places[..., 0][..., None, None] - centre[None, None, :, None]
    left = places[..., 1][..., None, None] - centre[None, None, None, :]
    cos, sin = (part[..., None, None] for part in (jnp.cos(headings), jnp.sin(headings)))
    along, across = up * cos + left * sin, left * cos - up * sin
    return (jnp.abs(along) <= half_length) & (jnp.abs(across) <= half_width)


def loss(module: Planner, batch: dict[str, Any]) -> Float[Array, ""]:
    """Sums the imitation losses, each a mean: waypoint, box, finer place, heading, speed."""
    points, boxes, details = module(batch["raster"])
    noise = jnp.swapaxes(batch["path"], 0, 1)
    P, edge = noise.shape[0], points.shape[-1]
    places, headings, speeds = true_path(noise, edge)
    cells = jnp.floor(places)
    index = (cells[..., 0] * edge + cells[..., 1]).astype(jnp.int32)
    wanted = jnp.concatenate([places - cells, headings[..., None], speeds[..., None]], axis=-1)
    errors = [
        cross_entropy(points[:P].reshape(*index.shape, -1), index),
        binary_cross_entropy(boxes[:P], draw_boxes(places, headings, edge).astype(jnp.int32)),
        absolute_error(details[:P, :, :2], wanted[..., :2]),
        absolute_error(details[:P, :, 2], wanted[..., 2]),
        absolute_error(details[:P, :, 3], wanted[..., 3]),
    ]
    return sum(errors[1:], start=errors[0])


CPU = PlannerConfig(
    stem=16, channels=(16, 16), depth=1, plan_channels=16, plan_depth=1, num_steps=4
)
PAPER = PlannerConfig(stem=64, channels=(64, 128, 128), depth=2, plan_channels=64, plan_depth=1)
FLEET = PlannerConfig(
    stem=64, channels=(96, 192, 192, 192), depth=2, plan_channels=96, plan_depth=2, num_steps=20
)


def _workload(config: PlannerConfig, edge: int, global_batch: int, rate: float = 1e-3) -> Workload:
    """Returns a training step on square rasters."""
    raster, path = Input(shape=(edge, edge, NUM_CHANNELS)), Input(shape=(config.num_steps, 2))
    return Workload(
        global_batch=global_batch, inputs=(("raster", raster), ("path", path)), learning_rate=rate
    )


CPU_SOURCE = "ChauffeurNet's parts, narrow, four waypoints on 32x32 pixels, to step on two cores"
PAPER_SOURCE = (
    "Bansal et al., ChauffeurNet, RSS 2019: raster, waypoints and losses; channels, depths and "
    "batch are ours"
)
FLEET_SOURCE = "no publication: a raster of 800x800, twenty waypoints and a wider, deeper net"

Change = tuple[str, str, Validity, dict[str, Any]]  # name, replaces, validity, fields
ONE_SHOT: Change = ("oneshot", "a call a waypoint by one for all", "T2", {"decode": "oneshot"})
HOISTED: Change = (
    "hoisted",
    "a convolution over features and maps in every call by the features' part before the loop",
    "T0",
    {"entry": "hoisted"},
)
CHANGES: tuple[Change, ...] = (
    ONE_SHOT,
    HOISTED,
    ("unroll", "the loop over calls by calls written out", "T0", {"loop": "unroll"}),
    ("full", "kept activations by what goes from call to call", "T0", {"remat": "full"}),
    ("depthwise", "3x3 by depthwise 3x3 and 1x1", "T2", {"convolution": "depthwise"}),
    ("group", "batch norm of the features by group norm", "T2", {"norm": "group"}),
    ("nonorm", "batch norm of the features by scale and bias", "T2", {"norm": "none"}),
)


def _rivals(
    base: str,
    config: PlannerConfig,
    workload: Workload,
    source: str,
    changes: tuple[Change, ...],
) -> list[Candidate]:
    """Returns the base and its variants, whose names leave out a base's `-base`."""
    itself: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base.removesuffix('-base')}-{change}" if change else base,
            family="planner",
            size=base.split("-")[1],
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=base,
            replaces=words,
            validity=kind,
            source=source,
        )
        for change, words, kind, fields in (itself, *changes)
    ]


_AT_CPU, _AT_PAPER = _workload(CPU, 32, 4, 1e-2), _workload(PAPER, 400, 64)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("planner-cpu-base", CPU, _AT_CPU, CPU_SOURCE, CHANGES),
    *_rivals("planner-paper-base", PAPER, _AT_PAPER, PAPER_SOURCE, CHANGES),
    *_rivals(
        "planner-fleet-base", FLEET, _workload(FLEET, 800, 32), FLEET_SOURCE, (ONE_SHOT, HOISTED)
    ),
)
