"""The executions of a simulated step, one by one, as profiles and traces show them.

Loops are written out. Above a bound their iterations are merged, so that all totals stay those of
the step: `n` iterations become `k`, each `n / k` times as long, and so is all that lies in them.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxbench.cost import OpCost
from jaxbench.predict.timeline import Event, Timeline

MAX_EVENTS = 300_000
_PS = 1e12
_NOISE_PS = 10  # what float seconds of one minute lose, rounded up


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Executions:
    """Every written execution of one event.

    Attributes:
      starts_ps: Ascending, from the start of the step.
      ends_ps: One for each start.
      merged: Executions that each of them stands for; 1 if loops are written out.
    """

    event: Event
    starts_ps: np.ndarray
    ends_ps: np.ndarray
    merged: float

    @property
    def title(self) -> str:
        """The op's name; where iterations were merged, with how many."""
        name = self.event.op.name
        return name if self.merged == 1 else f"{name} x{self.merged:.6g}"


def iteration_limit(timeline: Timeline, bound: int) -> int | None:
    """Returns how many iterations of a loop fit into `bound` events; None if all do."""
    if sum(event.count for event in timeline.events) <= bound:
        return None
    low, high = 1, max(count for event in timeline.events for count, _ in event.repeats)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(_written(event, middle) for event in timeline.events) <= bound:
            low = middle
        else:
            high = middle - 1
    return low


def _written(event: Event, limit: int) -> int:
    return int(np.prod([min(count, limit) for count, _ in event.repeats], dtype=np.int64))


def expand(timeline: Timeline, limit: int | None) -> tuple[Executions, ...]:
    """Returns the executions of all events, with at most `limit` iterations of each loop.

    Merging dilates time within a loop: iteration length, gaps and durations grow alike, so that
    what ran side by side still does. Start and end of each loop stay where they are.
    """
    opened: dict[tuple, float] = {}
    return tuple(_expand(event, _loop_starts(event, opened), limit) for event in timeline.events)


def _loop_starts(event: Event, opened: dict[tuple, float]) -> tuple[float, ...]:
    """The first start seen in each loop around an event.

    A timeline does not name its loops: events of one loop have the same repeats, and those of a
    later loop with the same repeats begin when the earlier one is over.
    """
    starts: tuple[float, ...] = ()
    for depth, (count, period_s) in enumerate(event.repeats):
        key = (*starts, event.repeats[: depth + 1])
        over_s = opened.get(key, -np.inf) + (count - 0.5) * period_s
        if event.start_s >= over_s:
            opened[key] = event.start_s
        starts += (opened[key],)
    return starts


def _expand(event: Event, loop_starts: tuple[float, ...], limit: int | None) -> Executions:
    merged, starts_s, before_s = 1.0, np.zeros(1), 0.0
    for (count, period_s), loop_s in zip(event.repeats, loop_starts, strict=True):
        written = count if limit is None else min(count, limit)
        starts_s = starts_s + (loop_s - before_s) * merged
        merged *= count / written
        offsets_s = np.arange(written) * (period_s * merged)
        starts_s = np.add.outer(starts_s, offsets_s).ravel()
        before_s = loop_s
    starts_s = starts_s + (event.start_s - before_s) * merged
    ends_s = starts_s + event.duration_s * merged
    return Executions(
        event=event, starts_ps=_picoseconds(starts_s), ends_ps=_picoseconds(ends_s), merged=merged
    )


def _picoseconds(seconds: np.ndarray) -> np.ndarray:
    return np.rint(seconds * _PS).astype(np.int64)


def find_waits(executions: Sequence[Executions], step_s: float) -> tuple[Executions, ...]:
    """Returns the times in which compute stands still, each named after the op that ends it.

    The op that ends where compute goes on was waited for, back to its own start; what ended there
    accounts for the time before. What no op explains stays idle.
    """
    others = [one for one in executions if one.event.stream != "compute"]
    if not others:
        return ()
    ends = np.concatenate([one.ends_ps for one in others])
    starts = np.concatenate([one.starts_ps for one in others])
    owners = np.repeat(np.arange(len(others)), [len(one.ends_ps) for one in others])
    order = np.argsort(ends, kind="stable")
    ends, starts, owners = (values[order].tolist() for values in (ends, starts, owners))
    found: dict[int, list[tuple[int, int]]] = {}
    for gap_start, gap_end in _gaps(executions, step_s):
        at = gap_end
        while at > gap_start + _NOISE_PS:
            last = bisect_right(ends, at + _NOISE_PS) - 1
            begin = max(gap_start, starts[last]) if last >= 0 else at
            if begin >= at or ends[last] < at - _NOISE_PS:
                break
            found.setdefault(owners[last], []).append((begin, at))
            at = begin
    return tuple(_wait(others[owner], spans) for owner, spans in sorted(found.items()))


def _gaps(executions: Sequence[Executions], step_s: float) -> list[tuple[int, int]]:
    """Spans of the step in which nothing runs on the core."""
    compute = [one for one in executions if one.event.stream == "compute"]
    starts = np.sort(np.concatenate([np.zeros(0, np.int64), *(one.starts_ps for one in compute)]))
    ends = np.sort(np.concatenate([np.zeros(0, np.int64), *(one.ends_ps for one in compute)]))
    before = np.concatenate([[0], ends])
    after = np.concatenate([starts, [round(step_s * _PS)]])
    empty = after - before > _NOISE_PS
    return list(zip(before[empty].tolist(), after[empty].tolist(), strict=True))


def _wait(one: Executions, spans: list[tuple[int, int]]) -> Executions:
    op = one.event.op
    wait = OpCost(name=f"wait for {op.name}", opcode=f"{category(op)}-wait", scope=op.scope)
    starts, ends = np.array(sorted(spans), dtype=np.int64).T
    event = Event(op=wait, stream="compute", start_s=starts[0] / _PS, duration_s=0.0)
    return Executions(event=event, starts_ps=starts, ends_ps=ends, merged=one.merged)


def category(op: OpCost) -> str:
    """Returns XProf's category of an op."""
    if op.collective:
        return op.collective
    if op.opcode == "fusion":
        return "convolution fusion" if op.matmul_flops else "loop fusion"
    return op.opcode


def split_scope(scope: str) -> list[str]:
    """Splits at the slashes that stand outside parentheses."""
    return re.split(r"/(?![^()]*\))", scope) if scope else []
