"""The timeline of one step: the schedule that the compiler wrote, run on a simulated device.

Imports no compiler. What runs beside what is the program's own choice: a start and its done stand
in the schedule, and what stands between them overlaps.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from jaxbench.cost import Loop, OpCost, Step, Stream, Wait
from jaxbench.predict.timeline import Event, Timeline

Price = Callable[[OpCost], float]
_SAME = 1e-9  # relative: two iterations of a loop that take the same time


def simulate(steps: Iterable[Step], price: Price) -> Timeline:
    """Runs a schedule: one compute stream, beside it copies, collectives and the host link.

    An op without `starts` begins when compute and its own stream are free, and all wait for it.
    One with `starts` is issued at once, runs when its stream is free, and only the `Wait` with its
    token waits. A loop is run twice; its other iterations take as long as the second, so that the
    time to simulate does not depend on trips.

    Assumes that one stream does one thing at a time at its full rate, whatever the others do.

    Args:
      steps: From `price_module`.
      price: Seconds of one execution of an op.

    Returns:
      The events, and which seconds compute waited for which stream.
    """
    machine = _Machine(price=price)
    machine.run(steps)
    machine.drain()
    return Timeline(
        step_s=machine.now,
        events=tuple(sorted(machine.events, key=lambda event: event.start_s)),
        exposed_s=tuple(sorted(machine.exposed.items())),
    )


@dataclass(kw_only=True, slots=True)
class _Machine:
    """The state of the device while the schedule runs."""

    price: Price
    now: float = 0.0
    free: dict[Stream, float] = field(default_factory=dict)
    ends: dict[str, tuple[float, Stream]] = field(default_factory=dict)
    exposed: defaultdict[Stream, float] = field(default_factory=lambda: defaultdict(float))
    events: list[Event] = field(default_factory=list)

    def run(self, steps: Iterable[Step]) -> None:
        for step in steps:
            if isinstance(step, OpCost):
                self._op(step)
            elif isinstance(step, Wait):
                self._wait(step.token)
            else:
                self._loop(step)

    def drain(self) -> None:
        """Waits for all that was started: the step ends with the last of it."""
        for token in list(self.ends):
            self._wait(token)

    def _op(self, op: OpCost) -> None:
        duration_s = self.price(op)
        if op.stream == "compute":
            self._record(op, self.now, duration_s)
            self.now += duration_s
            return
        start_s = max(self.now, self.free.get(op.stream, 0.0))
        end_s = start_s + duration_s
        self._record(op, start_s, duration_s)
        self.free[op.stream] = end_s
        if op.starts:
            self.ends[op.starts] = (end_s, op.stream)
        else:
            self._wait_until(end_s, op.stream)

    def _record(self, op: OpCost, start_s: float, duration_s: float) -> None:
        event = Event(op=op, stream=op.stream, start_s=start_s, duration_s=duration_s)
        self.events.append(event)

    def _wait(self, token: str) -> None:
        """Waits for one op; what was started outside the computation at hand is over."""
        if token in self.ends:
            self._wait_until(*self.ends.pop(token))

    def _wait_until(self, end_s: float, stream: Stream) -> None:
        if end_s > self.now:
            self.exposed[stream] += end_s - self.now
            self.now = end_s

    def _loop(self, loop: Loop) -> None:
        outside, self.events = self.events, []
        start_s = self.now
        self.run(loop.steps)
        first, self.events = self.events, []
        first_s = self.now - start_s
        if loop.trips > 1:
            waited, free = self.exposed.copy(), dict(self.free)
            self.run(loop.steps)
            period_s = self.now - start_s - first_s
            rest = loop.trips - 2
            for stream, seconds in self.exposed.items():
                self.exposed[stream] += rest * (seconds - waited[stream])
            moved: dict[Stream, float] = {
                stream: end_s - free.get(stream, end_s) for stream, end_s in self.free.items()
            }
            self._pass(rest, period_s, moved)
            if abs(period_s - first_s) <= _SAME * period_s:
                first = _repeat(first, loop.trips, period_s)
                self.events = []
            self.events = _repeat(self.events, loop.trips - 1, period_s)
        self.events = outside + first + self.events

    def _pass(self, rest: int, period_s: float, moved: dict[Stream, float]) -> None:
        """Lets `rest` more iterations go by, each as the last one.

        A stream that has more to do than an iteration lasts falls further behind in each.
        """
        self.now += rest * period_s
        for stream, moved_s in moved.items():
            self.free[stream] += rest * moved_s
        self.ends = {
            token: (end_s + rest * moved[stream], stream)
            for token, (end_s, stream) in self.ends.items()
        }


def _repeat(events: list[Event], count: int, period_s: float) -> list[Event]:
    if count == 1:
        return events
    return [replace(event, repeats=((count, period_s), *event.repeats)) for event in events]
