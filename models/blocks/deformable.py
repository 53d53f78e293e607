"""Deformable attention: weighted bilinear samples of a map, in two writings.

Letters: `B` batch, `Q` queries, `D` model, `A` heads, `P` samples of a head, `H` `W` rows and
columns of the sampled map, `S` its cells, `C` channels.

Source: Zhu et al., "Deformable DETR", ICLR 2021.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.models.blocks.weights import Linear

# Four neighbours are gathered; or hat functions of all rows and of all columns are multiplied into
# every cell's share, and the shares with the map. One function.
Sampling = Literal["gather", "product"]


@jax.named_scope("sample")
def sample_by_gather(
    values: Float[Array, "B A S C"],
    size: tuple[int, int],
    points: Float[Array, "B A Q P 2"],
    weights: Float[Array, "B A Q P"],
) -> Float[Array, "B A Q C"]:
    """Sums bilinear samples of a map of `size` rows and columns, zero outside, with weights.

    Points are column and row in pixels; the middle of the first pixel is (0, 0).
    """
    H, W = size
    low = jnp.floor(points)
    part = points - low
    indices, shares = [], []
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = low[..., 0] + right, low[..., 1] + down
        across = part[..., 0] if right else 1 - part[..., 0]
        along = part[..., 1] if down else 1 - part[..., 1]
        inside = (column >= 0) & (column < W) & (row >= 0) & (row < H)
        shares.append(jnp.where(inside, across * along * weights, 0.0))
        indices.append(jnp.where(inside, row * W + column, 0.0).astype(jnp.int32))
    index, share = jnp.concatenate(indices, axis=-1), jnp.concatenate(shares, axis=-1)
    take = jax.vmap(jax.vmap(lambda v, i: v.at[i].get(mode="promise_in_bounds")))
    found = take(values, index)
    return jnp.sum(found.astype(jnp.float32) * share[..., None], axis=-2).astype(values.dtype)


@jax.named_scope("sample")
def sample_by_product(
    values: Float[Array, "B A S C"],
    size: tuple[int, int],
    points: Float[Array, "B A Q P 2"],
    weights: Float[Array, "B A Q P"],
) -> Float[Array, "B A Q C"]:
    """Computes `sample_by_gather`: a pixel's share is the product of two hats around the point."""
    columns, rows = (
        jnp.maximum(0.0, 1 - jnp.abs(points[..., axis, None] - _count(edge, 5)))
        for axis, edge in ((0, size[1]), (1, size[0]))
    )
    rows = (rows * weights[..., None]).astype(values.dtype)
    shares = jnp.einsum("BAQPH,BAQPW->BAQHW", rows, columns.astype(values.dtype))
    return jnp.einsum("BAQS,BASC->BAQC", shares.reshape(*shares.shape[:3], -1), values)


SAMPLERS = {"gather": sample_by_gather, "product": sample_by_product}


def _count(edge: int, rank: int) -> Float[Array, "..."]:
    return jnp.arange(edge, dtype=jnp.float32).reshape((1,) * (rank - 1) + (edge,))


class Deformable(nnx.Module):
    """Weighted samples of a map at offsets, both made from the query. Source: Zhu et al., 2021.

    Args:
      dim: Width of the result, a whole number of heads.
      query_dim: Width of what offsets and weights are made from, `dim` unless given.
      source_dim: Width of the map, `dim` unless given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_samples: int,
        *,
        query_dim: int | None = None,
        source_dim: int | None = None,
        sampling: Sampling = "gather",
        rngs: nnx.Rngs,
    ) -> None:
        D, A, P = dim, num_heads, num_samples
        query_dim, source_dim = query_dim or dim, source_dim or dim
        self.num_heads, self.sampling = A, sampling
        self.offset = Linear(query_dim, A * P * 2, ("embed", None), rngs=rngs)
        self.weigh = Linear(query_dim, A * P, ("embed", None), rngs=rngs)
        self.value = Linear(source_dim, D, (None, "embed"), rngs=rngs)
        self.out = Linear(D, D, ("embed", None), rngs=rngs)

    @jax.named_scope("plan")
    def plan(
        self, x: Float[Array, "B Q _"]
    ) -> tuple[Float[Array, "B A Q P 2"], Float[Array, "B A Q P"]]:
        """Returns offsets in pixels (column, row) and weights, in float32."""
        B, Q, _ = x.shape
        offsets = self.offset(x).astype(jnp.float32).reshape(B, Q, self.num_heads, -1, 2)
        weights = self.weigh(x).astype(jnp.float32).reshape(B, Q, self.num_heads, -1)
        return jnp.moveaxis(offsets, 2, 1), jnp.moveaxis(jax.nn.softmax(weights), 2, 1)

    @jax.named_scope("collect")
    def collect(
        self,
        source: Float[Array, "B H W _"],
        points: Float[Array, "B A Q P 2"],
        weights: Float[Array, "B A Q P"],
    ) -> Float[Array, "B Q D"]:
        """Returns the samples of all heads, side by side."""
        B, H, W, _ = source.shape
        values = self.value(source).reshape(B, H * W, self.num_heads, -1)
        sample = SAMPLERS[self.sampling]
        found = sample(jnp.moveaxis(values, 2, 1), (H, W), points, weights)
        return jnp.moveaxis(found, 1, 2).reshape(B, points.shape[2], -1)

    @jax.named_scope("deformable")
    def __call__(
        self,
        x: Float[Array, "B Q _"],
        source: Float[Array, "B H W _"],
        reference: Float[Array, "#B Q 2"],
    ) -> Float[Array, "B Q D"]:
        offsets, weights = self.plan(x)
        return self.out(self.collect(source, reference[:, None, :, None] + offsets, weights))
