"""Statistics computed from raw samples, never stored. NumPy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_RESAMPLES = 2000


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
