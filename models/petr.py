"""Detection by queries that look at all image tokens, after PETR and StreamPETR.

Every image token carries an embedding of the points along its ray. Queries, each with a point of
its own, attend to one another and to all tokens of all cameras. "PETR-like", not PETR:
- The rig is fixed and level, so the embedding of the rays does not depend on the sample and is
  computed once a step; PETR computes it for every sample's calibration.
- 644 queries are learned and 256 come from the earlier frame, in all variants, as in StreamPETR.
  Its memory keeps latent vectors; here it is drawn as boxes, and an MLP makes the vectors. Motion
  of the vehicle and age of the memory are left out.
- The last layer alone is supervised; matching is greedy and in the graph (Hungarian on the host in
  the publications); projections of attention have no bias; no denoising queries.

Letters: `B` batch, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of features, `C`
channels, `S` tokens of all cameras, `Q` queries, `L` earlier queries, `D` model, `P` points of a
ray, `K` classes, `M` objects.

Sources: Liu et al., "PETR", ECCV 2022 (64 points of a ray, ray MLP of 4 D); Wang et al.,
"StreamPETR", ICCV 2023 (R50, 256x704, 644 + 256 queries, memory of 1024).
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
    CameraEncoder,
    Cameras,
    rig_climbs,
    rig_directions,
)
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.queries import (
    BOX,
    CODES,
    Matching,
    Mlp,
    QueryAttention,
    SetHead,
    decode_boxes,
    embed_sines,
    set_loss,
    unsigmoid,
)
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.weights import Linear

DTYPE = jnp.bfloat16
NEAREST_M = 1.0  # PETR's first point of a ray
LIFT_M = 10  # points are kept from this far below the ground to as far above


@dataclass(frozen=True, kw_only=True, slots=True)
class PetrConfig:
    """Sizes of the network and geometry of the rig.

    Attributes:
      stem, widths, depths: Backbone: channels of the stem, then of each stage's bottlenecks, and
        how many it has.
      neck: Channels of the map that the two coarsest stages are merged into.
      cameras: All cameras as one batch, or one after another with their own batch statistics.
      embed_dim, num_heads, head_dim, mlp_dim, num_layers: Decoder; D need not be heads x head_dim.
      key_heads: Every query head has keys of its own, or one set of keys and values serves all.
      attention: Scores of all tokens at once, or of an eighth of the tokens at a time.
      remat: `full` keeps only each decoder layer's input for the backward pass.
      num_queries: Learned queries.
      num_propagated: Queries taken over from the earlier frame.
      memory: `propagate` uses those alone; in `attend` queries see the whole memory as well.
      matching: Objects take the cheapest free query, or always the same one.
      num_points: Points of a ray, at growing distances.
      farthest_m: Distance of the last one; also metres from the middle to the range's edges.
      fov_degrees: Horizontal field of view of a camera.
    """

    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    neck: int
    cameras: Cameras = "fold"
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_layers: int
    key_heads: Literal["all", "one"] = "all"
    attention: Literal["einsum", "chunked"] = "einsum"
    remat: Literal["none", "full"] = "none"
    num_queries: int
    num_propagated: int
    memory: Literal["propagate", "attend"] = "propagate"
    matching: Matching = "greedy"
    num_points: int
    farthest_m: int = 61
    fov_degrees: int = 70
    num_classes: int = 10


def ray_depths(config: PetrConfig) -> Float[np.ndarray, " P"]:
    """Computes depths with linearly growing steps. Source: PETR's code, `LID`."""
    index = np.arange(config.num_points)
    step = (config.farthest_m - NEAREST_M) / (config.num_points * (config.num_points + 1))
    return NEAREST_M + step * index * (index + 1)


def ray_points(
    config: PetrConfig, *, num_cameras: int, num_rows: int, num_columns: int
) -> Float[Array, "N H W _"]:
    """Computes the points of every pixel's ray, as logits of their place in the range.

    Forward and left do not depend on a pixel's row, nor up on its camera and column, so that small
    tables are spread in the program.
    """
    depths, size, fov = ray_depths(config), (num_rows, num_columns), config.fov_degrees
    directions = rig_directions(num_cameras=num_cameras, num_columns=size[1], fov_degrees=fov)
    climbs = rig_climbs(num_rows=size[0], num_columns=size[1], fov_degrees=fov)
    ground = directions[:, :, None] * depths[:, None] / (2 * config.farthest_m) + 0.5
    up = (CAMERA_HEIGHT_M + climbs[:, None] * depths) / (2 * LIFT_M) + 0.5
    P = config.num_points
    tables = [
        jnp.broadcast_to(
            unsigmoid(jnp.asarray(table, jnp.float32)), (num_cameras, *size, table.shape[-1])
        )
        for table in (ground.reshape(num_cameras, 1, size[1], 2 * P), up.reshape(1, -1, 1, P))
    ]
    return jnp.concatenate(tables, axis=-1)


