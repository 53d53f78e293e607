"""Heads on a bird's-eye map: objects, lanes as tokens, occupancy, the way ahead.

Letters: `B` batch, `X` `Y` the map's edges, `Z` levels, `S` the map's cells as tokens, `D` model,
`K` classes, `L` lane tokens, `V` vocabulary, `P` waypoints, `M` numbers of the ego motion.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import constrain
from jaxbench.models.blocks.attention import Attention
from jaxbench.models.blocks.convolution import ConvNorm
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.positions import waves
from jaxbench.models.blocks.stack import Remat, Stack
from jaxbench.models.blocks.weights import Linear, weight

BOX_NUMBERS = 8  # offset in two dims, height above ground, three sizes, sine and cosine of the yaw
TIME_WAVES = 8


class DetectionHead(nnx.Module):
    """Logits of object centres by class, and a box at every cell, as CenterPoint has them.

    Source: Yin et al., "CenterPoint", CVPR 2021.
    """

    def __init__(self, dim: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        self.shared = ConvNorm(dim, dim, kernel=(3, 3), norm="group", rngs=rngs)
        self.heat = Linear(dim, num_classes, ("conv_in", None), rngs=rngs)
        self.box = Linear(dim, BOX_NUMBERS, ("conv_in", None), rngs=rngs)

    @jax.named_scope("detection")
    def __call__(
        self, x: Float[Array, "B X Y D"]
    ) -> tuple[Float[Array, "B X Y K"], Float[Array, "B X Y _"]]:
        x = self.shared(x)
        return self.heat(x), self.box(x)


class OccupancyHead(nnx.Module):
    """A logit for every level above every cell: the height is in the channels."""

    def __init__(self, dim: int, num_levels: int, *, rngs: nnx.Rngs) -> None:
        self.shared = ConvNorm(dim, dim, kernel=(3, 3), norm="group", rngs=rngs)
        self.levels = Linear(dim, num_levels, ("conv_in", None), rngs=rngs)

    @jax.named_scope("levels")
    def __call__(self, x: Float[Array, "B X Y D"]) -> Float[Array, "B X Y Z"]:
        return self.levels(self.shared(x))


class LaneLayer(nnx.Module):
    """Causal self-attention over the tokens, attention to the map, feed-forward."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, *, rngs: nnx.Rngs) -> None:
        self.self_norm, self.map_norm, self.mlp_norm = (LayerNorm(dim) for _ in range(3))
        self.self_attention = Attention(dim, num_heads, causal=True, theta=10_000.0, rngs=rngs)
        self.map_attention = Attention(dim, num_heads, rngs=rngs)
        self.mlp = FeedForward(dim, mlp_dim, rngs=rngs)

    @jax.named_scope("lane_layer")
    def __call__(
        self, x: Float[Array, "B L D"], cells: Float[Array, "B S D"]
    ) -> Float[Array, "B L D"]:
        x = x + self.self_attention(self.self_norm(x))
        x = x + self.map_attention(self.map_norm(x), cells)
        return x + self.mlp(self.mlp_norm(x))


class LaneHead(nnx.Module):
    """Autoregressive decoder of lane tokens over the map's cells, with a tied table."""

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        *,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        remat: Remat,
        rngs: nnx.Rngs,
    ) -> None:
        def make(rngs: nnx.Rngs) -> LaneLayer:
            return LaneLayer(dim, num_heads, mlp_dim, rngs=rngs)

        self.table = weight(rngs, (vocab_size, dim), ("vocab", "embed"), fan_in=dim)
        self.stack = Stack(make, num_layers, remat=remat, rngs=rngs)
        self.norm = LayerNorm(dim)

    @jax.named_scope("lanes")
    def __call__(
        self, tokens: Int[Array, "B L"], cells: Float[Array, "B S D"]
    ) -> Float[Array, "B L V"]:
        table = self.table[...].astype(cells.dtype)
        x = constrain(table[tokens], ("batch", None, None))
        return jnp.einsum("BLD,VD->BLV", self.norm(self.stack(x, cells)), table)


class WaypointHead(nnx.Module):
    """One query for each instant ahead, of its time and the ego motion, attends to the map."""

    def __init__(
        self, dim: int, num_motion: int, *, num_heads: int, mlp_dim: int, rngs: nnx.Rngs
    ) -> None:
        self.time = Linear(2 * TIME_WAVES, dim, (None, "embed"), rngs=rngs)
        self.motion = Linear(num_motion, dim, (None, "embed"), bias=False, rngs=rngs)
        self.attention = Attention(dim, num_heads, rngs=rngs)
        self.norm = LayerNorm(dim)
        self.mlp = FeedForward(dim, mlp_dim, rngs=rngs)
        self.out = Linear(dim, 2, ("embed", None), rngs=rngs)

    @jax.named_scope("waypoints")
    def __call__(
        self, motion: Float[Array, "B M"], cells: Float[Array, "B S D"], num_waypoints: int
    ) -> Float[Array, "B P 2"]:
        instants = (np.arange(num_waypoints, dtype=np.float32)[:, None] + 1) / num_waypoints
        time = self.time(waves(instants, num_waves=TIME_WAVES).astype(cells.dtype))
        x = time[None] + self.motion(motion)[:, None]
        x = x + self.attention(x, cells)
        return self.out(x + self.mlp(self.norm(x)))
