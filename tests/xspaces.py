"""Profiler traces that the tests build themselves: planes, lines and events with their stats."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxbench.hlo.schema import build_classes

# Field numbers: openxla/xla, `third_party/tsl/tsl/profiler/protobuf/xplane.proto`.
SCHEMA = """
XStat: metadata_id=1:int64 double_value=2:double uint64_value=3:uint64 int64_value=4:int64 \
    str_value=5:string
XEvent: metadata_id=1:int64 offset_ps=2:int64 duration_ps=3:int64 stats=4*XStat
XLine: id=1:int64 name=2:string timestamp_ns=3:int64 events=4*XEvent display_id=10:int64
XEventMetadata: id=1:int64 name=2:string display_name=4:string stats=5*XStat
XStatMetadata: id=1:int64 name=2:string
EventEntry: key=1:int64 value=2:XEventMetadata
StatEntry: key=1:int64 value=2:XStatMetadata
XPlane: id=1:int64 name=2:string lines=3*XLine event_metadata=4*EventEntry \
    stat_metadata=5*StatEntry stats=6*XStat
XSpace: planes=1*XPlane hostnames=4*string
""".replace("\\\n", "")
MESSAGES = build_classes(SCHEMA, "jaxbench.tests.xspace")
US = 1_000_000  # picoseconds


@dataclass(frozen=True, kw_only=True)
class Event:
    """One event, in microseconds; `about` are stats of its metadata, shared by equal names."""

    name: str
    start_us: float
    duration_us: float = 0.0
    stats: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)


def op(name: str, start_us: float, duration_us: float, run: int = 1, **stats: Any) -> Event:
    """A thunk's or a kernel's event."""
    known = {"hlo_op": name, "hlo_module": "jit_step", "run_id": run, "device_ordinal": 0}
    return Event(name=name, start_us=start_us, duration_us=duration_us, stats=known | stats)


def task(kind: str, at_us: float, number: int) -> Event:
    """What the thread pool's listener writes: `Record`, `StartRegion` or `StopRegion`."""
    stats = {"_p": number} if kind == "Record" else {"_c": number}
    return Event(name=f"ThreadpoolListener::{kind}", start_us=at_us, stats=stats)


def write(
    path: Path, planes: Mapping[str, Mapping[str, Sequence[Event]]], **figures: float | str
) -> Path:
    """Writes planes of lines of events; `figures` are stats of the planes."""
    space = MESSAGES["XSpace"](hostnames=["test"])
    for number, (name, lines) in enumerate(planes.items(), start=1):
        _Plane(space.planes.add(id=number, name=name)).fill(lines, figures)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(space.SerializeToString())
    return path


class _Plane:
    def __init__(self, proto: Any) -> None:
        self.proto = proto
        self.events: dict[str, int] = {}
        self.stats: dict[str, int] = {}

    def fill(self, lines: Mapping[str, Sequence[Event]], figures: Mapping[str, Any]) -> None:
        for number, (name, events) in enumerate(lines.items(), start=1):
            line = self.proto.lines.add(id=number, display_id=number, name=name)
            for event in events:
                made = line.events.add(
                    metadata_id=self._event(event),
                    offset_ps=round(event.start_us * US),
                    duration_ps=round(event.duration_us * US),
                )
                self._add_stats(made.stats, event.stats)
        self._add_stats(self.proto.stats, figures)

    def _event(self, event: Event) -> int:
        if event.name not in self.events:
            number = self.events[event.name] = len(self.events) + 1
            value = self.proto.event_metadata.add(key=number).value
            value.id, value.name = number, event.name
            value.display_name = event.name.partition(" = ")[0].removeprefix("%")
            self._add_stats(value.stats, event.about)
        return self.events[event.name]

    def _add_stats(self, stats: Any, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if name not in self.stats:
                self.stats[name] = len(self.stats) + 1
                entry = self.proto.stat_metadata.add(key=self.stats[name])
                entry.value.id, entry.value.name = self.stats[name], name
            stat = stats.add(metadata_id=self.stats[name])
            fields = {str: "str_value", int: "int64_value", float: "double_value"}
            setattr(stat, fields[type(value)], value)