class DecoderLayer(nnx.Module):
    """Attention among queries and memory, to the tokens, feed-forward; a norm after each."""

    def __init__(self, config: PetrConfig, *, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        keys = N if config.key_heads == "all" else 1
        self.among = QueryAttention(D, N, head_dim=H, num_kv_heads=keys, rngs=rngs)
        self.across = QueryAttention(
            D, N, head_dim=H, num_kv_heads=keys, kind=config.attention, rngs=rngs
        )
        self.mlp = FeedForward(D, config.mlp_dim, activation="relu", bias=True, rngs=rngs)
        self.norms = nnx.List([LayerNorm(D) for _ in range(3)])

    @jax.named_scope("decoder_layer")
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        places: Float[Array, "B Q D"],
        keys: Float[Array, "B S D"],
        tokens: Float[Array, "B S D"],
        memory_keys: Float[Array, "B L D"],
        memory: Float[Array, "B L D"],
    ) -> Float[Array, "B Q D"]:
        x = constrain(x, ("batch", None, None))
        known = jnp.concatenate([x + places, memory_keys], axis=1)
        values = jnp.concatenate([x, memory], axis=1)
        x = self.norms[0](x + self.among(x + places, known, values))
        x = self.norms[1](x + self.across(x + places, keys, tokens))
        return self.norms[2](x + self.mlp(x))


