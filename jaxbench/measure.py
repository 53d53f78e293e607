"""Timing steps on an attached device. Runs in a worker that loads no other compiler.

Protocol `chain-slope-1`: after warm-up, chains of K steps are run on donated state with one block
at the end; the slope between a short and a long chain is one sample, so that dispatch and other
constant parts cancel. Each candidate runs alone, in a process of its own; candidates are not
interleaved, so drift of the machine between two of them is not cancelled.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxbench.errors import MeasureError

PROTOCOL = "chain-slope-1"
_SHORT = 1
_LONG_CHAIN_S = 0.25
_MIN_SAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """Raw times of one candidate on one device.

    Attributes:
      samples_s: Seconds a step, one slope each, in the order in which they were taken.
      chains: (steps, seconds) of every chain behind them.
      first_step_s: The first call, which allocates and fills caches.
      doubts: What makes the samples questionable, in words.
    """

    samples_s: tuple[float, ...]
    chains: tuple[tuple[int, float], ...]
    first_step_s: float
    final_loss: float
    device: str
    doubts: tuple[str, ...]
    protocol: str = PROTOCOL


def measure_step(
    executable: Callable,
    init: Callable,
    *,
    budget_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Measurement:
    """Times a compiled step on the default device.

    Args:
      executable: `executable(state, batch)` gives (state, loss), or the loss alone for a forward
        pass.
      init: Makes (state, batch) from a key, where the executable expects them.
      budget_s: Seconds to spend on chains; at least five samples are taken however long they last.

    Raises:
      MeasureError: if the loss is not finite.
    """
    import jax

    state, batch = jax.block_until_ready(init(jax.random.key(0)))
    run = _Chain(executable, state, batch, clock)
    first_step_s = run(1)
    run(2)
    step_s = max(run(2) / 2, 1e-9)
    long = _SHORT + max(2, min(256, round(_LONG_CHAIN_S / step_s)))
    samples, chains = [], []
    start = clock()
    while len(samples) < _MIN_SAMPLES or clock() - start < budget_s:
        pair = [(steps, run(steps)) for steps in (_SHORT, long)]
        samples.append((pair[1][1] - pair[0][1]) / (long - _SHORT))
        chains += pair
    return Measurement(
        samples_s=tuple(samples),
        chains=tuple(chains),
        first_step_s=first_step_s,
        final_loss=run.check_loss(),
        device=f"{jax.devices()[0].device_kind}, {platform.machine()}, {os.cpu_count()} cores",
        doubts=_doubts(samples),
    )


class _Chain:
    """Runs chains of steps on one donated state."""

    def __init__(self, executable: Callable, state: Any, batch: Any, clock: Callable[[], float]):
        self.executable, self.state, self.batch, self.clock = executable, state, batch, clock
        self.loss: Any = None

    def __call__(self, steps: int) -> float:
        import jax

        start = self.clock()
        for _ in range(steps):
            out = self.executable(self.state, self.batch)
            if isinstance(out, tuple):
                self.state, self.loss = out
            else:
                self.loss = out
        jax.block_until_ready((self.state, self.loss))
        return self.clock() - start

    def check_loss(self) -> float:
        """Returns the last loss; a network that no longer computes numbers is not to be timed."""
        value = float(self.loss)
        if value != value or value in (float("inf"), float("-inf")):
            raise MeasureError(
                f"Loss is {value} after the timed steps: the step does not train. "
                "Lower the learning rate, or check the loss."
            )
        return value


def _doubts(samples: list[float]) -> tuple[str, ...]:
    ordered = sorted(samples)
    middle = ordered[len(ordered) // 2]
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / middle if middle > 0 else 0.0
    found = []
    if ordered[0] <= 0:
        found.append("a slope is not positive: the step is too short for this clock and load")
    if spread > 0.10:
        found.append(
            f"half of the samples spread over {spread:.0%} of the median: the machine is busy"
        )
    return tuple(found)


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
