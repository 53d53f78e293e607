"""Detection by queries: attention with positions, embedded boxes, head, matching and set loss.

A box is ten numbers in [0, 1): centre (x, y, z) over the observed range, three sizes, sine and
cosine of the yaw, two velocities, each scaled to its range. A batch holds boxes as whole codes.

Letters: `B` batch, `T` query tokens, `S` key tokens, `D` model, `N` heads, `K` key heads or
classes, `H` head, `Q` queries, `M` objects of a sample.

Sources: Carion et al., "DETR", ECCV 2020; Wang et al., "DETR3D", CoRL 2021 (box, weights of the
loss); Zhu et al., "Deformable DETR", ICLR 2021 (focal loss, prior).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import constrain
from jaxbench.models.blocks.attention import AttentionKind, attend
from jaxbench.models.blocks.losses import absolute_error, focal
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.weights import Linear, constant, weight

BOX = 10
CODES = 1024  # codes of a box's number are whole, from 0 to below this
PRIOR = 0.01  # probability of a class that the head starts with
CLASS_WEIGHT, BOX_WEIGHT = 2.0, 0.25
NUM_CHUNKS = 8  # of the keys, where attention is chunked

Matching = Literal["greedy", "fixed"]


def decode_boxes(codes: Int[Array, "B M 10"]) -> Float[Array, "B M 10"]:
    """Turns whole codes into numbers in (0, 1), in float32."""
    return (codes.astype(jnp.float32) + 0.5) / CODES


def unsigmoid(x: Float[Array, "*dims"]) -> Float[Array, "*dims"]:
    """Computes log(x / (1 - x)), with x kept 1e-4 away from 0 and 1."""
    x = jnp.clip(x, 1e-4, 1 - 1e-4)
    return jnp.log(x) - jnp.log1p(-x)


def embed_sines(points: Float[Array, "*dims 3"], dim: int) -> Float[Array, "*dims D"]:
    """Gives each coordinate `dim` sines and cosines of 2 pi x / 10000^(2i/dim), in float32."""
    frequency = 2 * math.pi * 10_000.0 ** (-2 / dim * jnp.arange(dim // 2, dtype=jnp.float32))
    ones = (1,) * points.ndim
    angle = points.astype(jnp.float32)[..., None] * frequency.reshape(*ones, -1)
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return waves.reshape(*points.shape[:-1], 3 * dim)


class Mlp(nnx.Module):
    """Two linear layers with ReLU between; the result has `dim` numbers."""

    def __init__(self, num_in: int, hidden: int, dim: int, *, rngs: nnx.Rngs) -> None:
        self.first = Linear(num_in, hidden, (None, "mlp"), rngs=rngs)
        self.second = Linear(hidden, dim, ("mlp", "embed"), rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims D"]:
        return self.second(nnx.relu(self.first(x)))


class QueryAttention(nnx.Module):
    """Attention whose keys carry positions that its values do not; projections without bias."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int,
        num_kv_heads: int | None = None,
        kind: AttentionKind = "einsum",
        rngs: nnx.Rngs,
    ) -> None:
        N, K, H = num_heads, num_kv_heads or num_heads, head_dim
        self.kind: AttentionKind = kind
        # One key head is on every device.
        self.kv_axis = None if K == 1 else "kv_heads"
        self.query = weight(rngs, (dim, N, H), ("embed", "heads", None), fan_in=dim)
        self.key = weight(rngs, (dim, K, H), ("embed", self.kv_axis, None), fan_in=dim)
        self.value = weight(rngs, (dim, K, H), ("embed", self.kv_axis, None), fan_in=dim)
        self.out = weight(rngs, (N, H, dim), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("attention")
    def __call__(
        self,
        queries: Float[Array, "B T D"],
        keys: Float[Array, "B S D"],
        values: Float[Array, "B S D"],
    ) -> Float[Array, "B T D"]:
        pairs = (
            (queries, self.query, "heads"),
            (keys, self.key, self.kv_axis),
            (values, self.value, self.kv_axis),
        )
        query, key, value = (
            constrain(
                jnp.einsum("BTD,DNH->BTNH", tokens, kernel[...].astype(tokens.dtype)),
                ("batch", None, axis, None),
            )
            for tokens, kernel, axis in pairs
        )
        chunk = key.shape[1] // NUM_CHUNKS
        mixed = attend(query, key, value, kind=self.kind, chunk=chunk)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(queries.dtype))