class Petr(nnx.Module):
    """Cameras, ray embedding, queries, decoder, head."""

    def __init__(self, config: PetrConfig, *, rngs: nnx.Rngs) -> None:
        self.config, D = config, config.embed_dim
        self.camera = CameraEncoder(
            stem=config.stem,
            widths=config.widths,
            depths=config.depths,
            neck=config.neck,
            cameras=config.cameras,
            rngs=rngs,
        )
        self.project = Linear(config.neck, D, (None, "embed"), rngs=rngs)
        self.rays = Mlp(3 * config.num_points, 4 * D, D, rngs=rngs)
        init = nnx.with_partitioning(nnx.initializers.uniform(1.0), (None, None))
        self.points = nnx.Param(init(rngs.params(), (config.num_queries, 3), jnp.float32))
        self.places = Mlp(3 * (D // 2), D, D, rngs=rngs)
        self.contents = Mlp(BOX, D, D, rngs=rngs)
        self.decoder = Stack(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.head = SetHead(D, config.num_classes, rngs=rngs)

    @jax.named_scope("petr")
    def __call__(
        self, images: Float[Array, "B N I J 3"], earlier: Int[Array, "B L 10"]
    ) -> tuple[Float[Array, "B Q K"], Float[Array, "B Q 10"]]:
        tokens, keys = self._look(images)
        boxes = decode_boxes(earlier)
        memory, memory_places = self._remember(boxes)
        num = self.config.num_propagated
        learned = jnp.broadcast_to(self.points[...][None], (len(images), *self.points.shape))
        points = jnp.concatenate([learned, boxes[:, :num, :3]], axis=1)
        places = self._place(points)
        blank = jnp.zeros((*learned.shape[:2], self.config.embed_dim), DTYPE)
        x = jnp.concatenate([blank, memory[:, :num]], axis=1)
        if self.config.memory == "propagate":
            memory, memory_places = memory[:, :0], memory_places[:, :0]
        with jax.named_scope("decoder"):
            x = self.decoder(x, places, keys, tokens, memory + memory_places, memory)
        with jax.named_scope("head"):
            return self.head(x, points)

    @jax.named_scope("tokens")
    def _look(self, images: Any) -> tuple[Any, Any]:
        """Returns tokens of all cameras, and the same with their rays embedded."""
        images = constrain(images.astype(DTYPE), ("batch", None, None, None, None))
        features = self.camera(images)
        N, H, W = features.shape[1:4]
        rays = self.rays(
            ray_points(self.config, num_cameras=N, num_rows=H, num_columns=W).astype(DTYPE)
        )
        tokens = self.project(features)
        folded = (len(images), N * H * W, self.config.embed_dim)
        tokens, keys = tokens.reshape(folded), (tokens + rays[None]).reshape(folded)
        return constrain(tokens, ("batch", None, None)), constrain(keys, ("batch", None, None))

    @jax.named_scope("memory")
    def _remember(self, boxes: Any) -> tuple[Any, Any]:
        """Returns vectors of earlier boxes and the embeddings of their places."""
        return self.contents(boxes.astype(DTYPE)), self._place(boxes[..., :3])

    @jax.named_scope("places")
    def _place(self, points: Any) -> Any:
        return self.places(embed_sines(points, self.config.embed_dim // 2).astype(DTYPE))


def build(config: PetrConfig, rngs: nnx.Rngs) -> Petr:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return Petr(config, rngs=rngs)


def loss(module: Petr, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the set loss of `classes` and `boxes` (whole codes); `memory` is earlier boxes."""
    logits, boxes = module(batch["images"], batch["memory"])
    matching = module.config.matching
    return set_loss(logits, boxes, batch["classes"], batch["boxes"], matching=matching)


_CPU = PetrConfig(
    stem=16,
    widths=(16, 16),
    depths=(1, 1),
    neck=32,
    embed_dim=32,
    num_heads=4,
    head_dim=8,
    mlp_dim=64,
    num_layers=2,
    num_queries=24,
    num_propagated=8,
    num_points=8,
)
_PAPER = PetrConfig(
    stem=64,
    widths=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    neck=256,
    embed_dim=256,
    num_heads=8,
    head_dim=32,
    mlp_dim=2048,
    num_layers=6,
    num_queries=644,
    num_propagated=256,
    num_points=64,
)


def _workload(
    images: tuple[int, int, int], *, memory: int, objects: int, batch: int, rate: float
) -> Workload:
    """Returns a training step; `images` is cameras, rows, columns."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("memory", Input(shape=(memory, BOX), dtype="int32", high=CODES)),
        ("classes", Input(shape=(objects,), dtype="int32", high=10)),
        ("boxes", Input(shape=(objects, BOX), dtype="int32", high=CODES)),
    )
    return Workload(global_batch=batch, inputs=inputs, learning_rate=rate)


_WORK = {
    "cpu": _workload((2, 32, 64), memory=16, objects=4, batch=4, rate=3e-3),
    "paper": _workload((6, 256, 704), memory=1024, objects=32, batch=32, rate=4e-4),
    "fleet": _workload((8, 960, 1280), memory=1024, objects=64, batch=32, rate=4e-4),
}
_SOURCE = {
    "cpu": "PETR's parts, made small to step on two cores",
    "paper": "Wang et al., StreamPETR, ICCV 2023, R50 at 256x704; see the file's differences",
    "fleet": "no publication: StreamPETR's widths with R101 and eight cameras of 960x1280",
}


def _rivals(size: str, config: PetrConfig) -> tuple[Candidate, ...]:
    def rival(change: str, replaces: str, validity: Any, **fields: Any) -> Candidate:
        return Candidate(
            name=f"petr-{size}-{change}",
            family="petr",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=_WORK[size],
            base=f"petr-{size}-base",
            replaces=replaces,
            validity=validity,
            source=_SOURCE[size],
        )

    def heads(width: int) -> dict[str, int]:
        ratio = width // config.head_dim
        return {"head_dim": width, "num_heads": config.num_heads // ratio}

    H = config.head_dim
    every = (
        rival("base", "", "base"),
        rival(
            "chunked",
            "scores of all tokens by those of an eighth at a time with running sums",
            "T0",
            attention="chunked",
        ),
        rival("remat", "all kept values by each layer's input", "T0", remat="full"),
        rival("heads2x", "heads by half as many of twice the width", "T1", **heads(2 * H)),
        rival("heads4x", "heads by a quarter as many, four times as wide", "T1", **heads(4 * H)),
        rival("multiquery", "keys and values by head by one set of them", "T2", key_heads="one"),
        rival("memory", "propagated queries alone by the whole memory", "T2", memory="attend"),
        rival("fixed", "greedy matching by one that never changes", "T2", matching="fixed"),
        rival("loop", "cameras as one batch by one after another", "T2", cameras="loop"),
    )
    return every if size != "fleet" else (every[0], every[1], every[6])


CANDIDATES = (
    *_rivals("cpu", _CPU),
    *_rivals("paper", _PAPER),
    *_rivals("fleet", dataclasses.replace(_PAPER, depths=(3, 4, 23, 3))),
)
