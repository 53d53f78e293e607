"""Statistics of the verdict: is a variant as good as its base, on paired runs?

Damage is what the metric lost against the base in the same pair, positive where the variant is
worse. With n pairs, mean damage d, deviation s of the damage and margin m:

    non-inferior   d + t s / sqrt(n) < m             one-sided 95 %
    equivalent     non-inferior, and d - t s / sqrt(n) > -m      (both one-sided tests, TOST)
    inferior       d - t s / sqrt(n) > m
    inconclusive   anything else

Sources: Schuirmann, "A comparison of the two one-sided tests procedure", 1987; Piaggio et al.,
"Reporting of noninferiority and equivalence randomized trials", JAMA 2012 (CONSORT); Holm, "A
simple sequentially rejective multiple test procedure", 1979.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

Word = Literal["non-inferior", "equivalent", "inferior", "inconclusive"]
CONFIDENCE = 0.95
MARGIN_SHARE = 0.25  # of the damage of the negative control


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """What paired runs say of one variant.

    Attributes:
      damages: One a pair; infinite where the variant diverged.
      low, high: One-sided bounds of the mean damage.
      p_value: That a variant worse by the margin would look as good as this.
      power: Chance of `non-inferior` for a variant exactly as good, at this deviation and margin.
    """

    damages: tuple[float, ...]
    margin: float
    mean: float
    deviation: float
    low: float
    high: float
    p_value: float
    power: float


def judge_pairs(damages: Sequence[float], margin: float) -> Paired:
    """Tests one variant's damages against the margin.

    Raises:
      ValueError: if there are fewer than two pairs, or the margin is not positive.
    """
    if len(damages) < 2 or not margin > 0:
        raise ValueError(f"{len(damages)} pairs and margin {margin:g}: need 2 and a positive one")
    if not all(map(math.isfinite, damages)):
        return Paired(
            damages=tuple(damages),
            margin=margin,
            mean=math.inf,
            deviation=math.inf,
            low=math.inf,
            high=math.inf,
            p_value=1.0,
            power=0.0,
        )
    n, mean = len(damages), statistics.fmean(damages)
    deviation = statistics.stdev(damages)
    error = max(deviation / math.sqrt(n), 1e-12)
    reach = float(stats.t.ppf(CONFIDENCE, n - 1)) * error
    return Paired(
        damages=tuple(damages),
        margin=margin,
        mean=mean,
        deviation=deviation,
        low=mean - reach,
        high=mean + reach,
        p_value=float(stats.t.cdf((mean - margin) / error, n - 1)),
        power=find_power(n, margin / max(deviation, 1e-12)),
    )


def find_power(num_pairs: int, ratio: float) -> float:
    """Returns the chance that an equal variant is found non-inferior.

    Args:
      num_pairs: Pairs of runs.
      ratio: Margin over the deviation of the paired difference.

    Source: noncentral t; e.g. Julious, "Sample sizes for clinical trials with Normal data", 2004.
    """
    critical = stats.t.ppf(CONFIDENCE, num_pairs - 1)
    return float(stats.nct.sf(critical, num_pairs - 1, ratio * math.sqrt(num_pairs)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Returns p-values adjusted for having been confirmed together."""
    adjusted, worst = {}, 0.0
    ordered = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p_value) in enumerate(ordered):
        worst = max(worst, min(1.0, p_value * (len(ordered) - rank)))
        adjusted[name] = worst
    return adjusted


def word_of(paired: Paired, adjusted_p: float) -> Word:
    """Returns the verdict of one variant, its p-value adjusted by `holm`."""
    if paired.low > paired.margin:
        return "inferior"
    if adjusted_p < 1 - CONFIDENCE and paired.high < paired.margin:
        return "equivalent" if paired.low > -paired.margin else "non-inferior"
    return "inconclusive"


def damage_trend(first: Paired | None, last: Paired | None) -> str:
    """Says how damage, in margins, goes from the first scale to the last (95 %, two-sided).

    By Welch's interval of the difference of both means.
    """
    if not first or not last or not (math.isfinite(first.mean) and math.isfinite(last.mean)):
        return "not known"
    change = last.mean / last.margin - first.mean / first.margin
    parts = [(one.deviation / one.margin) ** 2 / len(one.damages) or 1e-24 for one in (first, last)]
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(one.damages) - 1) for part, one in zip(parts, (first, last), strict=True)
    )
    reach = float(stats.t.ppf(0.975, freedom)) * math.sqrt(sum(parts))
    said = f"{change:+.2f} [{change - reach:+.2f}, {change + reach:+.2f}]"
    if abs(change) <= reach:
        return f"no trend seen: {said}"
    return f"{'grows' if change > 0 else 'shrinks'}: {said}"


def find_margin(control_damages: Sequence[float]) -> float | None:
    """Returns a quarter of the negative control's mean damage; None where it is not positive.

    None as well where it diverged: that says nothing about how much is tolerable.
    """
    margin = MARGIN_SHARE * statistics.fmean(control_damages)
    return margin if margin > 0 and math.isfinite(margin) else None


def extra_share(curve: Sequence[tuple[int, float]], margin: float) -> float | None:
    """Returns the margin as a share of samples: how many fewer give a metric worse by it.

    From the base's own learning curve, (samples, metric where more is better), by linear
    interpolation between its points; None where the curve does not reach so low.
    """
    samples, final = curve[-1]
    wanted = final - margin
    for (before, low), (after, high) in zip(reversed(curve[:-1]), reversed(curve[1:]), strict=True):
        if low <= wanted <= high:
            at = before + (after - before) * (wanted - low) / (high - low) if high > low else after
            return samples / at - 1 if at else None
    return None
