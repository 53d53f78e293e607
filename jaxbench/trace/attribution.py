"""Whose time is it: a step's seconds divided among events that nest and run side by side."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Ops that run other ops; on a CPU those may run on other threads than they do.
CONTROL = re.compile(r"(while|call|conditional)(\.|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpEvent:
    """One execution of one op, or a part of it on another thread.

    Attributes:
      run: The step that it belongs to; any number that differs between steps.
      device: Number of the device.
      lane: The thread or stream that it ran on.
      start_ns, end_ns: On a clock that all lanes share.
      is_part: Whether another event stands for the execution, and this one is work that it gave
        to another thread.
    """

    name: str
    run: int
    device: int
    lane: int
    start_ns: float
    end_ns: float
    is_part: bool = False


def attribute(events: Sequence[OpEvent]) -> np.ndarray:
    """Divides the time in which anything runs among the events, so that it counts once.

    share(e) = integral over e of dt / n(t), with n the events of the deepest level that run at t.
    An event that runs others (a loop, what encloses others on its lane) has a level for each such
    event around it; all that run no others are the deepest. So a loop owns only the time in which
    nothing else runs, and the shares add up to the union of all events.

    Assumes that what runs at the same time runs equally fast; and that of two loops side by side
    the one with more loops around it is the inner one.

    Returns:
      Nanoseconds, one for each event.
    """
    shares = np.zeros(len(events))
    if not events:
        return shares
    starts = np.array([event.start_ns for event in events], dtype=float)
    ends = np.maximum(starts, [event.end_ns for event in events])
    levels = _levels(events, starts, ends)
    times, places = np.unique(np.concatenate([starts, ends]), return_inverse=True)
    first, last = places[: len(events)], places[len(events) :]
    free = np.diff(times)
    for level in np.unique(levels)[::-1]:
        at = levels == level
        change = np.bincount(first[at], minlength=len(times)).astype(float)
        change -= np.bincount(last[at], minlength=len(times))
        running = np.cumsum(change)[:-1]
        each = np.divide(free, running, out=np.zeros_like(free), where=running > 0)
        until = np.concatenate([[0.0], np.cumsum(each)])
        shares[at] = until[last[at]] - until[first[at]]
        free = np.where(running > 0, 0.0, free)
    return shares


def _levels(events: Sequence[OpEvent], starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Loops around each event that runs others; a number above all of them for the rest."""
    order = np.lexsort((-ends, starts))
    parents = _parents_on_lanes(events, order, ends)
    levels = np.full(len(events), len(events))
    around: list[int] = []
    for index in order.tolist():
        if index not in parents and not CONTROL.match(events[index].name):
            continue
        around = [one for one in around if ends[one] > starts[index]]
        levels[index] = sum(bool(ends[one] >= ends[index]) for one in around)
        around.append(index)
    return levels


def _parents_on_lanes(events: Sequence[OpEvent], order: np.ndarray, ends: np.ndarray) -> set[int]:
    """Events in which another one of the same lane lies whole."""
    open_on: dict[int, list[int]] = {}
    parents = set()
    for index in order.tolist():
        event = events[index]
        stack = open_on.setdefault(event.lane, [])
        while stack and ends[stack[-1]] <= event.start_ns:
            stack.pop()
        if stack and ends[stack[-1]] >= ends[index] > event.start_ns:
            parents.add(stack[-1])
        stack.append(index)
    return parents