class SetHead(nnx.Module):
    """Logits of independent classes and a box around a reference point, for every query."""

    def __init__(self, dim: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        square = ("embed", None)
        self.class_hidden = nnx.List([Linear(dim, dim, square, rngs=rngs) for _ in range(2)])
        self.class_norms = nnx.List([LayerNorm(dim) for _ in range(2)])
        self.class_out = Linear(dim, num_classes, square, bias=False, rngs=rngs)
        self.prior = constant((num_classes,), (None,), math.log(PRIOR / (1 - PRIOR)))
        self.box_hidden = nnx.List([Linear(dim, dim, square, rngs=rngs) for _ in range(2)])
        self.box_out = Linear(dim, BOX, square, rngs=rngs)

    @jax.named_scope("set_head")
    def __call__(
        self, x: Float[Array, "B Q D"], reference: Float[Array, "B Q 3"]
    ) -> tuple[Float[Array, "B Q K"], Float[Array, "B Q 10"]]:
        y = x
        for linear, norm in zip(self.class_hidden, self.class_norms, strict=True):
            y = nnx.relu(norm(linear(y)))
        logits = self.class_out(y).astype(jnp.float32) + self.prior[...][None, None]
        y = x
        for linear in self.box_hidden:
            y = nnx.relu(linear(y))
        box = self.box_out(y).astype(jnp.float32)
        centre = jax.nn.sigmoid(box[..., :3] + unsigmoid(reference.astype(jnp.float32)))
        return logits, jnp.concatenate([centre, box[..., 3:]], axis=-1)


def match_greedily(cost: Float[Array, "B Q M"]) -> Int[Array, "B M"]:
    """Gives each object, in the labels' order, the cheapest query that no earlier one has.

    Unlike Hungarian matching it is not the cheapest assignment, but it stays on the device.
    """
    num_queries = cost.shape[1]

    def take(free: Array, column: Array) -> tuple[Array, Array]:
        chosen = jnp.argmin(jnp.where(free, column, jnp.inf), axis=-1)
        return free & (jnp.arange(num_queries)[None] != chosen[:, None]), chosen

    free = jnp.ones(cost.shape[:2], bool)
    return jnp.moveaxis(jax.lax.scan(take, free, jnp.moveaxis(cost, 2, 0))[1], 0, 1)


def match(
    logits: Float[Array, "B Q K"],
    boxes: Float[Array, "B Q 10"],
    classes: Int[Array, "B M"],
    wanted: Float[Array, "B M 10"],
    matching: Matching,
) -> Int[Array, "B M"]:
    """Gives each object its query: by cost, or always the same one, evenly spaced."""
    (B, Q, _), M = logits.shape, classes.shape[1]
    if matching == "fixed":
        return jnp.broadcast_to(jnp.arange(M)[None] * (Q // M), (B, M))
    chance = jnp.take_along_axis(jax.nn.sigmoid(logits), classes[:, None, :], axis=2)
    distance = jnp.sum(jnp.abs(boxes[:, :, None] - wanted[:, None]), axis=-1)
    return match_greedily(jax.lax.stop_gradient(BOX_WEIGHT * distance - CLASS_WEIGHT * chance))


@jax.named_scope("set_loss")
def set_loss(
    logits: Float[Array, "B Q K"],
    boxes: Float[Array, "B Q 10"],
    classes: Int[Array, "B M"],
    codes: Int[Array, "B M 10"],
    *,
    matching: Matching = "greedy",
) -> Float[Array, ""]:
    """Focal loss of every query's classes and L1 of the matched boxes, both over the objects."""
    (_, Q, K), M = logits.shape, classes.shape[1]
    wanted = decode_boxes(codes)
    chosen = match(logits, boxes, classes, wanted, matching)
    hits = jax.vmap(lambda q, k: jnp.zeros((Q, K), jnp.float32).at[q, k].set(1.0))(chosen, classes)
    found = jnp.take_along_axis(boxes, chosen[..., None], axis=1)
    per_object = Q * K / M
    return CLASS_WEIGHT * per_object * focal(logits, hits) + BOX_WEIGHT * BOX * absolute_error(
        found, wanted
    )
