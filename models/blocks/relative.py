"""Learnt attention biases by relative position, as T5 has them.

Letters: `B` batch, `T` tokens, `D` model, `N` heads.

Source: Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020, section 2.1.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import constrain
from jaxbench.models.blocks.weights import weight


def position_buckets(
    offset: np.ndarray, *, both: bool, num_buckets: int, max_distance: int
) -> np.ndarray:
    """Gives the row of the bias table for key positions minus query positions.

    Half of the rows are for one distance each; the others grow up to `max_distance`
    logarithmically. Where `both` directions are seen, each has half of the table. Source: the
    published program, `_relative_position_bucket`.
    """
    size = num_buckets // 2 if both else num_buckets
    start = np.where(offset > 0, size, 0) if both else 0
    distance = np.abs(offset) if both else np.maximum(-offset, 0)
    near = size // 2
    growth = np.log(np.maximum(distance, near) / near) / np.log(max_distance / near)
    far = np.minimum(near + (growth * (size - near)).astype(np.int64), size - 1)
    return start + np.where(distance < near, distance, far)


class PositionBias(nnx.Module):
    """A bias for each head and each bucket of relative positions, for tokens among themselves.

    Args:
      both: Whether a query also sees keys after itself.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        both: bool,
        num_buckets: int = 32,
        max_distance: int = 128,
        rngs: nnx.Rngs,
    ) -> None:
        self.both, self.num_buckets, self.max_distance = both, num_buckets, max_distance
        self.table = weight(rngs, (num_buckets, num_heads), (None, "heads"), fan_in=dim)

    @jax.named_scope("position_bias")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "1 N T T"]:
        # Row t holds the biases of offsets -t ... T - 1 - t. They lie one after another in a ring
        # of 2 T places; repeated and cut into rows one shorter, each row starts one place earlier.
        # That is all copies: looking T * T places up in the table would be gathers and scatters.
        T = x.shape[1]
        offset = np.arange(2 * T)
        buckets = position_buckets(
            np.where(offset < T, offset, offset - 2 * T),
            both=self.both,
            num_buckets=self.num_buckets,
            max_distance=self.max_distance,
        )
        ring = self.table[...].astype(x.dtype).T[:, buckets]
        rows = jnp.broadcast_to(ring[:, None], (ring.shape[0], T, 2 * T))
        rows = rows.reshape(-1, 2 * T * T)[:, : T * (2 * T - 1)]
        rows = rows.reshape(-1, T, 2 * T - 1)[..., :T]
        return constrain(rows[None], (None, "heads", None, None))
