"""The gate for scripts: the records of two runs, before and after a change, held against rules.

Each pair of records says what became of a step's time, memory and FLOPs. What a rule cannot decide
is counted, never passed over.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxbench.errors import UsageError
from jaxbench.gate.change import Change, Step, Verdict, measured_step, predicted_step
from jaxbench.gate.pairing import Match, match_records
from jaxbench.record import Record

RuleName = Literal["slower", "memory", "flops", "failure"]
Signal = Literal["auto", "measured", "predicted"]

WORST_FIRST: tuple[Verdict, ...] = (
    "slower",
    "inconclusive",
    "not comparable",
    "missing",
    "same",
    "faster",
    "new",
)
_LOOKED_FOR = 0.03  # the slow-down that `inconclusive` is about, where no rule names one


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What must not happen to any pair.

    Attributes:
      name: `slower` (step time), `memory` (peak_bytes) and `flops` (hlo_flops) ask for growth by
        `share` at least; `failure`: what had a result now fails or is gone.
    """

    name: RuleName
    share: float = 0.0

    def __str__(self) -> str:
        return f"{self.name}:{self.share * 100:g}%" if self.share else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """One candidate on one target, before and after.

    Attributes:
      measured: Whether its records were to be measured.
      same_program: Whether the compiler made the same program both times.
      broken, kept: The rules that it breaks, and those that it keeps.
      undecided: The rules about which its numbers say neither.
    """

    candidate: str
    layout: str
    target: str
    measured: bool
    step: Step
    peak_bytes: Change = Change()
    hlo_flops: Change = Change()
    same_program: bool = False
    broken: tuple[Rule, ...] = ()
    undecided: tuple[Rule, ...] = ()
    kept: tuple[Rule, ...] = ()

    @property
    def verdict(self) -> Verdict:
        """What became of its step time."""
        return self.step.verdict


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionChange:
    """A package whose version differs between the sides of some pair."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """Every pair, the worst first, and what changed around them."""

    rules: tuple[Rule, ...]
    pairs: tuple[Pair, ...]
    versions: tuple[VersionChange, ...]

    @property
    def broken(self) -> tuple[Pair, ...]:
        """The pairs that break a rule; none if the gate is passed."""
        return tuple(pair for pair in self.pairs if pair.broken)

    def count(self, verdict: Verdict) -> int:
        """Returns the number of pairs with a verdict."""
        return sum(pair.verdict == verdict for pair in self.pairs)

    def to_json(self) -> dict[str, Any]:
        """Returns values for JSON; rules as they are written, open bounds as infinity."""
        names = ("broken", "undecided", "kept")
        pairs = [
            {
                **dataclasses.asdict(pair),
                **{name: [str(rule) for rule in getattr(pair, name)] for name in names},
            }
            for pair in self.pairs
        ]
        return {
            "passed": not self.broken,
            "rules": [str(rule) for rule in self.rules],
            "verdicts": {verdict: self.count(verdict) for verdict in WORST_FIRST},
            "versions": [dataclasses.asdict(version) for version in self.versions],
            "pairs": pairs,
        }


def parse_rules(text: str) -> tuple[Rule, ...]:
    """Reads rules such as `slower:3%,memory:5%,flops:1%,failure`.

    Raises:
      UsageError: if one is none, or a name comes twice.
    """
    rules: dict[str, Rule] = {}
    for part in (part.strip() for part in text.split(",")):
        rule = _parse_rule(part)
        if rule.name in rules:
            raise UsageError(
                f"Rules {text!r} name {rule.name} twice: which of both holds? Leave one out."
            )
        rules[rule.name] = rule
    return tuple(rules.values())


def _parse_rule(part: str) -> Rule:
    if part == "failure":
        return Rule(name="failure")
    found = re.fullmatch(r"(slower|memory|flops):(\d+(?:\.\d+)?)%", part, re.ASCII)
    share = float(found[2]) / 100 if found else 0.0
    if not found or not share:
        raise UsageError(
            f"{part!r} is no rule: a rule is slower, memory or flops with a share above 0%, or "
            "failure alone. Write for instance slower:3%,memory:5%,flops:1%,failure."
        )
    name: Any = found[1]
    return Rule(name=name, share=share)


def gate(
    baseline: Sequence[Record],
    new: Sequence[Record],
    rules: Sequence[Rule],
    *,
    signal: Signal = "auto",
) -> GateResult:
    """Holds the records of a new run against those of a baseline.

    A measured pair is slower if its whole interval lies above 1, and breaks `slower` if its ratio
    reaches the rule's share as well. An interval that holds both 1 and that share is inconclusive.

    Args:
      signal: By which step times are compared: `auto` is measured where records were measured,
        else predicted; `predicted` never asks whether records were measured.

    Raises:
      UsageError: if a measured pair comes from two machines, or nothing is in both runs.
    """
    matches = match_records(baseline, new, by_measured=signal != "predicted")
    if not any(match.before and match.after for match in matches):
        raise UsageError(
            f"None of {len(new)} new records has its candidate, layout and target among "
            f"{len(baseline)} of the baseline: nothing can be compared. "
            "Give two runs of one suite."
        )
    pairs = [_pair(match, rules, signal) for match in matches]
    return GateResult(
        rules=tuple(rules),
        pairs=tuple(sorted(pairs, key=_badness)),
        versions=_changed_versions(matches),
    )


def _badness(pair: Pair) -> tuple[Any, ...]:
    ratio = pair.step.ratio
    size = -math.inf if ratio is None else ratio.value
    order = WORST_FIRST.index(pair.verdict)
    return not pair.broken, order, -size, pair.candidate, pair.target, pair.layout


def _changed_versions(matches: Iterable[Match]) -> tuple[VersionChange, ...]:
    found = {
        (name, match.before.versions.get(name), match.after.versions.get(name))
        for match in matches
        if match.before and match.after
        for name in {**match.before.versions, **match.after.versions}
    }
    return tuple(
        VersionChange(name=name, before=before, after=after)
        for name, before, after in sorted(found, key=str)
        if before != after
    )


# --- One pair -------------------------------------------------------------------------------------


def _pair(match: Match, rules: Sequence[Rule], signal: Signal) -> Pair:
    before, after = match.before, match.after
    looked_for = next((rule.share for rule in rules if rule.name == "slower"), _LOOKED_FOR)
    pair = Pair(
        candidate=match.candidate,
        layout=match.layout,
        target=match.target,
        measured=match.measured,
        step=_step(match, signal, looked_for),
    )
    if before and after and not _difference(before, after):
        pair = dataclasses.replace(
            pair,
            peak_bytes=_change(before, after, "compiled", "memory", "peak_bytes"),
            hlo_flops=_change(before, after, "cost", "hlo_flops"),
            same_program=bool(before.hlo_sha256) and before.hlo_sha256 == after.hlo_sha256,
        )
    if not before or before.failure:
        return pair  # there is nothing that could have become worse
    decided = {rule: _breaks(rule, pair, after) for rule in rules}
    return dataclasses.replace(
        pair,
        broken=tuple(rule for rule, breaks in decided.items() if breaks),
        undecided=tuple(rule for rule, breaks in decided.items() if breaks is None),
        kept=tuple(rule for rule, breaks in decided.items() if breaks is False),
    )


def _breaks(rule: Rule, pair: Pair, after: Record | None) -> bool | None:
    """Whether a pair with a result before breaks a rule; None if its numbers do not say."""
    if rule.name == "failure":
        return after is None or bool(after.failure)
    limit = 1 + rule.share
    if rule.name == "slower":
        ratio = pair.step.ratio
        if ratio is None:
            return None
        if ratio.low > 1 and ratio.value >= limit:
            return True
        return None if ratio.high >= limit else False
    grown = (pair.peak_bytes if rule.name == "memory" else pair.hlo_flops).ratio
    return None if grown is None else grown >= limit


def _change(before: Record, after: Record, *path: str) -> Change:
    return Change(before=_number(before, path), after=_number(after, path))


def _number(record: Record, path: Sequence[str]) -> float | None:
    value: Any = getattr(record, path[0])
    for name in path[1:]:
        value = (value or {}).get(name)
    return value


def _step(match: Match, signal: Signal, looked_for: float) -> Step:
    """What became of a match's step time; of one alone or failed, that it is so."""
    before, after = match.before, match.after
    if before is None:
        failure = after.failure if after else None
        return Step(verdict="new", reason=_failed("it fails", failure) if failure else "")
    if after is None:
        return Step(verdict="missing", reason="the new run has no record of it")
    if after.failure:
        when = "fails as before" if before.failure else "fails now"
        return Step(verdict="not comparable", reason=_failed(when, after.failure))
    if before.failure:
        return Step(verdict="not comparable", reason=_failed("failed before", before.failure))
    if difference := _difference(before, after):
        return Step(verdict="not comparable", reason=difference)
    if signal == "predicted" or (signal == "auto" and not match.measured):
        return predicted_step(before, after)
    return measured_step(before, after, looked_for=looked_for)


def _failed(when: str, failure: Mapping[str, Any]) -> str:
    return f"{when}: {failure['stage']}: {failure['error']}: {failure['text']}"


def _difference(before: Record, after: Record) -> str:
    """In what two records of one name are not the same thing."""
    for what in ("workload", "config"):
        one, other = getattr(before, what), getattr(after, what)
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if names:
            return f"they differ in {what}: {', '.join(names)}"
    return ""
