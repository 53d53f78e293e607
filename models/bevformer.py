"""Bird's-eye-view queries that sample cameras where their pillars project, after BEVFormer.

Every cell of a map is a query. It samples the map itself and the earlier frame's map around its
place, then the images around the projections of its pillar's points, at learned offsets with
learned weights. A DETR-like decoder reads boxes from the map. "BEVFormer-like", not BEVFormer:
- The rig is fixed and level, so projections, and which camera sees which pillar, are tables made
  while tracing. The vehicle stands still: no map is shifted, and no bus signals are read.
- One feature level at stride 16 from two merged stages; published are one at stride 32 (tiny,
  small) or four (base). R101 has plain convolutions where base has deformable ones.
- Earlier frames run without gradient, as published; here all of the queue, in order. Offsets are
  drawn, not laid out on rings. References are not refined from layer to layer, and the last layer
  alone is supervised. Matching is greedy and in the graph.

Letters: `B` batch, `T` frames, `N` cameras, `I` `J` rows and columns of an image, `H` `W` of
features or of the map, `C` channels, `Q` queries, `D` model, `A` heads, `P` samples of a head,
`V` pillars in the fullest camera, `K` classes.

Source: Li et al., "BEVFormer", ECCV 2022, and its configurations tiny, small, base.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Workload, constrain
from jaxbench.models.blocks.camera import (
    CameraEncoder,
    Sight,
    gather_pillars,
    rig_climbs,
    rig_directions,
    see_pillars,
)
from jaxbench.models.blocks.deformable import Deformable, Sampling
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.queries import (
    BOX,
    CODES,
    Mlp,
    QueryAttention,
    SetHead,
    embed_sines,
    set_loss,
)
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.weights import Linear, weight

DTYPE = jnp.bfloat16
LOWEST_M, HIGHEST_M = -5.0, 3.0  # a pillar's ends, as published


@dataclass(frozen=True, kw_only=True, slots=True)
class BevFormerConfig:
    """Sizes of the network and geometry of the rig.

    Attributes:
      stem, widths, depths, neck: Backbone and its merged map, as in `CameraEncoder`.
      grid: Edge of the map in cells; it has `grid` squared queries.
      embed_dim, num_heads, mlp_dim: Width, heads and feed-forward of both stacks.
      num_layers, decoder_layers: Layers over the map and over the objects.
      num_queries: Object queries.
      pillar_points: Points of a pillar that are projected.
      samples: Samples a head takes from a camera, shared out among the pillar's points.
      map_samples: Samples a head takes from a map.
      sampling: Four neighbours are gathered; or hat functions of all rows and of all columns are
        multiplied into shares, and those with the map.
      cross: How queries read images: at samples, or by attention over all tokens.
      temporal: The map passes from frame to frame; or only the last frame is looked at.
      remat: `full` keeps only each layer's input for the backward pass.
      extent_m: Metres from the map's middle to each edge.
      fov_degrees: Horizontal field of view of a camera.
    """

    stem: int
    widths: tuple[int, ...]
    depths: tuple[int, ...]
    neck: int
    grid: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_layers: int
    decoder_layers: int
    num_queries: int
    pillar_points: int = 4
    samples: int = 8
    map_samples: int = 4
    sampling: Sampling = "gather"
    cross: Literal["deformable", "dense"] = "deformable"
    temporal: Literal["recurrent", "static"] = "recurrent"
    remat: Literal["none", "full"] = "none"
    extent_m: float = 51.2
    fov_degrees: int = 70
    num_classes: int = 10

    def __post_init__(self):
        if self.samples % self.pillar_points:
            raise ValueError(
                f"samples={self.samples} is not divisible by pillar_points={self.pillar_points}: "
                "each point gets equally many samples. Use a multiple."
            )


def _deformable(config: BevFormerConfig, num_samples: int, **widths: Any) -> Deformable:
    return Deformable(
        config.embed_dim, config.num_heads, num_samples, sampling=config.sampling, **widths
    )


class Pillars(nnx.Module):
    """Samples of the images around the pillars' points, averaged over the cameras that see them."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.deformable = _deformable(config, config.samples, source_dim=config.neck, rngs=rngs)

    @jax.named_scope("pillars")
    def __call__(
        self, x: Float[Array, "B Q D"], features: Float[Array, "B N H W C"]
    ) -> Float[Array, "B Q D"]:
        config, (B, N, H, W, C) = self.config, features.shape
        share = (np.arange(config.pillar_points) + 0.5) / config.pillar_points
        sight = see_pillars(
            edge=config.grid,
            extent_m=config.extent_m,
            heights_m=tuple(float(z) for z in LOWEST_M + (HIGHEST_M - LOWEST_M) * share),
            num_cameras=N,
            num_rows=H,
            num_columns=W,
            fov_degrees=config.fov_degrees,
        )
        offsets, weights = (self._by_camera(part, sight) for part in self.deformable.plan(x))
        repeat = config.samples // config.pillar_points
        spots = jnp.asarray(np.stack([sight.column, sight.row], axis=-1))
        spots = jnp.tile(spots, (1, 1, repeat, 1))[None, :, None]
        points = spots + offsets.reshape(B, N, *offsets.shape[1:])
        points = points.reshape(offsets.shape)
        found = self.deformable.collect(features.reshape(B * N, H, W, C), points, weights)
        total = gather_pillars(found.reshape(B, -1, found.shape[-1]), sight)
        share = jnp.asarray(1 / sight.counts, x.dtype)[None, :, None]
        return self.deformable.out(total * share)

    def _by_camera(self, values: Any, sight: Sight) -> Any:
        """Gives each camera the rows of its pillars: [B A Q ...] to [(B N) A V ...]."""
        rows = jnp.take(values, sight.pillars, axis=2, mode="fill", fill_value=0)
        rows = jnp.moveaxis(rows, 2, 1)
        return rows.reshape(-1, *rows.shape[2:])


