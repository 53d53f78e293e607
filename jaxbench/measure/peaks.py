"""What this machine's CPU can do: measured, for no table has it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def measure_peaks() -> dict[str, float]:
    """Measures this machine's CPU: product FLOP/s by dtype and copy bytes/s, best of several.

    Products are 1024^3; the copy reads and writes 128 MiB.
    """
    import jax
    import jax.numpy as jnp

    def best_s(function: Callable, *arguments: Any) -> float:
        compiled = jax.jit(function).lower(*arguments).compile()
        times = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - start)
        return min(times)

    size = 1024
    peaks = {
        dtype: 2 * size**3 / best_s(jnp.matmul, *(jnp.ones((size, size), dtype),) * 2)
        for dtype in ("float32", "bfloat16")
    }
    buffer = jnp.ones(2**25, jnp.float32)
    return {**peaks, "bytes_per_s": 2 * buffer.nbytes / best_s(lambda x: x + 1.0, buffer)}
