"""Comparing records: rivals on one target, and choices whose winner changes with the target.

Evidence on one target is either a measurement of both, or two independent signals (`hlo` and
`compiler`) that agree in sign and both exceed their known error. Anything less is `inconclusive`,
with the reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxbench.measure.paired import Rows, compare_rows
from jaxbench.record import Record
from jaxbench.signals import SIGNAL_ERROR, SIGNALS
from jaxbench.stats import Interval, median_ratio, median_s, paired_ratio

Verdict = Literal["faster", "slower", "tie", "inconclusive", "not comparable"]
_PAIRED_TIE = 1.02  # the same for two that were timed in the same rounds
_CONTROL = 0.99  # a right control fails once in a hundred sessions
_TIE = 1.10  # a measured ratio whose whole interval lies within this factor is a tie


@dataclass(frozen=True, kw_only=True, slots=True)
class Ratio:
    """Second's step time over first's by one signal, with its error: above 1, the first wins."""

    signal: str
    ratio: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 if the first is surely faster, -1 if the second is, 0 if the interval holds 1."""
        return (self.low > 1) - (self.high < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """First against second on one target. `faster` says that the first is."""

    first: str
    second: str
    target: str
    record_ids: tuple[str, str]
    ratios: tuple[Ratio, ...]
    verdict: Verdict
    reason: str

    @property
    def winner(self) -> str | None:
        """Name of the faster one, where there is a verdict."""
        return {"faster": self.first, "slower": self.second}.get(self.verdict)

    def ratio(self, signal: str) -> Ratio | None:
        """Returns the ratio by one signal."""
        return next((ratio for ratio in self.ratios if ratio.signal == signal), None)

    @property
    def leaning(self) -> int:
        """Sign of the best signal's ratio, however small: measured, compiler or hlo; 0 if even."""
        best = next(
            (r for name in ("measured", "compiler", "hlo") if (r := self.ratio(name))), None
        )
        return 0 if best is None else (best.ratio > 1) - (best.ratio < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A pair of rivals whose winner changes from one target to another."""

    first: str
    second: str
    first_wins_on: tuple[str, ...]
    second_wins_on: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Regret:
    """What it costs to choose by one target's winner and train on another, over all groups.

    From each record's own `samples_per_s`, so as good as those are: measured or predicted.
    """

    chosen_on: str
    used_on: str
    worst: float
    mean: float
    worst_group: str


def step_seconds(record: Record, signal: str) -> float | None:
    """Returns the step time of a record by one signal; `model` in FLOPs, which has no clock."""
    if signal == "measured":
        return median_s(record.measurement["samples_s"]) if record.measurement else None
    if signal == "compiler":
        return record.compiler["step_s"] if record.compiler else None
    if signal == "hlo":
        return record.prediction["hlo_s"] if record.prediction else None
    return record.cost["model_flops"] if record.cost else None


def compare_records(first: Record, second: Record) -> Comparison:
    """Compares two records of one target by every signal that both have."""
    ratios = tuple(ratio for signal in SIGNALS if (ratio := _ratio(first, second, signal)))
    verdict, reason = _incomparable(first, second) or _verdict(first, second, ratios)
    return Comparison(
        first=first.candidate,
        second=second.candidate,
        target=first.target,
        record_ids=(first.id, second.id),
        ratios=ratios,
        verdict=verdict,
        reason=reason,
    )


def _ratio(first: Record, second: Record, signal: str) -> Ratio | None:
    one, other = step_seconds(first, signal), step_seconds(second, signal)
    if not one or not other:
        return None
    ratio = low = high = other / one
    if signal == "measured" and first.measurement and second.measurement:
        if rounds := _same_rounds(first, second):
            paired = compare_rows(rounds.first, rounds.second)
            return Ratio(signal=signal, ratio=paired.value, low=paired.low, high=paired.high)
        ratio, low, high = median_ratio(
            second.measurement["samples_s"], first.measurement["samples_s"]
        )
    error = SIGNAL_ERROR.get(signal, math.inf)
    return Ratio(signal=signal, ratio=ratio, low=low / error, high=high * error)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rounds:
    """What two candidates took in the rounds of one session, and its controls."""

    first: Rows
    second: Rows
    controls: Mapping[str, Any]


def _same_rounds(first: Record, second: Record) -> _Rounds | None:
    """Returns the rounds that both were timed in, if they were.

    A base may have been timed again beside one that came later: that one's record has its chains.
    """
    one, two = first.measurement or {}, second.measurement or {}
    if one.get("session") is not None and one.get("session") == two.get("session"):
        return _Rounds(first=one["chains"], second=two["chains"], controls=one["controls"])
    if (again := two.get("base_again")) and again["id"] == first.id:
        return _Rounds(first=again["chains"], second=two["chains"], controls=two["controls"])
    if (again := one.get("base_again")) and again["id"] == second.id:
        return _Rounds(first=one["chains"], second=again["chains"], controls=one["controls"])
    return None


def _incomparable(first: Record, second: Record) -> tuple[Verdict, str] | None:
    for record in (first, second):
        if record.failure:
            return "not comparable", f"{record.candidate}: {record.failure['text']}"
    for what in ("target", "workload", "layout"):
        if getattr(first, what) != getattr(second, what):
            return "not comparable", f"they differ in {what}"
    return None


def _verdict(first: Record, second: Record, ratios: Sequence[Ratio]) -> tuple[Verdict, str]:
    if first.hlo_sha256 and first.hlo_sha256 == second.hlo_sha256:
        return "tie", "the compiler made the same program of both"
    by_signal = {ratio.signal: ratio for ratio in ratios}
    if measured := by_signal.get("measured"):
        if rounds := _same_rounds(first, second):
            return _paired_verdict(measured, rounds.controls)
        return _measured_verdict(measured)
    hlo, compiler = by_signal.get("hlo"), by_signal.get("compiler")
    if hlo is None or compiler is None:
        return "inconclusive", "one signal only (hlo); two that agree, or a measurement, are needed"
    if (hlo.ratio > 1) != (compiler.ratio > 1):
        return (
            "inconclusive",
            f"signals disagree: hlo {hlo.ratio:.2f}, compiler {compiler.ratio:.2f}",
        )
    for ratio in (hlo, compiler):
        if not ratio.sign:
            error = SIGNAL_ERROR[ratio.signal]
            return (
                "inconclusive",
                f"{ratio.signal} ratio {ratio.ratio:.2f} is within its error of {error:.2f}",
            )
    return ("faster" if hlo.sign > 0 else "slower"), "hlo and compiler agree beyond their errors"


def _measured_verdict(measured: Ratio) -> tuple[Verdict, str]:
    interval = f"measured {measured.ratio:.3f} [{measured.low:.3f}, {measured.high:.3f}]"
    if measured.sign:
        return ("faster" if measured.sign > 0 else "slower"), interval
    if measured.low > 1 / _TIE and measured.high < _TIE:
        return "tie", f"{interval}, within {_TIE:.2f}"
    return "inconclusive", f"{interval} holds 1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Controls:
    """What a session found where the answer was known: ratios with their 99 % intervals.

    Attributes:
      same: The base against itself: 1 is right.
      planted: The base against itself, slower by `planted_share`.
    """

    same: Interval
    planted: Interval
    planted_share: float

    @property
    def complaint(self) -> str:
        """Why nothing can be said after these controls; empty if they passed."""
        if not (self.same.low and self.planted.low):
            return "no control: the base was not timed often enough against itself"
        if self.same.excludes(1.0):
            return f"control failed: the base against itself gave {_shown(self.same)}"
        if self.planted.excludes(1 + self.planted_share):
            return f"control failed: {self.planted_share:.0%} planted, {_shown(self.planted)} found"
        return ""


def read_controls(stored: Mapping[str, Any]) -> Controls:
    """Reads the controls of a measurement."""
    return Controls(
        same=paired_ratio(stored["same"], together=2, confidence=_CONTROL),
        planted=paired_ratio(stored["planted"], together=2, confidence=_CONTROL),
        planted_share=stored["planted_share"],
    )


def _paired_verdict(measured: Ratio, stored: Mapping[str, Any]) -> tuple[Verdict, str]:
    """The verdict of one session; none without its controls."""
    controls = read_controls(stored)
    if controls.complaint:
        return "inconclusive", controls.complaint
    interval = f"measured {measured.ratio:.4f} [{measured.low:.4f}, {measured.high:.4f}]"
    if measured.sign:
        return ("faster" if measured.sign > 0 else "slower"), interval
    if measured.low > 1 / _PAIRED_TIE and measured.high < _PAIRED_TIE:
        if not controls.planted.excludes(1.0):
            return "inconclusive", f"{interval}, but the planted slow-down was not seen either"
        return "tie", f"{interval}, within {_PAIRED_TIE - 1:.0%}"
    return "inconclusive", f"{interval} holds 1"


def _shown(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def best_records(records: Iterable[Record]) -> list[Record]:
    """Keeps one record a candidate, layout and target: the measured one where there are two."""
    best: dict[tuple[str, str, str], Record] = {}
    for record in records:
        key = (record.candidate, record.target, record.layout)
        if (
            key not in best
            or (record.measurement and not best[key].measurement)
            or best[key].failure
        ):
            best[key] = record
    return list(best.values())


def rival_groups(records: Iterable[Record]) -> dict[tuple[str, str], list[Record]]:
    """Groups records of rivals: same base, same target."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in best_records(records):
        groups.setdefault((record.base, record.target), []).append(record)
    for group in groups.values():
        group.sort(key=lambda record: (record.candidate != record.base, record.candidate))
    return groups


def compare_rivals(records: Iterable[Record]) -> list[Comparison]:
    """Compares every pair of rivals on every target."""
    groups = rival_groups(records).values()
    return [compare_records(a, b) for group in groups for a, b in itertools.combinations(group, 2)]


def compare_pair(records: Iterable[Record], first: str, second: str) -> list[Comparison]:
    """Compares two candidates by name on every target that has a record of both."""
    by_target: dict[str, dict[str, Record]] = {}
    for record in best_records(records):
        by_target.setdefault(record.target, {})[record.candidate] = record
    return [
        compare_records(found[first], found[second])
        for found in by_target.values()
        if first in found and second in found
    ]


def compare_to_first(records: Sequence[Record]) -> list[Comparison]:
    """Compares the first record with each of the others."""
    return [compare_records(records[0], record) for record in records[1:]]


def find_flips(comparisons: Iterable[Comparison]) -> list[Flip]:
    """Returns the pairs with a verdict for one side on a target and for the other elsewhere."""
    return _flips(comparisons, lambda comparison: comparison.winner)


def find_hints(comparisons: Iterable[Comparison]) -> list[Flip]:
    """Returns the pairs whose best signal changes its side, enough evidence or not."""

    def leader(comparison: Comparison) -> str | None:
        return {1: comparison.first, -1: comparison.second}.get(comparison.leaning)

    return _flips(comparisons, leader)


def _flips(
    comparisons: Iterable[Comparison], winner: Callable[[Comparison], str | None]
) -> list[Flip]:
    wins: dict[tuple[str, str], dict[str, list[str]]] = {}
    for comparison in comparisons:
        pair = (comparison.first, comparison.second)
        name = winner(comparison)
        if name and comparison.verdict not in ("tie", "not comparable"):
            wins.setdefault(pair, {}).setdefault(name, []).append(comparison.target)
    return [
        Flip(
            first=first,
            second=second,
            first_wins_on=tuple(by_name[first]),
            second_wins_on=tuple(by_name[second]),
        )
        for (first, second), by_name in wins.items()
        if len(by_name) == 2
    ]


def signal_agreement(comparisons: Iterable[Comparison]) -> dict[tuple[str, str], tuple[int, int]]:
    """Counts, for each two signals, (comparisons in which they agree in sign, all with both)."""
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for comparison in comparisons:
        if comparison.verdict == "not comparable":
            continue
        for one, other in itertools.combinations(
            [r for r in comparison.ratios if r.signal != "model"], 2
        ):
            agree, total = counts.get((one.signal, other.signal), (0, 0))
            same = (one.ratio > 1) == (other.ratio > 1)
            counts[one.signal, other.signal] = (agree + same, total + 1)
    return counts


def regrets(records: Iterable[Record]) -> list[Regret]:
    """Computes, for each two targets, the time lost by taking the winner of one to the other."""
    speeds: dict[str, dict[str, dict[str, float]]] = {}
    for (base, target), group in rival_groups(records).items():
        found = {r.candidate: r.samples_per_s for r in group if r.samples_per_s and not r.failure}
        if len(found) > 1:
            speeds.setdefault(base, {})[target] = found
    lost: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for base, by_target in speeds.items():
        for chosen_on, used_on in itertools.permutations(by_target, 2):
            there = by_target[used_on]
            winner = max(by_target[chosen_on], key=lambda name: by_target[chosen_on][name])
            if winner in there:
                lost.setdefault((chosen_on, used_on), []).append(
                    (max(there.values()) / there[winner] - 1, base)
                )
    return [
        Regret(
            chosen_on=chosen_on,
            used_on=used_on,
            worst=max(values)[0],
            mean=sum(value for value, _ in values) / len(values),
            worst_group=max(values)[1],
        )
        for (chosen_on, used_on), values in lost.items()
    ]
