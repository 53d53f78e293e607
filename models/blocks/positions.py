"""Where things are, as features: sines and cosines of coordinates at doubling frequencies."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def waves(position: Float[np.ndarray, "*dims P"], *, num_waves: int) -> Float[Array, "*dims F"]:
    """Computes sin and cos of pi 2^k position, k below `num_waves`; 2 P num_waves features.

    Source: Mildenhall et al., "NeRF", ECCV 2020, for coordinates between -1 and 1.
    """
    frequency = math.pi * 2.0 ** np.arange(num_waves, dtype=np.float32)
    coordinates = jnp.asarray(position, jnp.float32)[..., None]
    angle = coordinates * jnp.asarray(frequency).reshape((1,) * position.ndim + (num_waves,))
    features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    return features.reshape(*position.shape[:-1], -1)
