"""A step time before and after a change: their ratio by one signal, and what it says.

Measured, where both were measured on one machine; predicted, where one predictor made both: such a
ratio is exact. Anything else is not comparable, with the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from jaxbench.errors import UsageError
from jaxbench.gate.drift import session_ratio, unlike_machines, unlike_protocols
from jaxbench.record import Record
from jaxbench.stats import Interval, median_s
from jaxbench.target import parse_target

Verdict = Literal["slower", "faster", "same", "inconclusive", "not comparable", "missing", "new"]

_NO_COMPILER = {"python", "flax", "optax"}  # among versions


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """A number before and after; None where it is not known."""

    before: float | None = None
    after: float | None = None

    @property
    def ratio(self) -> float | None:
        """After over before."""
        if self.before is None or self.after is None:
            return None
        if not self.before:
            return math.inf if self.after else 1.0
        return self.after / self.before


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Step times of a pair by one signal, and what they say.

    Attributes:
      ratio: After over before, above 1 if it became slower. None where they are not comparable.
    """

    verdict: Verdict
    reason: str = ""
    signal: Literal["measured", "predicted"] | None = None
    step_s: Change = Change()
    ratio: Interval | None = None


def predicted_step(before: Record, after: Record) -> Step:
    """Compares the predictions of two records, exactly."""
    one, other = before.prediction, after.prediction
    if not one or not other:
        return Step(verdict="not comparable", reason="not predicted")
    step_s = Change(before=one["step_s"], after=other["step_s"])
    unlike = _unlike_predictions(before.target, one, other)
    if unlike or not step_s.before or not step_s.after:
        return Step(
            verdict="not comparable",
            reason=unlike or "a step of no time was predicted",
            signal="predicted",
            step_s=step_s,
        )
    value = step_s.after / step_s.before
    value = 1.0 if math.isclose(value, 1.0, rel_tol=1e-9) else value  # rounding only
    return Step(
        verdict="slower" if value > 1 else "faster" if value < 1 else "same",
        signal="predicted",
        step_s=step_s,
        ratio=Interval(value=value, low=value, high=value),
    )


def _unlike_predictions(target: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Returns why a ratio of two predictions would not be exact."""
    predictors = [prediction.get("predictor") for prediction in (one, other)]
    if predictors[0] != predictors[1] or predictors[0] is None:
        return f"predicted by {predictors[0]} before, by {predictors[1]} now"
    peaks = [prediction.get("cpu_peaks") for prediction in (one, other)]
    if parse_target(target).kind == "cpu" and (peaks[0] != peaks[1] or peaks[0] is None):
        return "predictions for a CPU rest on peaks that were measured apart for each run"
    return ""


def measured_step(before: Record, after: Record, *, looked_for: float) -> Step:
    """Compares the measurements of two records.

    Args:
      looked_for: The slow-down, as a share, that has to be ruled out for `same`.

    Raises:
      UsageError: if two machines gave them.
    """
    one, other = before.measurement, after.measurement
    if not one or not other:
        return Step(verdict="not comparable", reason="not measured")
    times = [
        median_s(measured["samples_s"]) if measured["samples_s"] else None
        for measured in (one, other)
    ]
    step = Step(
        verdict="not comparable",
        reason=unlike_protocols(one, other),
        signal="measured",
        step_s=Change(before=times[0], after=times[1]),
    )
    if step.reason:
        return step
    if unlike := unlike_machines(one, other):
        raise UsageError(
            f"{before.candidate} on {before.target} was measured on two machines: {unlike}. Their "
            "step times say nothing about what changed. Measure both runs on one machine, or "
            "compare predictions only (signal predicted)."
        )
    found = session_ratio(one, other, one_compiler=_compiler(before) == _compiler(after))
    return dataclasses.replace(
        step,
        verdict=_verdict(found.ratio, looked_for),
        reason=found.reason,
        ratio=found.ratio,
    )


def _compiler(record: Record) -> dict[str, str]:
    """Versions of what makes the device's programs."""
    return {name: text for name, text in record.versions.items() if name not in _NO_COMPILER}


def _verdict(ratio: Interval, looked_for: float) -> Verdict:
    """`same` says that the ratio may be 1, and that the slow-down looked for is ruled out."""
    if ratio.low > 1:
        return "slower"
    if ratio.high < 1:
        return "faster"
    return "inconclusive" if ratio.high >= 1 + looked_for else "same"
