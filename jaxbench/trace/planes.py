"""The op events in a profiler's trace: threads of the host, the core of a TPU, streams of a GPU.

Source of the names of planes, lines and stats: openxla/xla,
`xla/tsl/profiler/utils/xplane_schema.cc`; of a CPU's events:
`xla/backends/cpu/runtime/thunk_executor.cc`.
"""

from __future__ import annotations

import re
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxbench.trace.attribution import OpEvent
from jaxbench.trace.threads import read_threads

_DEVICE = re.compile(r"/device:(TPU|GPU):(\d+)")
_HOST = "/host:CPU"

_Found = Iterator[tuple[str, OpEvent]]


def read_planes(path: Path) -> tuple[str, dict[str, list[OpEvent]]]:
    """Returns the platform (`CPU`, `GPU` or `TPU`) and the op events of each program.

    The first device that ran any op is read, or, where there is none, the host.
    """
    from jax.profiler import ProfileData

    with warnings.catch_warnings():
        # Python 3.13 wants builtin types to have a module; the type of the reader's stats has none.
        warnings.filterwarnings("ignore", "builtin type", DeprecationWarning)
        planes = list(ProfileData.from_file(str(path)).planes)
        for platform, plane in _devices(planes):
            found = _by_program(_TPU_OR_GPU[platform](plane))
            if found:
                return platform, found
        hosts = [plane for plane in planes if plane.name == _HOST]
        return "CPU", _by_program(pair for plane in hosts for pair in read_threads(plane))


def _devices(planes: Iterable[Any]) -> list[tuple[str, Any]]:
    found = [(match, plane) for plane in planes if (match := _DEVICE.fullmatch(plane.name))]
    found.sort(key=lambda pair: int(pair[0][2]))
    return [(match[1], plane) for match, plane in found]


def _by_program(found: Iterable[tuple[str, OpEvent]]) -> dict[str, list[OpEvent]]:
    programs: defaultdict[str, list[OpEvent]] = defaultdict(list)
    for name, event in found:
        programs[name].append(event)
    return dict(programs)


def _read_tpu(plane: Any) -> _Found:
    """Ops on the core, each in the execution of the program in which it starts.

    Copies and collectives that run beside the core have lines of their own and are not counted: the
    core's line holds the times in which it waits for them.
    """
    lines = {line.name: line for line in plane.lines}
    if "XLA Ops" not in lines:
        return
    runs = sorted(
        (event.start_ns, event.name.partition("(")[0])
        for event in (lines["XLA Modules"].events if "XLA Modules" in lines else ())
    )
    starts = [start_ns for start_ns, _ in runs]
    for event in lines["XLA Ops"].events:
        run = bisect_right(starts, event.start_ns) - 1
        yield (
            (runs[run][1] if runs else ""),
            OpEvent(
                name=event.name.partition(" = ")[0].removeprefix("%"),
                run=run,
                device=0,
                lane=0,
                start_ns=event.start_ns,
                end_ns=event.end_ns,
            ),
        )


def _read_gpu(plane: Any) -> _Found:
    """Kernels and copies of all streams that carry the name of their op."""
    programs: defaultdict[str, list[OpEvent]] = defaultdict(list)
    for lane, line in enumerate(plane.lines):
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                kernel = OpEvent(
                    name=str(stats["hlo_op"]),
                    run=int(stats.get("run_id", 0)),
                    device=0,
                    lane=lane,
                    start_ns=event.start_ns,
                    end_ns=event.end_ns,
                )
                programs[str(stats.get("hlo_module", ""))].append(kernel)
    for program, events in programs.items():
        has_runs = len({event.run for event in events}) > 1
        for event in events if has_runs else _split_steps(events):
            yield program, event


def _split_steps(events: Sequence[OpEvent]) -> list[OpEvent]:
    """Numbers steps by the first of the ops that run the fewest times: those outside all loops.

    Kernels do not say of which execution of their program they are.
    """
    ordered = sorted(events, key=lambda event: event.start_ns)
    counts = Counter(event.name for event in ordered)
    fewest = min(counts.values())
    first = next(event.name for event in ordered if counts[event.name] == fewest)
    starts = [event.start_ns for event in ordered if event.name == first]
    return [
        replace(event, run=max(0, bisect_right(starts, event.start_ns) - 1)) for event in ordered
    ]


_TPU_OR_GPU = {"TPU": _read_tpu, "GPU": _read_gpu}
