"""Attention: rotary positions, the core in three writings, and the layer around it.

Letters: `B` batch, `T` query tokens, `S` key tokens, `D` model, `N` query heads, `K` key heads, `G`
query heads a key head, `H` head.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxbench.candidate import constrain
from jaxbench.models.blocks.weights import constant, spread, weight

AttentionKind = Literal["einsum", "chunked"]
NEVER = -1e30  # a score that softmax turns into zero, finite so that no row gives NaN


def rotate(x: Float[Array, "B T N H"], theta: float = 10_000.0) -> Float[Array, "B T N H"]:
    """Turns pairs (i, i + H/2) by position / theta^(2i/H). Source: Su et al., "RoFormer", 2021."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position = jnp.arange(x.shape[1], dtype=jnp.float32)
    angle = (position[:, None] * frequency[None])[None, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


@jax.named_scope("attend")
def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    *,
    causal: bool = False,
    mask: Bool[Array, "#B #T S"] | None = None,
    bias: Float[Array, "#B N T S"] | None = None,
    scale: float | None = None,
    kind: AttentionKind = "einsum",
    chunk: int = 512,
) -> Float[Array, "B T N H2"]:
    """Computes softmax(scale * query key + bias) value with the softmax in float32.

    `chunked` walks over the keys `chunk` at a time and keeps running maxima and sums, so that the
    scores of one chunk only exist at a time; the same function. Source: Rabe and Staats, 2021.

    Args:
      causal: A query sees keys up to its own position only.
      mask: True where a query may see a key.
      bias: Added to the scores, by query head.
      scale: 1 / sqrt(H) unless given.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    factor = H**-0.5 if scale is None else scale
    grouped = query.reshape(B, T, K, N // K, H)
    allowed = _allowed(causal, mask, T, key.shape[1])
    if bias is not None:
        bias = bias.reshape(bias.shape[0], K, N // K, *bias.shape[2:])
    if kind == "chunked":
        mixed = _chunked(grouped, key, value, allowed, bias, factor, chunk)
    else:
        scores = _scores(grouped, key, allowed, bias, factor)
        weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
        mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value)
    return mixed.reshape(B, T, N, value.shape[-1])


def _allowed(
    causal: bool, mask: Bool[Array, "#B #T S"] | None, T: int, S: int
) -> Bool[Array, "#B 1 1 #T S"] | None:
    allowed = None if mask is None else mask[:, None, None]
    if causal:
        triangle = jnp.tri(T, S, dtype=bool)[None, None, None]
        allowed = triangle if allowed is None else allowed & triangle
    return allowed


def _scores(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    allowed: Bool[Array, "#B 1 1 #T S"] | None,
    bias: Float[Array, "#B K G T S"] | None,
    scale: float,
) -> Float[Array, "B K G T S"]:
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key).astype(jnp.float32) * scale
    if bias is not None:
        scores = scores + bias.astype(jnp.float32)
    return scores if allowed is None else jnp.where(allowed, scores, NEVER)


def _chunked(
    query: Float[Array, "B T K G H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H2"],
    allowed: Bool[Array, "#B 1 1 #T S"] | None,
    bias: Float[Array, "#B K G T S"] | None,
    scale: float,
    chunk: int,
) -> Float[Array, "B T K G H2"]:
    B, T, K, G, _ = query.shape
    S = key.shape[1]
    chunk = min(chunk, S)
    if S % chunk:
        raise ValueError(f"{S} keys do not divide into chunks of {chunk}.")

    def parts(x: Array, axis: int) -> Array:
        """Splits an axis over the keys and puts the chunks first."""
        shape = (*x.shape[:axis], S // chunk, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x.reshape(shape), axis, 0)

    @jax.checkpoint
    def visit(carry: tuple, part: dict[str, Array]) -> tuple[tuple, None]:
        top, total, mixed = carry
        scores = _scores(query, part["key"], part.get("allowed"), part.get("bias"), scale)
        new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - new_top[..., None])
        shrink = jnp.exp(top - new_top)
        total = total * shrink + jnp.sum(weights, axis=-1)
        more = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(query.dtype), part["value"])
        return (new_top, total, mixed * shrink[..., None] + more.astype(jnp.float32)), None

    chunks = {"key": parts(key, 1), "value": parts(value, 1)}
    if allowed is not None:
        chunks["allowed"] = parts(allowed, 4)
    if bias is not None:
        chunks["bias"] = parts(bias, 4)
    start = (
        jnp.full((B, K, G, T), NEVER, jnp.float32),
        jnp.zeros((B, K, G, T), jnp.float32),
        jnp.zeros((B, K, G, T, value.shape[-1]), jnp.float32),
    )
    (_, total, mixed), _ = jax.lax.scan(visit, start, chunks)
    return jnp.moveaxis(mixed / total[..., None], 3, 1).astype(query.dtype)


class Attention(nnx.Module):
    """Self or cross attention with its four projections; grouped where `num_kv_heads` is smaller.

    Args:
      dim: Width of the queries' tokens and of the result.
      source_dim: Width of the keys' tokens, `dim` unless given.
      head_dim: Width of a head, `dim / num_heads` unless given.
      theta: Base of the rotary positions; none without it.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        source_dim: int | None = None,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
        causal: bool = False,
        theta: float | None = None,
        kind: AttentionKind = "einsum",
        rngs: nnx.Rngs,
    ) -> None:
        N, K = num_heads, num_kv_heads or num_heads
        H, S = head_dim or dim // num_heads, source_dim or dim
        if N % K:
            raise ValueError(f"num_heads={N} is not divisible by num_kv_heads={K}.")
        self.causal, self.theta = causal, theta
        self.kind: AttentionKind = kind
        self.query = weight(rngs, (dim, N, H), ("embed", "heads", None), fan_in=dim)
        self.key = weight(rngs, (S, K, H), ("embed", "kv_heads", None), fan_in=S)
        self.value = weight(rngs, (S, K, H), ("embed", "kv_heads", None), fan_in=S)
        self.out = weight(rngs, (N, H, dim), ("heads", None, "embed"), fan_in=N * H)
        rows = (((N, H), "heads"), ((K, H), "kv_heads"), ((K, H), "kv_heads"))
        biases = [constant(row, (axis, None), 0.0) for row, axis in rows]
        self.biases = nnx.List(biases) if bias else None
        self.out_bias = constant((dim,), (None,), 0.0) if bias else None

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S _"] | None = None,
        *,
        mask: Bool[Array, "#B #T S"] | None = None,
        bias: Float[Array, "#B N T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        source = x if source is None else source
        projections = ((x, self.query), (source, self.key), (source, self.value))
        heads = [
            jnp.einsum("BTD,DNH->BTNH", tokens, kernel[...].astype(x.dtype))
            for tokens, kernel in projections
        ]
        if self.biases is not None:
            heads = [
                head + row[...].astype(x.dtype)[None, None]
                for head, row in zip(heads, self.biases, strict=True)
            ]
        # Without these the partitioner may do all of attention on every device.
        query, key, value = (
            constrain(head, ("batch", None, name, None))
            for head, name in zip(heads, ("heads", "kv_heads", "kv_heads"), strict=True)
        )
        if self.theta is not None:
            query, key = rotate(query, self.theta), rotate(key, self.theta)
        mixed = attend(query, key, value, causal=self.causal, mask=mask, bias=bias, kind=self.kind)
        y = jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))
        return y if self.out_bias is None else y + spread(self.out_bias[...], y)


def cudnn_takes(key: Float[Array, "B S K H"], value: Float[Array, "B S K H2"]) -> bool:
    """Returns whether cuDNN's attention takes such heads, on a mesh whose devices are known.

    JAX partitions the call by a rule of its own, which needs devices when it is lowered.
    """
    H = key.shape[-1]
    from jax._src.mesh import get_abstract_mesh, get_concrete_mesh

    is_abstract = get_concrete_mesh().empty and not get_abstract_mesh().empty
    narrow = key.dtype.itemsize == 2 and value.shape[-1] == H <= 128 and H % 8 == 0
    return narrow and not is_abstract