class AllTokens(nnx.Module):
    """Attention from the map's queries to all tokens of all cameras, keys knowing their rays."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        D, A = config.embed_dim, config.num_heads
        self.project = Linear(config.neck, D, (None, "embed"), rngs=rngs)
        self.rays = Mlp(3 * (D // 2), D, D, rngs=rngs)
        self.attention = QueryAttention(D, A, head_dim=D // A, kind="chunked", rngs=rngs)

    @jax.named_scope("all_tokens")
    def __call__(
        self, x: Float[Array, "B Q D"], features: Float[Array, "B N H W C"]
    ) -> Float[Array, "B Q D"]:
        B, N, H, W, _ = features.shape
        fov = self.config.fov_degrees
        ground = rig_directions(num_cameras=N, num_columns=W, fov_degrees=fov)
        up = rig_climbs(num_rows=H, num_columns=W, fov_degrees=fov)
        rays = np.concatenate(
            [
                np.broadcast_to(ground[:, None], (N, H, W, 2)),
                np.broadcast_to(up[None, :, None, None], (N, H, W, 1)),
            ],
            axis=-1,
        )
        sines = embed_sines(jnp.asarray(rays, jnp.float32), x.shape[-1] // 2)
        tokens = self.project(features)
        keys = tokens + self.rays(sines.astype(x.dtype))[None]
        flat = (B, N * H * W, x.shape[-1])
        return self.attention(x, keys.reshape(flat), tokens.reshape(flat))


class MapLayer(nnx.Module):
    """The map and the earlier one, images, feed-forward; a norm after each."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        D, P = config.embed_dim, config.map_samples
        self.grid = config.grid
        self.past, self.present = (
            _deformable(config, P, query_dim=2 * D, rngs=rngs) for _ in range(2)
        )
        reader = Pillars if config.cross == "deformable" else AllTokens
        self.images: Any = reader(config, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, activation="relu", bias=True, rngs=rngs)
        self.norms = nnx.List([LayerNorm(D) for _ in range(3)])

    @jax.named_scope("map_layer")
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        places: Float[Array, "1 Q D"],
        earlier: Float[Array, "B Q D"],
        features: Float[Array, "B N H W C"],
    ) -> Float[Array, "B Q D"]:
        x = constrain(x, ("batch", None, None))
        both = jnp.concatenate([earlier, x + places], axis=-1)
        here = own_cells(self.grid)[None]
        past = self.past(both, fold_map(earlier, self.grid), here)
        present = self.present(both, fold_map(x, self.grid), here)
        x = self.norms[0](x + (past + present) * 0.5)
        x = self.norms[1](x + self.images(x + places, features))
        return self.norms[2](x + self.mlp(x))


