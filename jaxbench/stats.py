"""Statistics computed from raw samples, never stored. NumPy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_RESAMPLES = 2000
_PERMUTATIONS = 399
_LEAST_ROUNDS = 4
_TRIM = 0.35  # of each side: one chain in three is disturbed on a shared machine


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """An estimate with the bounds of its bootstrap interval."""

    value: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside."""
        return not self.low <= value <= self.high


def median_s(samples_s: Sequence[float]) -> float:
    """Returns the median in seconds."""
    return float(np.median(samples_s))


def median_ratio(first_s: Sequence[float], second_s: Sequence[float]) -> tuple[float, float, float]:
    """Returns the ratio of medians, first over second, with its 95 % percentile-bootstrap interval.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13.
    """
    generator = np.random.default_rng(0)
    first, second = np.asarray(first_s), np.asarray(second_s)
    resampled = [
        np.median(generator.choice(values, (_RESAMPLES, values.size)), axis=1)
        for values in (first, second)
    ]
    low, high = np.quantile(resampled[0] / resampled[1], [0.025, 0.975])
    return float(np.median(first) / np.median(second)), float(low), float(high)


def paired_ratio(
    ratios: Sequence[float],
    *,
    together: int = 1,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
) -> Interval:
    """Returns the ratio that ratios of one round each tell, with its bootstrap interval.

    exp of the trimmed mean of logarithms, 35 % of them left out on each side. Whole stretches are
    drawn, n^(1/3) long, for what happens to a machine lasts longer than a round.
    Below four rounds nothing is known: the interval is open.

    Args:
      ratios: In the order in which they were taken, each above 0.
      together: How many of them come from one round; stretches are of whole rounds.

    Source: Politis and Romano, "A circular block-resampling procedure", 1992; Wilcox,
      "Introduction to Robust Estimation and Hypothesis Testing", 2012, chapter 4.
    """
    logs = np.log(np.asarray(ratios, float))
    value = math.exp(float(_trimmed_mean(logs[None, :])[0])) if logs.size else math.nan
    if logs.size < _LEAST_ROUNDS * together:
        return Interval(value=value, low=0.0, high=math.inf)
    generator = np.random.default_rng(0)
    length = together * max(1, round((logs.size / together) ** (1 / 3)))
    starts = generator.integers(0, logs.size, (resamples, -(-logs.size // length)))
    chosen = (starts[:, :, None] + np.arange(length)) % logs.size
    drawn = _trimmed_mean(logs[chosen.reshape(resamples, -1)[:, : logs.size]])
    tail = (1 - confidence) / 2
    centre = math.log(value)
    low, high = centre + (np.quantile(drawn, [tail, 1 - tail]) - centre) * _widened(
        logs.size, length, 1 - tail
    )
    return Interval(value=value, low=math.exp(low), high=math.exp(high))


def _widened(size: int, length: int, quantile: float) -> float:
    """By how much a percentile interval of few values is too narrow.

    The root of n / (n - 1), and Student's quantile over the normal one, for the degrees of freedom
    of a trimmed mean or, where there are fewer, of the stretches. Source: Hesterberg, "What
    Teachers Should Know About the Bootstrap", 2015, section 4.3; Abramowitz and Stegun, 26.7.5.
    """
    freedom = max(min(size - 2 * int(size * _TRIM), size // length) - 1, 1)
    z = NormalDist().inv_cdf(quantile)
    student = 1 + (z**2 + 1) / (4 * freedom) + (5 * z**4 + 16 * z**2 + 3) / (96 * freedom**2)
    return math.sqrt(size / (size - 1)) * student


def trimmed_mean(values: Sequence[float]) -> float:
    """Returns the mean of what is left without 35 % on each side."""
    return float(_trimmed_mean(np.asarray(values, float)[None, :])[0])


def _trimmed_mean(rows: np.ndarray) -> np.ndarray:
    cut = int(rows.shape[1] * _TRIM)
    ordered = np.sort(rows, axis=1)
    return ordered[:, cut : rows.shape[1] - cut].mean(axis=1)


def change_point(samples: Sequence[float], *, least: int = 3) -> tuple[int, float]:
    """Returns where the level of a sequence changes most, and by which factor.

    The split after which medians of logarithms left and right explain most: it has the least sum of
    absolute deviations. The factor is level before over level after; at least `least` samples lie
    on each side, else the split is 0 and the factor 1.

    Source: Bai, "Least absolute deviation estimation of a shift", 1995.
    """
    logs = np.log(np.maximum(np.asarray(samples, float), 1e-12))
    splits = range(least, logs.size - least + 1)
    if not splits:
        return 0, 1.0
    best = min(splits, key=lambda split: _deviation(logs[:split]) + _deviation(logs[split:]))
    return best, float(np.exp(np.median(logs[:best]) - np.median(logs[best:])))


def _deviation(logs: np.ndarray) -> float:
    return float(np.abs(logs - np.median(logs)).sum())


def trend(samples: Sequence[float], *, length: int | None = None) -> tuple[float, float]:
    """Returns the level of the last third over that of the first, and how likely chance gives it.

    The ratio of medians, and a permutation test on mean ranks: stretches of `length` samples change
    places, n^(1/3) if left out, for what happens to a machine lasts longer than a sample. Below six
    samples chance explains all.

    Source: Good, "Permutation, Parametric, and Bootstrap Tests of Hypotheses", 2005, chapter 3.
    """
    values = np.maximum(np.asarray(samples, float), 1e-12)
    if values.size < 6:
        return 1.0, 1.0
    third = values.size // 3
    length = length or max(1, round(values.size ** (1 / 3)))
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    parts = [ranks[at : at + length] for at in range(0, ranks.size, length)]
    generator = np.random.default_rng(0)

    def rise(ranks: np.ndarray) -> float:
        return float(ranks[-third:].mean() - ranks[:third].mean())

    found = rise(ranks)
    drawn = [
        rise(np.concatenate([parts[at] for at in generator.permutation(len(parts))]))
        for _ in range(_PERMUTATIONS)
    ]
    more = sum(abs(value) >= abs(found) - 1e-9 for value in drawn)
    level = float(np.median(values[-third:]) / np.median(values[:third]))
    return level, (more + 1) / (_PERMUTATIONS + 1)


def two_modes(samples: Sequence[float]) -> tuple[float, float, float]:
    """Splits samples into two groups and tells how much of their variance that explains.

    Of a normal distribution 0.64, of a uniform one 0.75, of two narrow heaps near 1.

    Returns:
      (share of the variance of logarithms, share of samples in the smaller group, upper group's
      mean over the lower's).

    Source: Otsu, "A threshold selection method from gray-level histograms", 1979.
    """
    logs = np.sort(np.log(np.maximum(np.asarray(samples, float), 1e-12)))
    total = float(((logs - logs.mean()) ** 2).sum()) if logs.size > 1 else 0.0
    if total == 0:
        return 0.0, 0.0, 1.0
    sizes = np.arange(1, logs.size)
    below = np.cumsum(logs)[:-1] / sizes
    above = (logs.sum() - np.cumsum(logs)[:-1]) / (logs.size - sizes)
    between = sizes * (logs.size - sizes) / logs.size * (above - below) ** 2
    best = int(np.argmax(between))
    smaller = min(sizes[best], logs.size - sizes[best]) / logs.size
    return float(between[best] / total), float(smaller), float(np.exp(above[best] - below[best]))
