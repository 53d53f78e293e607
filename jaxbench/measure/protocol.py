"""Timing candidates against each other on one device: the protocol and its raw times.

Protocol `paired-rounds-3`. Every candidate lives in a few processes of its own and runs chains of
steps on donated state: the same program is a little faster in one process than in the next, for as
long as they live, so each round takes another one. A round lets each candidate run one chain, in
random order, and then one more in the opposite order, so that drift of the machine cancels within
the round; every fifth round begins with chains of one step, so that what every chain costs whatever
its length cancels too. The first candidate is timed against itself, a control that must show
nothing, and against itself with a planted slow-down, one that must show it; they take turns, in the
first rounds and in every third later on. A session ends when the interval of every ratio is narrow
enough, or at its budget.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from jaxbench.errors import Failure
from jaxbench.measure.paired import LEAST_SHORT, compare_rows
from jaxbench.measure.stepper import Chain, Probe
from jaxbench.stats import change_point

PROTOCOL = "paired-rounds-3"
PLANTED_SHARE = 0.02

_CHAIN_S = 0.06
_MOST_STEPS = 4096
_SHORT_EVERY = 5  # rounds; no divisor in common with twice the next, so that both controls meet it
_CONTROL_EVERY = 3  # rounds, after the first few; in every one where there is nothing else
_LEAST_ROUNDS = 8
_CHECK_S = 1.0  # between two looks at the intervals
_WARM_CHAIN_S = 0.01
_LEAST_WARM, _MOST_WARM = 6, 40  # chains
_WARM_SHARE = 0.1  # of the budget, for all
_SETTLED = 1.03  # a change of level below this is no warm-up
_CLOCK_SLACK_S, _CLOCK_SLACK = 0.05, 0.05

Ended = Literal["precise", "budget", "interrupted", "failed"]
Row = tuple[int, int, float, float, float, int]
Energy = Callable[[], Mapping[str, float]]


class Stepping(Protocol):
    """What the protocol asks of a candidate: `Stepper`'s methods, or a `Failure`.

    Attributes:
      num_copies: Processes that it lives in.
    """

    num_copies: int

    def turn(self) -> None:
        """Takes another process for what comes next, each equally often."""
        ...

    def chain(self, *, steps: int, extra_share: float = 0.0) -> Chain | Failure: ...

    def probe(self) -> Probe | Failure: ...


@dataclass(slots=True, kw_only=True)
class Slot:
    """One competitor of a session, and what it gave so far.

    Attributes:
      extra_share: Planted slow-down.
      steps: Of its long chains.
      warm_up: The chains before it settled; the first holds one step.
      settled: Whether its level stood still before the rounds began.
      rows: (round, steps, seconds, dispatch_s, cpu_s, copy) of the rounds' chains.
      page_faults, page_loads: Of all chains in the rounds.
      resident_bytes: Of its first process: (at the first chain of the rounds, at the last).
      dropped: Chains during which a clock was set.
      joules: Energy of the long chains, by counter.
    """

    name: str
    stepper: Stepping
    extra_share: float = 0.0
    steps: int = 2
    warm_up: list[Chain] = field(default_factory=list)
    settled: bool = False
    rows: list[Row] = field(default_factory=list)
    page_faults: int = 0
    page_loads: int = 0
    resident_bytes: tuple[int, int] = (0, 0)
    dropped: int = 0
    joules: dict[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    def run(self, number: int, steps: int, energy: Energy) -> None:
        """Runs one chain in round `number` and keeps what it took, or how it failed."""
        if self.failure:
            return
        before = energy()
        given = self.stepper.chain(steps=steps, extra_share=self.extra_share)
        if isinstance(given, Failure):
            self.failure = given
        elif is_clock_set(given):
            self.dropped += 1
        else:
            times = (round(t, 7) for t in (given.seconds, given.dispatch_s, given.cpu_s))
            self.rows.append((number, steps, *times, given.copy))  # pyright: ignore[reportArgumentType]
            self.page_faults += given.page_faults
            self.page_loads += given.page_loads
            if given.copy == 0:
                first = self.resident_bytes[0] or given.resident_bytes
                self.resident_bytes = (first, given.resident_bytes)
            if steps > 1:
                self._add_energy(before, energy())

    def _add_energy(self, before: Mapping[str, float], after: Mapping[str, float]) -> None:
        for name in before.keys() & after.keys():
            spent = after[name] - before[name]
            self.joules[name] = self.joules.get(name, 0.0) + max(spent, 0.0)  # counters wrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What a session measured.

    Attributes:
      candidates: The first of them is the base.
      same: The base once more. planted: The base, slower by `PLANTED_SHARE`.
      probes: One every few rounds, from the base's process.
      wall_s: From the first warm-up to the end.
    """

    candidates: tuple[Slot, ...]
    same: Slot
    planted: Slot
    probes: tuple[Probe, ...]
    ended: Ended
    wall_s: float

    @property
    def timed_s(self) -> float:
        """Seconds spent in timed chains."""
        slots = (*self.candidates, self.same, self.planted)
        return sum(row[2] for slot in slots for row in slot.rows)


