"""What the fork server imports once for all workers. Starts no backend and no thread."""

import importlib
import os

_MODULES = ("jax", "jax.experimental.topologies", "flax.nnx", "optax")


def _import_quietly() -> None:
    """Imports with stderr closed: JAX 0.10 lets the CUDA plug-in complain that there is no GPU."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        for name in _MODULES:
            importlib.import_module(name)
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


_import_quietly()
