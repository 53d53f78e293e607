"""Records of two runs, paired: the same candidate, layout and target, before and after."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxbench.record import Record

Place = tuple[str, str, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """One thing that was asked for, before and after; None where a run has no record of it."""

    candidate: str
    layout: str
    target: str
    measured: bool
    before: Record | None
    after: Record | None


def match_records(
    before: Iterable[Record], after: Iterable[Record], *, by_measured: bool = True
) -> list[Match]:
    """Pairs the records of two runs, in the order of the first.

    Of several records of one thing, made with other versions or from another source, the one that
    was appended last counts.

    Args:
      by_measured: Keep measured and unmeasured records apart.
    """
    befores, afters = _by_place(before), _by_place(after)
    matches = []
    for place in {**befores, **afters}:
        old, new = befores.get(place, []), afters.get(place, [])
        for measured in _kinds_to_pair([*old, *new]) if by_measured else [None]:
            candidate, layout, target = place
            matches.append(
                Match(
                    candidate=candidate,
                    layout=layout,
                    target=target,
                    measured=bool(measured),
                    before=_last(old, measured),
                    after=_last(new, measured),
                )
            )
    return matches


def _by_place(records: Iterable[Record]) -> dict[Place, list[Record]]:
    places: dict[Place, list[Record]] = {}
    for record in records:
        places.setdefault((record.candidate, record.layout, record.target), []).append(record)
    return places


def _kinds(record: Record) -> set[bool]:
    """Whether it was to be measured. Both, if it failed in the stages that all go through."""
    if record.measurement or (record.failure and record.prediction):
        return {True}
    return {True, False} if record.failure else {False}


def _kinds_to_pair(records: Iterable[Record]) -> list[bool]:
    sure = {kind for record in records if len(kinds := _kinds(record)) == 1 for kind in kinds}
    return sorted(sure) or [False]


def _last(records: Iterable[Record], measured: bool | None) -> Record | None:
    kept = [record for record in records if measured is None or measured in _kinds(record)]
    return kept[-1] if kept else None
