"""The simulated step as a profile that XProf opens: trace viewer, op profile, roofline, HLO stats.

An XSpace is written with a schema of our own, as HLO is read; its events, of which there are very
many, by numpy. GPU targets are written as a TPU's plane as well: XProf fills its op pages for
`/device:GPU:0` only from the kernels of a real one, and its pages here stay empty.

Source of the field numbers: openxla/xla, `third_party/tsl/tsl/profiler/protobuf/xplane.proto`; of
the names of planes, lines and stats: `xla/tsl/profiler/utils/xplane_schema.cc`; of the memory
breakdown: openxla/xprof, `plugin/xprof/protobuf/op_metrics.proto`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.cost import OpCost
from jaxbench.hlo.schema import build_classes
from jaxbench.predict.timeline import Timeline
from jaxbench.report.executions import (
    MAX_EVENTS,
    Executions,
    category,
    expand,
    find_waits,
    iteration_limit,
)
from jaxbench.target import Target, chip_table

_SCHEMA = """
XStat: metadata_id=1:int64 double_value=2:double uint64_value=3:uint64 str_value=5:string \
    bytes_value=6:bytes
XLine: id=1:int64 name=2:string timestamp_ns=3:int64 events=4*raw display_id=10:int64
XEventMetadata: id=1:int64 name=2:string display_name=4:string stats=5*XStat
XStatMetadata: id=1:int64 name=2:string
EventEntry: key=1:int64 value=2:XEventMetadata
StatEntry: key=1:int64 value=2:XStatMetadata
XPlane: id=1:int64 name=2:string lines=3*raw event_metadata=4*EventEntry \
    stat_metadata=5*StatEntry stats=6*XStat
XSpace: planes=1*XPlane hostnames=4*string
MemoryAccessed: operation_type=1:int64 memory_space=2:int64 bytes_accessed=3:int64
MemoryAccess: memory_accessed=1*MemoryAccessed
""".replace("\\\n", "")
_PS = 1e12
_PROGRAM_ID = 1
_HOST = "predicted"
_HBM, _READ = 1, 1  # XProf adds what is read and written: which of them it was does not show

# XProf counts the ops of XLA Ops only, and its trace viewer hides a line "Async XLA Ops" unless it
# is asked for `full_dma`, so that collectives have a name of their own.
_LINES = {
    "compute": (3, "XLA Ops"),
    "collective": (4, "Collectives"),
    "dma": (5, "Async copies on the chip"),
    "host": (6, "Async copies with the host"),
}


@functools.cache
def _messages() -> dict[str, Any]:
    return build_classes(_SCHEMA, "jaxbench.xspace")


def write_xspace(timeline: Timeline, *, name: str, target: Target, logdir: Path) -> Path:
    """Writes the step as `logdir/plugins/profile/NAME/predicted.xplane.pb`.

    Ops on the core lie on the line XLA Ops, with the times in which the core waits for another
    stream; copies, collectives and host transfers on one line each, for they run beside them. XProf
    draws the module scopes from the ops on the core. Loops are written out; above 300,000 events
    their iterations are merged, which keeps all totals, and names say so.

    Args:
      name: Of the candidate and target, shown as the run.
      target: Whose peaks the roofline has.

    Returns:
      The file.
    """
    limit = iteration_limit(timeline, MAX_EVENTS)
    executions = expand(timeline, limit)
    plane = _Plane(target)
    title = name if limit is None else f"{name} (loops merged to {limit} iterations)"
    step = np.array([round(timeline.step_s * _PS)])
    plane.add_line(1, "Steps", [(plane.named("1"), step * 0, step)])
    plane.add_line(2, "XLA Modules", [(plane.named(f"{title}({_PROGRAM_ID})"), step * 0, step)])
    on_core = [*executions, *find_waits(executions, timeline.step_s)]
    for stream, (number, label) in _LINES.items():
        ops = [one for one in on_core if one.event.stream == stream]
        plane.add_line(number, label, [(plane.op(one), one.starts_ps, one.ends_ps) for one in ops])
    folder = logdir / "plugins" / "profile" / name.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_HOST}.xplane.pb"
    path.write_bytes(
        _messages()["XSpace"](planes=[plane.proto], hostnames=[_HOST]).SerializeToString()
    )
    return path


class _Plane:
    """One device's plane, with its tables of names."""

    def __init__(self, target: Target) -> None:
        self.proto = _messages()["XPlane"](id=1, name="/device:TPU:0")
        self.events: dict[tuple, int] = {}
        self.titles: set[tuple[str, int]] = set()
        self.stats: dict[str, int] = {}
        chip = chip_table()[target.chip]
        figures = {
            "peak_teraflops_per_second": max(dict(chip.peak_flops).values(), default=0.0) / 1e12,
            "peak_hbm_bw_gigabytes_per_second": (chip.hbm_bytes_per_s or 0.0) / 1e9,
            "device_type_string": chip.description or chip.name,
            "clock_rate_in_hz": (chip.clock_ghz or 0.0) * 1e9,
        }
        for name, figure in figures.items():
            self._stat(self.proto.stats, name, figure)

    def add_line(
        self, number: int, name: str, rows: Iterable[tuple[int, np.ndarray, np.ndarray]]
    ) -> None:
        """Adds a line of events, from (metadata, starts and ends in picoseconds)."""
        line = _messages()["XLine"](id=number, display_id=number, name=name)
        rows = list(rows)
        events = _encode_events(rows) if rows else b""
        # A repeated field may stand anywhere in its message: the events come after all others.
        self.proto.lines.append(line.SerializeToString() + events)

    def named(self, name: str) -> int:
        return self._metadata((name,), name).id

    def op(self, one: Executions) -> int:
        """The metadata of an op; XProf multiplies its figures by the number of its events."""
        op, title = one.event.op, one.title
        flops = round(sum(count for _, count in op.flops) * one.merged)
        hbm_bytes = round(op.hbm_bytes * one.merged)
        key = (title, op.opcode, op.scope, flops, hbm_bytes, one.event.stream)
        if key in self.events:
            return self.events[key]
        # The ops inside one asynchronous wrapper all have the name of its start.
        number = next(n for n in range(1, 1 << 30) if (title, n) not in self.titles)
        self.titles.add((title, number))
        title = title if number == 1 else f"{title} #{number}"
        value = self._metadata(key, f"%{title}")
        value.display_name = title
        figures = {
            "hlo_category": category(op),
            "flops": flops,
            "model_flops": flops,  # what XProf sums, unless it is 0: of products alone it is less
            "bytes_accessed": hbm_bytes,
            "memory_access_breakdown": _memory_access(hbm_bytes),
            # Without tf_op, XProf leaves the other streams out of the module scopes that it draws.
            "tf_op" if one.event.stream == "compute" else "scope": _tf_op(op),
            "collective_bytes": round(op.collective_bytes * one.merged),
            "merged_iterations": one.merged,
            "program_id": _PROGRAM_ID,
            "symbol_id": value.id,
        }
        for name, figure in figures.items():
            self._stat(value.stats, name, figure)
        return value.id

    def _metadata(self, key: tuple, name: str) -> Any:
        number = self.events[key] = len(self.events) + 1
        value = self.proto.event_metadata.add(key=number).value
        value.id, value.name = number, name
        return value

    def _stat(self, stats: Any, name: str, value: str | bytes | int | float) -> None:
        if name not in self.stats:
            self.stats[name] = len(self.stats) + 1
            entry = self.proto.stat_metadata.add(key=self.stats[name])
            entry.value.id, entry.value.name = self.stats[name], name
        stat = stats.add(metadata_id=self.stats[name])
        fields = {str: "str_value", bytes: "bytes_value", int: "uint64_value"}
        setattr(stat, fields.get(type(value), "double_value"), value)


