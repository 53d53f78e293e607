"""What the raw times of a session say: ratios of candidates that were timed in the same rounds.

Works on rows (round, steps, seconds, ...), as a session takes them and as records keep them. A row
of one step is there for what every chain costs whatever its length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxbench.stats import Interval, paired_ratio

Rows = Sequence[Sequence[float]]

LEAST_SHORT = 4  # rounds with short chains
_MOST_SHARE = 0.99


def chain_ratios(base: Rows, other: Rows) -> list[float]:
    """Returns other's step time over base's, two for each round in which both ran whole.

    The first chain of one over the first of the other, and the last over the last: their order is
    reversed in between, so drift comes in with both signs. What disturbs one chain spoils one ratio
    of two; in the mean of the round it would spoil the only one.
    """
    one, two = _chain_logs(base, short=False), _chain_logs(other, short=False)
    return [
        math.exp(b - a)
        for number in sorted(one.keys() & two.keys())
        for a, b in zip(one[number], two[number], strict=True)
    ]


def compare_rows(
    base: Rows, other: Rows, *, confidence: float = 0.95, resamples: int = 2000
) -> Interval:
    """Returns the ratio of other's step time to base's, with its interval.

    The constant parts of chains are taken out where they are resolved; what is not known of them
    widens the interval.
    """
    settings = {"confidence": confidence, "resamples": resamples}
    raw = paired_ratio(chain_ratios(base, other), together=2, **settings)
    one, two = (constant_share(rows, **settings) for rows in (base, other))
    if not raw.low or not (one.value or two.value):
        return raw
    value = raw.value * (1 - two.value) / (1 - one.value)
    widths = [
        (math.log(raw.high / raw.value), math.log(raw.value / raw.low)),
        *(
            (math.log((1 - share.low) / (1 - share.value)),) * 2
            for share in (one, two)
            if share.value
        ),
    ]
    up, down = (math.sqrt(sum(width[side] ** 2 for width in widths)) for side in (0, 1))
    return Interval(value=value, low=value * math.exp(-down), high=value * math.exp(up))


def constant_share(rows: Rows, *, confidence: float = 0.95, resamples: int = 2000) -> Interval:
    """Returns the share of a long chain's time that does not grow with its length.

    c / t(K), from t(n) = c + n s and chains of one step and of K steps in the same rounds:
    c / t(K) = (K t(1) / t(K) - 1) / (K - 1). Zero where its interval holds zero, as it does when a
    step is long beside what surrounds it.
    """
    nothing = Interval(value=0.0, low=0.0, high=0.0)
    steps = max((row[1] for row in rows), default=0)
    longs, shorts = _round_logs(rows, short=False), _round_logs(rows, short=True)
    both = sorted(longs.keys() & shorts.keys())
    if steps < 2 or len(both) < LEAST_SHORT:
        return nothing
    ratio = paired_ratio(
        [math.exp(shorts[number] - longs[number]) for number in both],
        confidence=confidence,
        resamples=resamples,
    )
    low, value, high = (
        min((bound - 1) / (steps - 1), _MOST_SHARE)
        for bound in (ratio.low, ratio.value, ratio.high)
    )
    return nothing if low <= 0 <= high else Interval(value=value, low=low, high=high)


def step_samples_s(rows: Rows) -> list[float]:
    """Returns seconds of one step, one for each long chain, without what every chain costs."""
    kept = 1 - constant_share(rows).value
    return [row[2] / row[1] * kept for row in rows if row[1] > 1]


def _round_logs(rows: Rows, *, short: bool) -> dict[int, float]:
    """Mean logarithm of the step time in each whole round."""
    return {
        number: sum(logs) / len(logs) for number, logs in _chain_logs(rows, short=short).items()
    }


def _chain_logs(rows: Rows, *, short: bool) -> dict[int, list[float]]:
    """Logarithms of the step times in each round that has as many chains as the fullest."""
    found: dict[int, list[float]] = {}
    for row in rows:
        if (row[1] == 1) == short:
            found.setdefault(int(row[0]), []).append(math.log(max(row[2] / row[1], 1e-9)))
    most = max(map(len, found.values()), default=0)
    return {number: logs for number, logs in found.items() if len(logs) == most}
