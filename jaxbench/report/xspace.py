"""The simulated step as a profile that XProf opens: trace viewer, op profile, roofline, HLO stats.

An XSpace is written with a schema of our own, as HLO is read. Source of the field numbers:
openxla/xla, `third_party/tsl/tsl/profiler/protobuf/xplane.proto`; of the names of planes, lines and
stats: `xla/tsl/profiler/utils/xplane_schema.cc`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxbench.cost import OpCost
from jaxbench.hlo.schema import build_classes
from jaxbench.predict.timeline import Event, Timeline
from jaxbench.target import Target, chip_table

_SCHEMA = """
XStat: metadata_id=1:int64 double_value=2:double uint64_value=3:uint64 int64_value=4:int64 str_value=5:string
XEvent: metadata_id=1:int64 offset_ps=2:int64 duration_ps=3:int64 stats=4*XStat
XLine: id=1:int64 name=2:string timestamp_ns=3:int64 events=4*XEvent duration_ps=9:int64 display_id=10:int64
XEventMetadata: id=1:int64 name=2:string display_name=4:string stats=5*XStat
XStatMetadata: id=1:int64 name=2:string
EventEntry: key=1:int64 value=2:XEventMetadata
StatEntry: key=1:int64 value=2:XStatMetadata
XPlane: id=1:int64 name=2:string lines=3*XLine event_metadata=4*EventEntry stat_metadata=5*StatEntry stats=6*XStat
XSpace: planes=1*XPlane hostnames=4*string
"""  # noqa: E501
_PS = 1e12
MAX_EVENTS = 300_000
_PROGRAM_ID = 1
_HOST = "predicted"


_LINES = {
    "compute": (3, "XLA Ops"),
    "collective": (4, "Async XLA Ops"),
    "dma": (5, "Async copies on the chip"),
    "host": (6, "Async copies with the host"),
}


@functools.cache
def _messages() -> dict[str, Any]:
    return build_classes(_SCHEMA, "jaxbench.xspace")


def write_xspace(timeline: Timeline, *, name: str, target: Target, logdir: Path) -> Path:
    """Writes the step as `logdir/plugins/profile/NAME/predicted.xplane.pb`.

    Loops are written out, up to 300,000 events a step; beyond that only the first iterations of
    each loop, and the module's name says so. Ops on the core lie on the line XLA Ops; copies,
    collectives and host transfers on one line each, for they run beside them.

    Args:
      name: Of the candidate and target, shown as the run.
      target: Whose peaks the roofline has.

    Returns:
      The file.
    """
    space = _messages()["XSpace"](hostnames=[_HOST])
    plane = _Plane(space.planes.add(id=1, name="/device:TPU:0"), target)
    plane.add_lines(timeline, name)
    folder = logdir / "plugins" / "profile" / name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_HOST}.xplane.pb"
    path.write_bytes(space.SerializeToString())
    return path


class _Plane:
    """One device's plane, with its tables of names."""

    def __init__(self, plane: Any, target: Target) -> None:
        self.plane = plane
        self.events: dict[str, int] = {}
        self.stats: dict[str, int] = {}
        chip = chip_table()[target.chip]
        peaks = dict(chip.peak_flops)
        teraflops = max(peaks.values(), default=0.0) / 1e12
        self._stat(plane.stats, "peak_teraflops_per_second", teraflops)
        bandwidth = (chip.hbm_bytes_per_s or 0.0) / 1e9
        self._stat(plane.stats, "peak_hbm_bw_gigabytes_per_second", bandwidth)
        self._stat(plane.stats, "device_type_string", chip.description or chip.name)
        self._stat(plane.stats, "clock_rate_in_hz", (chip.clock_ghz or 0.0) * 1e9)

    def add_lines(self, timeline: Timeline, name: str) -> None:
        executions = sum(event.count for event in timeline.events)
        limit = None if executions <= MAX_EVENTS else MAX_EVENTS // max(1, len(timeline.events))
        title = name if limit is None else f"{name} (first {limit} iterations of each loop)"
        whole = (0, round(timeline.step_s * _PS))
        self._line(1, "Steps", [(self._named("1"), *whole)])
        module = self._named(f"{title}({_PROGRAM_ID})")
        self._line(2, "XLA Modules", [(module, *whole)])
        for stream, (number, title) in _LINES.items():
            events = [event for event in timeline.events if event.stream == stream]
            self._line(number, title, self._executions(events, limit))
        self._scopes(timeline, limit)

    def _executions(self, events: list[Event], limit: int | None) -> Iterator[tuple[int, int, int]]:
        for event in events:
            metadata = self._op(event.op)
            duration = max(1, round(event.duration_s * _PS))
            for start_s in starts(event, limit):
                yield metadata, round(start_s * _PS), duration

    def _scopes(self, timeline: Timeline, limit: int | None) -> None:
        """The module scope of what runs on the core, forward and backward apart."""
        rows = []
        for event in timeline.events:
            if event.stream == "compute" and event.op.scope:
                metadata = self._named(event.op.scope)
                duration = max(1, round(event.duration_s * _PS))
                rows += [(metadata, round(at * _PS), duration) for at in starts(event, limit)]
        self._line(7, "Framework Name Scope", rows)

    def _line(self, number: int, name: str, rows: Any) -> None:
        line = self.plane.lines.add(id=number, display_id=number, name=name)
        make = _messages()["XEvent"]
        line.events.extend(
            make(metadata_id=metadata, offset_ps=start, duration_ps=duration)
            for metadata, start, duration in sorted(rows, key=lambda row: row[1])
        )

    def _named(self, name: str) -> int:
        if name not in self.events:
            self.events[name] = len(self.events) + 1
            entry = self.plane.event_metadata.add(key=self.events[name])
            entry.value.id, entry.value.name = self.events[name], name
        return self.events[name]

    def _op(self, op: OpCost) -> int:
        key = f"%{op.name}"
        known = key in self.events
        number = self._named(key)
        if known:
            return number
        value = self.plane.event_metadata[number - 1].value
        value.display_name = op.name
        flops = sum(count for _, count in op.flops)
        figures = {
            "hlo_category": category(op),
            "flops": flops,
            "model_flops": op.matmul_flops,
            "bytes_accessed": op.hbm_bytes or op.moved_bytes,
            "tf_op": f"{op.scope}/{op.opcode}" if op.scope else op.opcode,
            "program_id": _PROGRAM_ID,
            "symbol_id": number,
        }
        for name, figure in figures.items():
            self._stat(value.stats, name, figure)
        return number

    def _stat(self, stats: Any, name: str, value: str | int | float) -> None:
        if name not in self.stats:
            self.stats[name] = len(self.stats) + 1
            entry = self.plane.stat_metadata.add(key=self.stats[name])
            entry.value.id, entry.value.name = self.stats[name], name
        stat = stats.add(metadata_id=self.stats[name])
        if isinstance(value, str):
            stat.str_value = value
        elif isinstance(value, int):
            stat.uint64_value = value
        else:
            stat.double_value = value


def category(op: OpCost) -> str:
    """Returns XProf's category of an op."""
    if op.collective:
        return op.collective
    if op.opcode == "fusion":
        return "convolution fusion" if op.matmul_flops else "loop fusion"
    return op.opcode


def starts(event: Event, limit: int | None) -> Iterator[float]:
    """Yields the seconds at which an event's executions start, at most `limit` a loop."""

    def visit(start_s: float, repeats: tuple[tuple[int, float], ...]) -> Iterator[float]:
        if not repeats:
            yield start_s
            return
        (count, period_s), inner = repeats[0], repeats[1:]
        for index in range(count if limit is None else min(count, limit)):
            yield from visit(start_s + index * period_s, inner)

    return visit(event.start_s, event.repeats)