def _tf_op(op: OpCost) -> str:
    """Scope and opcode as `path:type`; XProf takes a path for JAX's if it ends with the type."""
    kind = re.sub(r"[^a-z0-9_]", "_", op.opcode)
    return f"{op.scope}/{kind}:{kind}" if op.scope else f"{kind}:{kind}"


def _memory_access(hbm_bytes: int) -> bytes:
    access = {"operation_type": _READ, "memory_space": _HBM, "bytes_accessed": hbm_bytes}
    return _messages()["MemoryAccess"](memory_accessed=[access]).SerializeToString()


# --- Events on the wire ---------------------------------------------------------------------------

_SHIFTS = np.arange(0, 63, 7)
_FIELD_OF_LINE = 4 << 3 | 2  # XLine.events, of known length
_FIELDS = (1 << 3, 2 << 3, 3 << 3)  # XEvent.metadata_id, offset_ps, duration_ps, as varints


def _encode_events(rows: list[tuple[int, np.ndarray, np.ndarray]]) -> bytes:
    """XEvents in the order of their starts, each cut where the next one on its line begins.

    Start and end are rounded apart, so that without the cut a picosecond of overlap would make one
    op the child of another.
    """
    ids = np.repeat([metadata for metadata, _, _ in rows], [len(starts) for _, starts, _ in rows])
    starts = np.concatenate([starts for _, starts, _ in rows])
    ends = np.concatenate([ends for _, _, ends in rows])
    order = np.argsort(starts, kind="stable")
    ids, starts, ends = ids[order], starts[order], ends[order]
    overlap = ends[:-1] - starts[1:]
    ends[:-1] -= np.where((overlap > 0) & (overlap <= 2), overlap, 0)
    columns, used = [], []
    for tag, values in zip(_FIELDS, (ids, starts, np.maximum(ends - starts, 1)), strict=True):
        digits, is_used = _varints(values)
        columns += [np.full((len(values), 1), tag), digits]
        used += [np.ones((len(values), 1), bool), is_used]
    body, body_used = np.hstack(columns), np.hstack(used)
    head = np.column_stack([np.full(len(ids), _FIELD_OF_LINE), body_used.sum(axis=1)])
    whole = np.hstack([head, body]).astype(np.uint8)
    return whole[np.hstack([np.ones_like(head, bool), body_used])].tobytes()


def _varints(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of each number, seven bits each, lowest first, and which of them are written."""
    rest = values[:, None] >> _SHIFTS
    is_used = rest > 0
    is_used[:, 0] = True
    more = np.hstack([is_used[:, 1:], np.zeros((len(values), 1), bool)])
    return (rest & 0x7F) | (more * 0x80), is_used
