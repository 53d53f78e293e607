"""What the fork server imports once for all workers. Starts no backend and no thread."""

import flax.nnx
import jax
import jax.experimental.topologies
import optax

__all__ = ["flax", "jax", "optax"]
