"""Executables for the attached device, handed from the worker that compiles to the one that times.

Compiling beside other compilers is cheap; timing has to be alone. Kept in the cache, so that timing
again compiles nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from jaxbench import cache
from jaxbench.compiler import QUICK_CODE
from jaxbench.target import Target


def compile_init(init: Callable, target: Target, shardings: Any = None) -> Any:
    """Compiles `init(key)`, which makes a program's state and batch, fast rather than well.

    It runs once.

    Args:
      shardings: Where state and batch shall lie.
    """
    import jax

    jitted = jax.jit(init, out_shardings=shardings)
    options = QUICK_CODE if target.kind == "cpu" else None
    return jitted.lower(jax.random.key(0)).compile(compiler_options=options)


def keep_executables(key: str, *executables: Any) -> bool:
    """Stores executables for `load_executables`; returns whether they can be stored at all.

    A program that calls back into Python cannot: the function lives in this process.
    """
    from jax.experimental.serialize_executable import serialize

    try:
        payload = pickle.dumps([serialize(executable) for executable in executables])
    except (AttributeError, TypeError, ValueError, pickle.PicklingError):
        return False
    cache.write_entry("executables", key, payload)
    return True


def load_executables(key: str, devices: Sequence[Any]) -> list[Any] | None:
    """Loads what `keep_executables` stored to run on `devices`, as many as it was compiled for.

    Returns None where nothing usable is stored.
    """
    from jax.experimental.serialize_executable import deserialize_and_load

    payload = cache.read_entry("executables", key)
    if payload is None:
        return None
    return [
        deserialize_and_load(*parts, execution_devices=devices) for parts in pickle.loads(payload)
    ]


def has_executables(key: str) -> bool:
    """Tells whether `load_executables` will find something."""
    return cache.read_entry("executables", key) is not None