def measure_session(
    candidates: Sequence[tuple[str, Stepping]],
    control: Stepping,
    *,
    budget_s: float,
    precision: float,
    seed: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    energy: Energy = dict,
    progress: Callable[[float], None] = lambda spent_s: None,
) -> Session:
    """Times candidates against the first of them.

    Args:
      candidates: Names and steppers; the first is the base.
      control: The base's program once more, for the two controls.
      budget_s: Wall seconds from the first warm-up on; eight rounds are done however long they
        last.
      precision: Half the width of the candidates' 95 % intervals at which it may end before.
      seed: Of the order.
      energy: Joules by counter, where there are any.
      progress: Told the seconds spent, now and then.

    Ctrl-C ends the session; what was measured is returned, with `ended` saying so.
    """
    slots = [Slot(name=name, stepper=stepper) for name, stepper in candidates]
    same = Slot(name="same", stepper=control)
    planted = Slot(name="planted", stepper=control, extra_share=PLANTED_SHARE)
    everyone = (*slots, same, planted)
    started, probes = clock(), []
    ended: Ended = "budget"
    try:
        for slot in (*slots, same):
            _warm_up(slot, budget_s * _WARM_SHARE / len(everyone))
        planted.settled, planted.failure = same.settled, same.failure
        same.steps = planted.steps = slots[0].steps
        order = random.Random(seed)
        for _ in _rounds(everyone, probes, order, energy, until=started + budget_s, clock=clock):
            progress(clock() - started)
            if _is_precise(everyone, precision):
                ended = "precise"
                break
        if slots[0].failure or all(slot.failure for slot in everyone[1:]):
            ended = "failed"
    except KeyboardInterrupt:
        ended = "interrupted"
    return Session(
        candidates=tuple(slots),
        same=same,
        planted=planted,
        probes=tuple(probes),
        ended=ended,
        wall_s=clock() - started,
    )


# --- Warm-up --------------------------------------------------------------------------------------


