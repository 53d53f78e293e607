"""What a real step did, op by op: the profiler's trace of a few steps, recorded and read.

The raw file stays, where XProf opens it.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.cache import storage_errors
from jaxbench.errors import MeasureError, UsageError
from jaxbench.trace.attribution import OpEvent, attribute
from jaxbench.trace.planes import read_planes

_NS = 1e-9
_SETTLE_S = 0.02  # the last `end:` events come when the result is already there


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredOp:
    """One op over all steps.

    Attributes:
      num_executions: In one step of one device; the median, for branches differ.
      samples_s: In each step; of all CPU devices of a host together, for they share its cores.
    """

    name: str
    num_executions: float
    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        """Median over the steps: what disturbed single steps is not in it."""
        return statistics.median(self.samples_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredStep:
    """The ops of a step, with the time that each of them owns.

    Medians of parts do not add up to the median of their sum. So all seconds here are means over
    the typical steps, the half of them that lies in the middle, and ops and what is between them
    add up to the step.

    Attributes:
      module: The program's name.
      platform: `CPU`, `GPU` or `TPU`.
      ops: In the order of their first execution. Their samples add up to the time in which any op
        ran.
      step_samples_s: From each step's first op to that of the next one; the last, to its end.
      num_dropped: Steps seen and left out: the first, unless it was the only one.
    """

    module: str
    platform: str
    ops: tuple[MeasuredOp, ...]
    step_samples_s: tuple[float, ...]
    num_dropped: int

    @property
    def num_steps(self) -> int:
        """Steps that the samples are of."""
        return len(self.step_samples_s)

    @property
    def typical(self) -> tuple[int, ...]:
        """Places of the steps that take neither of the shortest nor of the longest quarter."""
        order = sorted(range(self.num_steps), key=lambda place: self.step_samples_s[place])
        cut = self.num_steps // 4
        return tuple(sorted(order[cut : self.num_steps - cut]))

    @property
    def step_s(self) -> float:
        """Seconds of a step."""
        return self._mean(self.step_samples_s)

    @property
    def busy_s(self) -> float:
        """Seconds of a step in which any op ran."""
        return math.fsum(self.op_s.values())

    @property
    def between_s(self) -> float:
        """Seconds of a step in which none did: dispatch and the executor's own work."""
        return self.step_s - self.busy_s

    @property
    def op_s(self) -> dict[str, float]:
        """Seconds of a step that each op owns."""
        return {op.name: self._mean(op.samples_s) for op in self.ops}

    def _mean(self, samples_s: Sequence[float]) -> float:
        places = self.typical
        return math.fsum(samples_s[place] for place in places) / len(places)


def record_trace(run_steps: Callable[[int], object], num_steps: int, logdir: Path) -> Path:
    """Profiles `run_steps(num_steps)`, which runs so many steps and waits for them.

    The tracer of Python is off, for it slows the step; so run the steps once before.

    Returns:
      The raw trace, `logdir/plugins/profile/TIME/HOST.xplane.pb`; give `logdir` to XProf.

    Raises:
      MeasureError: if the profiler is taken, or wrote no trace.
      StorageError: if `logdir` cannot be written.
    """
    import jax

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1  # thunks and their tasks are of this level
    with storage_errors(logdir):
        logdir.mkdir(parents=True, exist_ok=True)
    before = set(_traces(logdir))
    try:
        jax.profiler.start_trace(logdir, profiler_options=options)
    except RuntimeError as error:
        raise MeasureError(
            f"The profiler does not start: {error} Run one profile at a time."
        ) from error
    try:
        run_steps(num_steps)
        time.sleep(_SETTLE_S)
    finally:
        jax.profiler.stop_trace()
    made = sorted(set(_traces(logdir)) - before)
    if not made:
        raise MeasureError(f"The profiler wrote no trace below {logdir}. Give a folder of its own.")
    return made[-1]


def _traces(logdir: Path) -> Iterable[Path]:
    return logdir.glob("plugins/profile/*/*.xplane.pb")


def read_trace(path: Path, *, module: str | None = None) -> MeasuredStep:
    """Reads what each op of a step took.

    Where the trace has planes of devices, the first one's ops are read, else the thunks of the
    host. Time in which several ops run is divided among them; a loop owns only what its body leaves
    (see `attribute`).

    Args:
      path: From `record_trace`.
      module: Name of the program, such as `jit_train`; left out, the one that took the most time.

    Raises:
      MeasureError: if the trace has no op, or none of `module`.
    """
    platform, by_module = read_planes(path)
    if module is None and by_module:
        module = max(
            by_module, key=lambda name: sum(e.end_ns - e.start_ns for e in by_module[name])
        )
    events = by_module.get(module or "")
    if not events:
        known = ", ".join(sorted(by_module)) or "none"
        raise MeasureError(
            f"{path} has no op of {module or 'any program'} (programs with ops: {known}). "
            "Record a compiled program that runs inside the trace."
        )
    return _summarise(module or "", platform, events)


def _summarise(module: str, platform: str, events: Sequence[OpEvent]) -> MeasuredStep:
    starts: dict[int, float] = {}
    ends: dict[int, float] = {}
    for event in events:
        starts[event.run] = min(event.start_ns, starts.get(event.run, event.start_ns))
        ends[event.run] = max(event.end_ns, ends.get(event.run, event.end_ns))
    runs = sorted(starts, key=lambda run: starts[run])
    lengths_ns = [starts[after] - starts[run] for run, after in pairwise(runs)]
    lengths_ns.append(ends[runs[-1]] - starts[runs[-1]])
    dropped = min(1, len(runs) - 1)
    kept = {run: place for place, run in enumerate(runs[dropped:])}
    return MeasuredStep(
        module=module,
        platform=platform,
        ops=_sum_by_op(events, kept),
        step_samples_s=tuple(length * _NS for length in lengths_ns[dropped:]),
        num_dropped=dropped,
    )


def _sum_by_op(events: Sequence[OpEvent], kept: Mapping[int, int]) -> tuple[MeasuredOp, ...]:
    """Each op's seconds in each of the kept runs, which `kept` maps to their places."""
    ordered = sorted(events, key=lambda event: event.start_ns)
    names = {name: row for row, name in enumerate(dict.fromkeys(event.name for event in ordered))}
    seconds, counts = np.zeros((2, len(names), len(kept)))
    for event, share in zip(events, attribute(events).tolist(), strict=True):
        if event.run in kept:
            place = names[event.name], kept[event.run]
            seconds[place] += share * _NS
            counts[place] += not event.is_part
    num_devices = len({event.device for event in events})
    return tuple(
        MeasuredOp(
            name=name,
            num_executions=statistics.median(counts[row].tolist()) / num_devices,
            samples_s=tuple(seconds[row].tolist()),
        )
        for name, row in names.items()
        if counts[row].any()
    )


def xprof_hlo_stats(path: Path) -> list[dict[str, Any]]:
    """Returns XProf's own statistics of the ops of a trace, by the names of its columns.

    XProf counts devices' ops only: of a CPU's trace it has none.

    Raises:
      UsageError: if XProf is not installed.
    """
    try:
        from xprof.convert import raw_to_tool_data
    except ImportError as error:
        raise UsageError(
            "XProf is not installed, which converts traces. Run pip install 'jaxbench[profile]'."
        ) from error
    data, _ = raw_to_tool_data.xspace_to_tool_data([str(path)], "hlo_stats", {})
    table = json.loads(data)
    names = [column["id"] for column in table["cols"]]
    return [
        dict(zip(names, (cell["v"] for cell in row["c"]), strict=True)) for row in table["rows"]
    ]
