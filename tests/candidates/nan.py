"""A network whose loss is the logarithm of something negative."""

import jax
import jax.numpy as jnp
from flax import nnx
from parts import candidate, loss


def _bad_loss(module: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.log(-1.0 - loss(module, batch))


CANDIDATES = (candidate("nan-cpu-log", loss=_bad_loss),)