def _warm_up(slot: Slot, budget_s: float) -> None:
    """Runs chains until their level stands still, and sets the length of the rounds' chains.

    Further processes of the candidate run as many, or until the time that the first one took.
    """
    steps, spent_s = 1, 0.0
    while len(slot.warm_up) < _MOST_WARM and not slot.settled:
        given = slot.stepper.chain(steps=steps)
        if isinstance(given, Failure):
            slot.failure = given
            return
        slot.warm_up.append(given)
        spent_s += given.seconds
        if len(slot.warm_up) == 2:
            steps = max(1, min(_MOST_STEPS, round(_WARM_CHAIN_S / max(given.seconds, 1e-9))))
        slot.settled = is_settled([_step_s(chain) for chain in slot.warm_up])
        if spent_s > budget_s and len(slot.warm_up) > 2:
            break
    step_s = float(np.median([_step_s(chain) for chain in slot.warm_up[len(slot.warm_up) // 2 :]]))
    slot.steps = max(2, min(_MOST_STEPS, round(_CHAIN_S / step_s)))
    for _ in range(slot.stepper.num_copies - 1):
        slot.stepper.turn()
        _warm_up_copy(slot, steps, spent_s)


def _warm_up_copy(slot: Slot, steps: int, budget_s: float) -> None:
    spent_s = 0.0
    for _ in slot.warm_up:
        given = slot.stepper.chain(steps=steps)
        if isinstance(given, Failure):
            slot.failure = given
            return
        spent_s += given.seconds
        if spent_s > budget_s:
            return


def is_settled(steps_s: Sequence[float]) -> bool:
    """Whether the last change of level lies behind, in the first half of what was seen."""
    if len(steps_s) < _LEAST_WARM:
        return False
    tail = steps_s[len(steps_s) // 2 :]
    _, factor = change_point(tail, least=max(1, len(tail) // 3))
    return 1 / _SETTLED < factor < _SETTLED


def _step_s(chain: Chain) -> float:
    return max(chain.seconds / chain.steps, 1e-9)


# --- Rounds ---------------------------------------------------------------------------------------


def _rounds(
    slots: Sequence[Slot],
    probes: list[Probe],
    generator: random.Random,
    energy: Energy,
    *,
    until: float,
    clock: Callable[[], float],
) -> Iterator[None]:
    """Does rounds until the budget is spent; yields when it is time to look at the intervals."""
    number, looked = 0, clock()
    while not slots[0].failure:
        *candidates, same, planted = slots
        live = [slot for slot in candidates if not slot.failure]
        every = _CONTROL_EVERY if len(live) > 1 and number >= _LEAST_ROUNDS else 1
        control = planted if number // every % 2 else same
        if number % every == 0 and not control.failure:
            live.append(control)
        if len(live) < 2:
            return
        _round(number, generator.sample(live, len(live)), slots[0], probes, energy)
        number += 1
        if number < _LEAST_ROUNDS:
            continue
        if clock() >= until:
            return
        if clock() - looked >= _CHECK_S:
            yield
            looked = clock()


def _round(
    number: int, order: Sequence[Slot], base: Slot, probes: list[Probe], energy: Energy
) -> None:
    for slot in order:
        slot.stepper.turn()
    if number % _SHORT_EVERY == 0:
        probe = base.stepper.probe()
        if isinstance(probe, Failure):
            base.failure = probe
            return
        probes.append(probe)
        for slot in order:
            slot.run(number, 1, energy)
    for slot in (*order, *reversed(order)):
        slot.run(number, slot.steps, energy)


def is_clock_set(chain: Chain) -> bool:
    """Whether two clocks disagree about a chain, or one of them stood still or ran backwards."""
    apart_s = abs(chain.calendar_s - chain.seconds)
    return chain.seconds <= 0 or apart_s > _CLOCK_SLACK_S + _CLOCK_SLACK * chain.seconds


def _is_precise(slots: Sequence[Slot], precision: float) -> bool:
    """Whether the ratios to the base are known well enough: of its rivals, or of the controls.

    Not before chains of one step have told what chains cost by themselves.
    """
    base, *rivals = slots[:-2]
    others = [slot for slot in rivals or slots[-2:] if not slot.failure]
    rounds = base.rows[-1][0] if base.rows else 0
    if not others or rounds < _SHORT_EVERY * LEAST_SHORT:
        return False
    return all(_half_width(base, slot) <= precision for slot in others)


def _half_width(base: Slot, other: Slot) -> float:
    interval = compare_rows(base.rows, other.rows, resamples=400)
    return math.log(interval.high / interval.low) / 2 if interval.low else math.inf