def own_cells(grid: int) -> Float[Array, "Q 2"]:
    """Column and row of every cell of a map."""
    cell = jnp.arange(grid * grid)
    return jnp.stack([cell % grid, cell // grid], axis=-1).astype(jnp.float32)


def fold_map(x: Float[Array, "B Q D"], grid: int) -> Float[Array, "B H W D"]:
    """Lays cells out as rows (forward) and columns (left)."""
    return x.reshape(x.shape[0], grid, grid, x.shape[-1])


class MapEncoder(nnx.Module):
    """Images of one frame, and the earlier frame's map, to a map."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        G, D = config.grid, config.embed_dim
        self.camera = CameraEncoder(
            stem=config.stem,
            widths=config.widths,
            depths=config.depths,
            neck=config.neck,
            rngs=rngs,
        )
        self.queries = weight(rngs, (G * G, D), (None, "embed"), fan_in=1)
        # A cell's place is its row's half and its column's half.
        self.rows = weight(rngs, (G, D // 2), (None, "embed"), fan_in=1)
        self.columns = weight(rngs, (G, D // 2), (None, "embed"), fan_in=1)
        self.stack = Stack(
            lambda rngs: MapLayer(config, rngs=rngs),
            config.num_layers,
            remat=config.remat,
            rngs=rngs,
        )

    def start(self, batch: int) -> Float[Array, "B Q D"]:
        """Returns the queries, which also stand for the map before the first."""
        queries = self.queries[...].astype(DTYPE)
        return jnp.broadcast_to(queries[None], (batch, *queries.shape))

    @jax.named_scope("map_encoder")
    def __call__(
        self, images: Float[Array, "B N I J 3"], earlier: Float[Array, "B Q D"]
    ) -> Float[Array, "B Q D"]:
        features = self.camera(images)
        rows, columns = (part[...].astype(DTYPE) for part in (self.rows, self.columns))
        G, half = rows.shape
        halves = (rows[:, None], columns[None])
        places = jnp.concatenate([jnp.broadcast_to(x, (G, G, half)) for x in halves], axis=-1)
        places = places.reshape(1, G * G, 2 * half)
        return self.stack(self.start(len(images)), places, earlier, features)


class ObjectLayer(nnx.Module):
    """Attention among object queries, samples of the map, feed-forward; a norm after each."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        D, A = config.embed_dim, config.num_heads
        self.among = QueryAttention(D, A, head_dim=D // A, rngs=rngs)
        self.map = _deformable(config, config.map_samples, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, activation="relu", bias=True, rngs=rngs)
        self.norms = nnx.List([LayerNorm(D) for _ in range(3)])

    @jax.named_scope("object_layer")
    def __call__(
        self,
        x: Float[Array, "B Q D"],
        places: Float[Array, "1 Q D"],
        reference: Float[Array, "1 Q 2"],
        bev: Float[Array, "B H W D"],
    ) -> Float[Array, "B Q D"]:
        x = constrain(x, ("batch", None, None))
        x = self.norms[0](x + self.among(x + places, x + places, x))
        x = self.norms[1](x + self.map(x + places, bev, reference))
        return self.norms[2](x + self.mlp(x))


class BevFormer(nnx.Module):
    """Frames to a map, object queries, head."""

    def __init__(self, config: BevFormerConfig, *, rngs: nnx.Rngs) -> None:
        self.config, D = config, config.embed_dim
        self.encoder = MapEncoder(config, rngs=rngs)
        self.objects = weight(rngs, (config.num_queries, 2 * D), (None, "embed"), fan_in=1)
        self.locate = Linear(D, 3, ("embed", None), rngs=rngs)
        self.decoder = Stack(
            lambda rngs: ObjectLayer(config, rngs=rngs), config.decoder_layers, rngs=rngs
        )
        self.head = SetHead(D, config.num_classes, rngs=rngs)

    @jax.named_scope("bevformer")
    def __call__(
        self, images: Float[Array, "B T N I J 3"]
    ) -> tuple[Float[Array, "B Q K"], Float[Array, "B Q 10"]]:
        images = constrain(images.astype(DTYPE), ("batch", *(None,) * 5))
        batch, grid = len(images), self.config.grid
        if self.config.temporal == "recurrent":
            earlier = self._recall(images[:, :-1])
        else:
            earlier = self.encoder.start(batch)
        bev = self.encoder(images[:, -1], earlier)
        bev = constrain(fold_map(bev, grid), ("batch", None, None, None))
        content, places = jnp.split(self.objects[...].astype(DTYPE)[None], 2, axis=-1)
        with jax.named_scope("decoder"):
            reference = jax.nn.sigmoid(self.locate(places).astype(jnp.float32))
            # A box's x is forward, the map's rows; y is left, its columns.
            pixels = jnp.flip(reference[..., :2], axis=-1) * grid - 0.5
            x = jnp.broadcast_to(content, (batch, *content.shape[1:]))
            x = self.decoder(x, places, pixels, bev)
        with jax.named_scope("head"):
            return self.head(x, jnp.broadcast_to(reference, (batch, *reference.shape[1:])))

    @jax.named_scope("recall")
    def _recall(self, images: Any) -> Any:
        """Runs the earlier frames one after another, without gradient; returns their last map."""
        graphdef, state = nnx.split(self.encoder)

        def look(bev: Any, frame: Any) -> tuple[Any, None]:
            # Made anew here, because batch averages can be changed only where they were made.
            frozen = jax.tree.map(jax.lax.stop_gradient, state)
            return nnx.merge(graphdef, frozen)(frame, bev), None

        start = jax.lax.stop_gradient(self.encoder.start(len(images)))
        return jax.lax.scan(look, start, jnp.moveaxis(images, 1, 0))[0]


def build(config: BevFormerConfig, rngs: nnx.Rngs) -> BevFormer:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return BevFormer(config, rngs=rngs)


def loss(module: BevFormer, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the set loss of `classes` and `boxes` (whole codes) in the last frame."""
    logits, boxes = module(batch["images"])
    return set_loss(logits, boxes, batch["classes"], batch["boxes"])


_CPU = BevFormerConfig(
    stem=16,
    widths=(16, 16),
    depths=(1, 1),
    neck=32,
    grid=8,
    embed_dim=32,
    num_heads=4,
    mlp_dim=64,
    num_layers=2,
    decoder_layers=2,
    num_queries=24,
    pillar_points=2,
    samples=4,
)
_TINY = BevFormerConfig(
    stem=64,
    widths=(64, 128, 256, 512),
    depths=(3, 4, 6, 3),
    neck=256,
    grid=50,
    embed_dim=256,
    num_heads=8,
    mlp_dim=512,
    num_layers=3,
    decoder_layers=6,
    num_queries=900,
)
_R101 = (3, 4, 23, 3)
_SMALL = dataclasses.replace(_TINY, depths=_R101, grid=150)
_BASE = dataclasses.replace(_SMALL, grid=200, num_layers=6)


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
    ("cpu", "base"): _workload((3, 2, 32, 64), objects=4, batch=2, rate=3e-3),
    ("paper", "tiny"): _workload((3, 6, 480, 800), objects=32, batch=32, rate=2e-4),
    ("paper", "small"): _workload((3, 6, 736, 1280), objects=32, batch=32, rate=2e-4),
    ("paper", "base"): _workload((4, 6, 928, 1600), objects=32, batch=32, rate=2e-4),
    ("fleet", "base"): _workload((8, 8, 960, 1280), objects=64, batch=32, rate=2e-4),
}
_SOURCE = {
    "cpu": "BEVFormer's parts, made small to step on two cores",
    "paper": "Li et al., BEVFormer, ECCV 2022, configuration of that name; images padded to 32",
    "fleet": "no publication: BEVFormer-base with eight cameras of 960x1280 and eight frames",
}
_CHANGES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "product": (
        "gathered neighbours by products of hat functions",
        "T0",
        {"sampling": "product"},
    ),
    "remat": ("all kept values by each layer's input", "T0", {"remat": "full"}),
    "dense": (
        "deformable samples of images by attention to all tokens",
        "T2",
        {"cross": "dense"},
    ),
    "static": ("a map handed on by the last frame alone", "T2", {"temporal": "static"}),
}


def _rivals(
    size: str, scale: str, config: BevFormerConfig, changes: tuple[str, ...]
) -> tuple[Candidate, ...]:
    """Returns a base and those of `_CHANGES`."""

    def rival(name: str, replaces: str, validity: Any, fields: dict[str, Any]) -> Candidate:
        return Candidate(
            name=name,
            family="bevformer",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=_WORK[size, scale],
            base=base,
            replaces=replaces,
            validity=validity,
            source=_SOURCE[size],
        )

    base = f"bevformer-{size}-{scale}"
    stem = base.removesuffix("-base") if size == "cpu" else base
    variants = (rival(f"{stem}-{change}", *_CHANGES[change]) for change in changes)
    return (rival(base, "", "base", {}), *variants)


CANDIDATES = (
    *_rivals("cpu", "base", _CPU, tuple(_CHANGES)),
    *_rivals("paper", "tiny", _TINY, tuple(_CHANGES)),
    *_rivals("paper", "small", _SMALL, ("static",)),
    *_rivals("paper", "base", _BASE, ("remat", "static")),
    *_rivals("fleet", "base", _BASE, ("static",)),
)
