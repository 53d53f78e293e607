"""A compiled step on the attached device, run in chains. Lives in a worker of its own.

A chain is a number of steps on donated state with one block at its end. What surrounds the clock
readings is kept with them: when the host had sent everything off, how long the process computed,
which pages it touched.
"""

from __future__ import annotations

import hashlib
import os
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from jaxbench.errors import MeasureError

# A float32 product of this size takes a core, or an accelerator, about a millisecond.
_YARDSTICK_SIZE, _ACCELERATOR_SIZE = 384, 6144
_YARDSTICK_TURNS = 3
_HASHED = bytes(2**18)
_POOL = "tf_XLAEigen"


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What one chain took.

    Attributes:
      seconds: From before the first step until everything is done.
      dispatch_s: From before the first step until the last one was handed to the device.
      calendar_s: The same as `seconds` by the calendar's clock, which can be set.
      cpu_s: Processor seconds of the process, all its threads.
      page_faults: Pages that the process touched for the first time.
      page_loads: Pages that had to be read from disk.
      resident_bytes: Of the process, after it.
      copy: Which of the candidate's processes it was.
    """

    steps: int
    seconds: float
    dispatch_s: float
    calendar_s: float
    cpu_s: float
    page_faults: int
    page_loads: int
    resident_bytes: int
    copy: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A look at the machine: seconds of a fixed product on the device, and of a fixed hash.

    The hash counts processor seconds: it tells the clock even where others compute beside it.
    """

    yardstick_s: float
    hash_cpu_s: float


class Stepper:
    """Holds an executable and its state.

    Args:
      executable: `executable(state, batch)` gives (state, loss), or the loss alone for a forward
        pass.
      init: Makes (state, batch) from a key, where the executable expects them.
      peak_bytes: Of device memory that a step takes, by the compiler.
    """

    def __init__(
        self,
        executable: Callable,
        init: Callable,
        *,
        clock: Callable[[], float] = time.perf_counter,
        seed: int = 0,
        peak_bytes: int = 0,
    ) -> None:
        import jax

        self._executable, self._clock = executable, clock
        self._state, self._batch = jax.block_until_ready(init(jax.random.key(seed)))
        self._loss: Any = None
        self._yardstick: Any = None
        self._process = psutil.Process()
        self._pinned: int | None = None
        self._peak_bytes = peak_bytes

    def about(self) -> dict[str, Any]:
        """Describes the device."""
        import jax

        device = jax.devices()[0]
        return {
            "device": device.device_kind,
            "platform": device.platform,
            "pinned_threads": self._pinned or 0,
            "peak_bytes": self._peak_bytes,
            "memory_bytes": (device.memory_stats() or {}).get("bytes_limit", 0),
        }

    def chain(self, *, steps: int, extra_share: float = 0.0) -> Chain:
        """Runs a chain of steps.

        Args:
          extra_share: Keeps the host busy at the end for this share of the chain's own time: a
            slow-down of known size.

        Raises:
          MeasureError: if the loss is not finite afterwards.
        """
        import jax

        usage, cpu_s = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
        calendar, start = time.time(), self._clock()
        for _ in range(steps):
            out = self._executable(self._state, self._batch)
            if isinstance(out, tuple):
                self._state, self._loss = out
            else:
                self._loss = out
        dispatched = self._clock()
        jax.block_until_ready((self._state, self._loss))
        end = self._clock()
        if extra_share:
            until = end + (end - start) * extra_share
            while end < until:
                end = self._clock()
        calendar_s = time.time() - calendar
        cpu_s, after = time.process_time() - cpu_s, resource.getrusage(resource.RUSAGE_SELF)
        self._check_loss()
        if self._pinned is None:
            self._pinned = _pin_threads()
        return Chain(
            steps=steps,
            seconds=end - start,
            dispatch_s=dispatched - start,
            calendar_s=calendar_s,
            cpu_s=cpu_s,
            page_faults=after.ru_minflt - usage.ru_minflt,
            page_loads=after.ru_majflt - usage.ru_majflt,
            resident_bytes=self._process.memory_info().rss,
        )

    def _check_loss(self) -> float:
        """Returns the last loss; a network that no longer computes numbers is not to be timed."""
        value = float(self._loss)
        if value != value or value in (float("inf"), float("-inf")):
            raise MeasureError(
                f"Loss is {value} after the timed steps: the step does not train. "
                "Lower the learning rate, or check the loss."
            )
        return value

    def final_loss(self) -> float:
        """Returns the loss of the last step."""
        return self._check_loss()

    def probe(self) -> Probe:
        """Times a fixed product on the device and a fixed hash on one core."""
        import jax
        import jax.numpy as jnp

        if self._yardstick is None:
            on_cpu = jax.devices()[0].platform == "cpu"
            size = _YARDSTICK_SIZE if on_cpu else _ACCELERATOR_SIZE
            ones = jnp.ones((size, size), jnp.float32)
            self._yardstick = jax.jit(jnp.matmul).lower(ones, ones).compile(), ones
            jax.block_until_ready(self._yardstick[0](ones, ones))
        product, ones = self._yardstick
        seconds = []
        for _ in range(_YARDSTICK_TURNS):
            start = time.perf_counter()
            jax.block_until_ready(product(ones, ones))
            seconds.append(time.perf_counter() - start)
        cpu_s = time.thread_time()
        hashlib.sha256(_HASHED).digest()
        return Probe(yardstick_s=statistics.median(seconds), hash_cpu_s=time.thread_time() - cpu_s)

    def device_memory(self) -> dict[str, int]:
        """Returns what the device's allocator says of itself; nothing where it keeps no account."""
        import jax

        return {
            name: value
            for name, value in (jax.devices()[0].memory_stats() or {}).items()
            if isinstance(value, int)
        }


def _pin_threads() -> int:
    """Gives each thread of XLA's pool a core of its own, and returns how many there are.

    The pool has a thread a core. Where the scheduler puts two of them on one core a step takes up
    to twice as long, for seconds, without any other load: noise that is not the program's. Nothing
    is pinned where threads and cores do not match, or the system does not tell.
    """
    tasks = Path("/proc/self/task")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    pool = [
        int(task.name)
        for task in (tasks.iterdir() if tasks.exists() else ())
        if (task / "comm").read_text().startswith(_POOL)
    ]
    if len(pool) != len(cores):
        return 0
    for thread, core in zip(sorted(pool), cores, strict=True):
        os.sched_setaffinity(thread, {core})
    return len(pool)
