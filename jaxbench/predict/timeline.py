"""The simulated step as events on streams: what runs when, how often, and what it is."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import get_args

from jaxbench.cost import OpCost, Stream

STREAMS: tuple[Stream, ...] = get_args(Stream)


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """One op on its stream, at its first execution.

    Attributes:
      op: What it is; its numbers are of one execution.
      start_s: Seconds from the start of the step.
      repeats: (count, period in seconds) of each loop around it, outermost first: execution
        (i, j, ...) starts at start_s + i * period_0 + j * period_1 + ...
    """

    op: OpCost
    stream: Stream
    start_s: float
    duration_s: float
    repeats: tuple[tuple[int, float], ...] = ()

    @property
    def count(self) -> int:
        """Executions in one step."""
        return prod(count for count, _ in self.repeats)

    @property
    def total_s(self) -> float:
        """Seconds of all executions."""
        return self.duration_s * self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """Events of one step in the order of their starts; `step_s` is the end of the last.

    `exposed_s` are the seconds that compute stood still for each of the other streams.
    """

    step_s: float
    events: tuple[Event, ...]
    exposed_s: tuple[tuple[Stream, float], ...] = ()
