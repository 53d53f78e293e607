"""What is judged and what is found, as values; and what that means in time on a target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from jaxbench.errors import UsageError
from jaxbench.quality.target_time import TargetTime, samples_ratio, time_to_target
from jaxbench.quality.verdict import Paired
from jaxbench.record import Record

Word = Literal[
    "exact", "non-inferior", "equivalent", "inferior", "inconclusive", "the test cannot tell"
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is trained.

    Attributes:
      pairs: Fresh seeds; two at least.
      margin: Of the metric, positive; None for a quarter of the negative control's damage.
      together: Seeds trained side by side in one program.
      rollout: Scenes that each confirmed network drives in closed loop.
    """

    pairs: int = 6
    steps: int = 300
    batch: int = 8
    checks: int = 5
    margin: float | None = None
    together: int = 1
    rollout: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 2:
            raise UsageError(
                f"{self.pairs} pairs have no deviation to judge by. Give --pairs 2 or more."
            )
        if self.margin is not None and not self.margin > 0:
            raise UsageError(
                f"A margin of {self.margin:g} lets nothing pass. Give a positive --margin, or none "
                "for a quarter of the negative control's damage."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is said of one network against the base.

    Attributes:
      role: `variant`, or which control it is.
      paired: None where it was not confirmed.
    """

    name: str
    role: Literal["variant", "negative control", "rewrite control"]
    validity: str
    changes: str
    word: Word
    reason: str
    learning_rate: float | None = None
    paired: Paired | None = None
    metrics: tuple[float | None, ...] = ()
    rollouts: tuple[Mapping[str, float] | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """All verdicts of one base on one data set.

    Attributes:
      complaint: Why the test cannot tell; empty if the controls passed.
      margin_samples: The margin as a share of samples, from the base's learning curve.
      curves: (samples, metric) of every confirmed network, the base among them, pair by pair.
    """

    base: str
    task: str
    metric: str
    data_digest: str
    plan: Plan
    margin: float | None
    margin_samples: float | None
    base_metrics: tuple[float | None, ...]
    base_curve: tuple[tuple[int, float], ...]
    complaint: str
    verdicts: tuple[Verdict, ...]
    base_rollouts: tuple[Mapping[str, float] | None, ...] = ()
    curves: Mapping[str, tuple[tuple[tuple[int, float], ...], ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)


def target_times(judged: Judged, records: Sequence[Record]) -> list[TargetTime]:
    """Returns times to target of all confirmed variants, where there are records of both."""
    own = judged.curves.get(judged.base, ())
    if not own or judged.margin is None:
        return []
    reached = [curve[-1][1] for curve in own if curve]
    target = statistics.fmean(reached) - judged.margin
    found = []
    for verdict in judged.verdicts:
        curves = judged.curves.get(verdict.name, ())
        if verdict.role == "variant" and any(curves):
            samples = samples_ratio(zip(own, curves, strict=True), target)
            found += time_to_target(verdict.name, judged.base, samples, records)
    return found
