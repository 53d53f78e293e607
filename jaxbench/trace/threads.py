"""What each thread of a CPU works on: thunks, and the tasks that they give to other threads.

A thunk's event ends when its thread goes on. A product or a large fusion may have given tasks to
the pool, which run, or wait for a thread, long after. The pool's listener tells where a task was
given (`Record`) and where it ran (`StartRegion`, `StopRegion`), so that its time goes to the op
that gave it. The executor hands thunks to other threads the same way: those tasks are of no op.

Source: openxla/xla, `xla/backends/cpu/runtime/thunk_executor.cc` and
`xla/tsl/profiler/backends/cpu/threadpool_listener.cc`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxbench.trace.attribution import CONTROL, OpEvent

# TraceMe's ids of what produced an event and of what consumed it, numbered apart for each kind.
_PRODUCER, _CONSUMER = "_p", "_c"
_LISTENER = "ThreadpoolListener::"
_END = "end: "


@dataclass(frozen=True, kw_only=True, slots=True)
class Thunk:
    """The event of a thunk on the thread that ran it."""

    op: OpEvent
    program: str
    number: Any


@dataclass(frozen=True, kw_only=True, slots=True)
class _Mark:
    """A moment at which a thread takes something up or lays it down."""

    at_ns: float
    lane: int
    what: str
    number: Any = None
    op: OpEvent | None = None

    @property
    def order(self) -> tuple[float, bool, float]:
        """By time; what ends comes first; of thunks with one start, the longest first."""
        enters = self.what in ("StartRegion", "enter")
        return self.at_ns, enters, -self.op.end_ns if self.op and enters else 0.0


@dataclass(slots=True)
class _Work:
    """What a thread is at: a thunk, or a task; a task of the executor has no owner."""

    owner: OpEvent | None
    is_task: bool
    since_ns: float = 0.0


def read_threads(plane: Any) -> Iterator[tuple[str, OpEvent]]:
    """Yields (program, event) of the plane `/host:CPU`: of each thunk, and of each task of one.

    A loop lasts until its own `end:` event, for its body may go on on other threads.
    """
    thunks, marks, done_ns = _read_lines(plane)
    programs = {thunk.op.run: thunk.program for thunk in thunks}
    for thunk in thunks:
        op = thunk.op
        if CONTROL.match(op.name):
            op = replace(op, end_ns=max(op.end_ns, done_ns.get(thunk.number, op.end_ns)))
        yield thunk.program, op
    for part in _parts(marks):
        yield programs[part.run], part


def _read_lines(plane: Any) -> tuple[list[Thunk], list[_Mark], dict[Any, float]]:
    """(thunks, marks in no order, when the thunk of a number was done)."""
    thunks: list[Thunk] = []
    marks: list[_Mark] = []
    done_ns: dict[Any, float] = {}
    for lane, line in enumerate(plane.lines):
        for event in line.events:
            name, at_ns = event.name, event.start_ns
            if name.startswith(_LISTENER):
                stats, what = dict(event.stats), name.removeprefix(_LISTENER)
                number = stats.get(_PRODUCER if what == "Record" else _CONSUMER)
                marks.append(_Mark(at_ns=at_ns, lane=lane, what=what, number=number))
            elif name.startswith(_END):
                done_ns[dict(event.stats).get(_CONSUMER)] = at_ns
                marks.append(_Mark(at_ns=at_ns, lane=lane, what="done"))
            elif not name.startswith(("ThunkExecutor::", "$")):
                stats = dict(event.stats)
                if "hlo_op" in stats:
                    thunks.append(_thunk(event, stats, lane))
    for op in (thunk.op for thunk in thunks):
        if op.end_ns > op.start_ns:
            marks.append(_Mark(at_ns=op.start_ns, lane=op.lane, what="enter", op=op))
            marks.append(_Mark(at_ns=op.end_ns, lane=op.lane, what="leave", op=op))
    return thunks, marks, done_ns


def _thunk(event: Any, stats: dict[str, Any], lane: int) -> Thunk:
    op = OpEvent(
        name=str(stats["hlo_op"]),
        run=int(stats.get("run_id", 0)),
        device=int(stats.get("device_ordinal", 0)),
        lane=lane,
        start_ns=event.start_ns,
        end_ns=event.end_ns,
    )
    program = str(stats.get("hlo_module", ""))
    return Thunk(op=op, program=program, number=stats.get(_PRODUCER))


def _parts(marks: Iterable[_Mark]) -> Iterator[OpEvent]:
    """The tasks of thunks. Where a thread goes on with other thunks, the task before is over."""
    stacks: defaultdict[int, list[_Work]] = defaultdict(list)
    owners: dict[Any, OpEvent | None] = {}
    for mark in sorted(marks, key=lambda mark: mark.order):
        stack = stacks[mark.lane]
        if mark.what == "Record":
            owners[mark.number] = stack[-1].owner if stack else None
            continue
        top = stack[-1] if stack and stack[-1].is_task else None
        if top and top.owner:
            if mark.at_ns > top.since_ns:
                yield replace(
                    top.owner,
                    lane=mark.lane,
                    start_ns=top.since_ns,
                    end_ns=mark.at_ns,
                    is_part=True,
                )
            top.owner = None
        if mark.what == "StartRegion":
            owner = owners.pop(mark.number, None)
            stack.append(_Work(owner=owner, is_task=True, since_ns=mark.at_ns))
        elif mark.what == "enter":
            stack.append(_Work(owner=mark.op, is_task=False))
        elif mark.what == "StopRegion" and top:
            stack.pop()
        elif mark.what == "leave":
            while stack and stack.pop().owner is not mark.op:
                pass
