"""What makes measured times questionable: each doubt with its number, its cause and its remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from jaxbench.machine import Usage
from jaxbench.measure.paired import step_samples_s
from jaxbench.measure.protocol import Session, Slot
from jaxbench.stats import trend, two_modes


class Kind(StrEnum):
    """Every doubt there is."""

    DRIFT = "drift"
    LOAD = "load by others"
    BIMODAL = "bimodal samples"
    THROTTLED = "clock or thermal throttling"
    FEW = "too few samples"
    SWAP = "swap"
    DISPATCH = "dispatch-bound"
    FIRST_TOUCH = "first-touch effects"
    LEAK = "memory grows"
    CLOCK = "clock was set"
    UNSETTLED = "warm-up not over"
    ONE_PROCESS = "one process"


@dataclass(frozen=True, kw_only=True, slots=True)
class Doubt:
    """One doubt.

    Attributes:
      number: How much, in the unit that `cause` names.
    """

    kind: Kind
    number: float
    cause: str
    remedy: str

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {**asdict(self), "kind": self.kind.value}

    def __str__(self) -> str:
        return f"{self.kind.value}: {self.cause}; {self.remedy}"


_DRIFT = 0.03
_CHANCE = 0.05  # of seeing such a trend where there is none
_LOAD_CORES = 0.05
_MODES_EXPLAIN, _MODES_SHARE, _MODES_APART = 0.88, 0.15, 1.03
_CLOCK = 0.03
_FEW = 20
_DISPATCH = 0.9
_FAULT_S = 0.25e-6  # of a page of 4 KiB, zeroed by the kernel; measured figures are 0.1 to 0.5
_FAULT_SHARE = 0.03
_LEAK_BYTES, _LEAK_SHARE = 64 * 2**20, 0.05


def find_doubts(slot: Slot, session: Session, usage: Usage) -> list[Doubt]:
    """Looks at everything that a session knows about one of its competitors."""
    samples_s = step_samples_s(slot.rows)
    found = [*_of_samples(slot, samples_s), *_of_machine(session, usage), *_of_process(slot)]
    return sorted(found, key=lambda doubt: list(Kind).index(doubt.kind))


def _of_samples(slot: Slot, samples_s: Sequence[float]) -> Iterator[Doubt]:
    if len(samples_s) < _FEW:
        yield Doubt(
            kind=Kind.FEW,
            number=len(samples_s),
            cause=f"{len(samples_s)} chains, fewer than {_FEW}",
            remedy="give it longer, by --budget-s (a search: --measure-s)",
        )
    factor, chance = trend(samples_s)
    if abs(factor - 1) > _DRIFT and chance < _CHANCE:
        yield Doubt(
            kind=Kind.DRIFT,
            number=factor - 1,
            cause=f"the last third takes {factor - 1:+.0%} against the first",
            remedy="ratios of one session are safe from it; absolute times are not: time again",
        )
    if len(samples_s) >= 6:
        share, smaller, apart = two_modes(samples_s)
        if share > _MODES_EXPLAIN and smaller > _MODES_SHARE and apart > _MODES_APART:
            yield Doubt(
                kind=Kind.BIMODAL,
                number=apart - 1,
                cause=f"two heaps {apart - 1:.0%} apart, {smaller:.0%} of chains in the smaller",
                remedy="look for another process or a changing clock; their mean is no step",
            )
    if not slot.settled:
        yield Doubt(
            kind=Kind.UNSETTLED,
            number=len(slot.warm_up),
            cause=f"its times still moved after {len(slot.warm_up)} chains of warm-up",
            remedy="give it longer, by --budget-s (a search: --measure-s)",
        )
    if slot.dropped:
        yield Doubt(
            kind=Kind.CLOCK,
            number=slot.dropped,
            cause=f"{slot.dropped} chains left out, as the clocks disagree about them",
            remedy="keep the time daemon or the virtual machine still while measuring",
        )


def _of_machine(session: Session, usage: Usage) -> Iterator[Doubt]:
    if usage.others_cores > _LOAD_CORES:
        yield Doubt(
            kind=Kind.LOAD,
            number=usage.others_cores,
            cause=f"others took {usage.others_cores:.2f} cores of {usage.cores}",
            remedy="stop them, or measure longer",
        )
    if usage.swapped_bytes:
        yield Doubt(
            kind=Kind.SWAP,
            number=usage.swapped_bytes,
            cause=f"{usage.swapped_bytes / 2**20:.0f} MiB were swapped",
            remedy="free memory, or take smaller batches",
        )
    factor, chance = trend([probe.hash_cpu_s for probe in session.probes], length=1)
    slower = max(1 / factor, factor) - 1
    if slower > _CLOCK and chance < _CHANCE:
        yield Doubt(
            kind=Kind.THROTTLED,
            number=slower,
            cause=f"a fixed computation on one core changed its speed by {slower:.0%}",
            remedy="fix the clock (governor performance, no turbo), or cool the machine",
        )


def _of_process(slot: Slot) -> Iterator[Doubt]:
    longs = [row for row in slot.rows if row[1] > 1]
    if not longs:
        return
    if len({row[5] for row in longs}) < 2:
        yield Doubt(
            kind=Kind.ONE_PROCESS,
            number=1,
            cause="it lived in one process; how far its processes lie apart is not in the interval",
            remedy="free memory for more of them; differences below a percent may be chance",
        )
    seconds = sum(row[2] for row in slot.rows)
    share = float(np.median([row[3] / row[2] for row in longs]))
    if share > _DISPATCH:
        yield Doubt(
            kind=Kind.DISPATCH,
            number=share,
            cause=f"the host is busy handing out work for {share:.0%} of the time",
            remedy="this times the host, not the device: take larger batches or fewer, larger ops",
        )
    touched = slot.page_faults * _FAULT_S / seconds
    if touched > _FAULT_SHARE:
        yield Doubt(
            kind=Kind.FIRST_TOUCH,
            number=touched,
            cause=f"about {touched:.0%} of the time goes into fresh pages of memory",
            remedy="let the allocator keep memory (MALLOC_TRIM_THRESHOLD_, huge pages)",
        )
    if slot.page_loads:
        yield Doubt(
            kind=Kind.SWAP,
            number=slot.page_loads,
            cause=f"{slot.page_loads} pages were read from disk",
            remedy="free memory, or take smaller batches",
        )
    first, last = slot.resident_bytes
    if last - first > max(_LEAK_BYTES, _LEAK_SHARE * first):
        yield Doubt(
            kind=Kind.LEAK,
            number=last - first,
            cause=f"its process grew by {(last - first) / 2**20:.0f} MiB while it was timed",
            remedy="look for what each step keeps; it would not train for long",
        )
