"""What the raw times of a session say: ratios of candidates that were timed in the same rounds.

Works on rows (round, steps, seconds, ..., copy), as a session takes them and as records keep them.
A row of one step is there for what every chain costs whatever its length; a row's last value tells
which of a candidate's processes it comes from, and rows of fewer values come from one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from scipy.special import ndtri, stdtrit

from jaxbench.stats import Interval, paired_ratio, trimmed_mean

Rows = Sequence[Sequence[float]]

LEAST_SHORT = 4  # rounds with short chains
_BEYOND_DOUBT = 0.999
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

    How far processes of one program lie apart widens the interval, where each side lived in more
    than one. The constant parts of chains are taken out where they are seen to differ; what is not
    known of them widens it, too.
    """
    raw = paired_ratio(
        chain_ratios(base, other), together=2, confidence=confidence, resamples=resamples
    )
    if not raw.low:
        return raw
    up, down = math.log(raw.high / raw.value), math.log(raw.value / raw.low)
    wider = _between_processes(base, other, (up + down) / 2, confidence)
    value, doubt = _without_constants(base, other, confidence, resamples)
    up, down = (math.hypot(wider * width, doubt) for width in (up, down))
    value *= raw.value
    return Interval(value=value, low=value * math.exp(-down), high=value * math.exp(up))


def _between_processes(base: Rows, other: Rows, half_width: float, confidence: float) -> float:
    """Returns by what factor an interval that knows of rounds alone is too narrow.

    Each process is a draw of its own, alike for all its rounds. The means over the rounds of each
    process tell how far those draws spread; what the noise of rounds adds to that is taken off.
    Student's quantile is that of so few processes.

    Args:
      half_width: Of the logarithm, at `confidence`, by rounds alone.

    Source: Kalibera and Jones, "Rigorous Benchmarking in Reasonable Time", 2013, section 6.
    """
    one, two = _chain_logs(base, short=False), _chain_logs(other, short=False)
    ratios = {
        number: [b - a for a, b in zip(one[number], two[number], strict=True)]
        for number in one.keys() & two.keys()
    }
    spreads = [_spread_of_copies(rows, ratios) for rows in (base, other)]
    freedom = sum(num - 1 for num, _ in spreads)
    if min(num for num, _ in spreads) < 2 or not half_width:
        return 1.0
    normal = float(ndtri((1 + confidence) / 2))
    noise = (half_width / normal) ** 2
    processes = max(0.0, sum(variance / num for num, variance in spreads) - 2 * noise)
    student = float(stdtrit(freedom, (1 + confidence) / 2))
    return student / normal * math.sqrt(1 + processes / noise)


def _spread_of_copies(rows: Rows, ratios: Mapping[int, Sequence[float]]) -> tuple[int, float]:
    """Returns (processes, variance of the mean ratio from one of them to the next)."""
    by_copy: dict[int, list[float]] = {}
    for number, copy in {int(row[0]): int(row[5]) for row in rows if len(row) > 5}.items():
        by_copy.setdefault(copy, []).extend(ratios.get(number, ()))
    means = [trimmed_mean(logs) for logs in by_copy.values() if logs]
    return len(means), statistics.variance(means) if len(means) > 1 else 0.0


def _without_constants(
    base: Rows, other: Rows, confidence: float, resamples: int
) -> tuple[float, float]:
    """Returns (factor that takes constant parts out of a ratio of chains, doubt of its logarithm).

    Constants that are the same share of both leave the ratio as it is, so it is their difference
    that must be seen, beyond doubt as a wrong one would spoil a good ratio: 1 and 0 else.
    """
    one, two = (_constants(rows) for rows in (base, other))
    both = sorted(one.keys() & two.keys())
    if len(both) < LEAST_SHORT:
        return 1.0, 0.0
    apart = [math.exp(two[number] - one[number]) for number in both]
    if not paired_ratio(apart, confidence=_BEYOND_DOUBT, resamples=resamples).excludes(1.0):
        return 1.0, 0.0
    kept = [
        1 - min(trimmed_mean([shares[number] for number in both]), _MOST_SHARE)
        for shares in (one, two)
    ]
    found = paired_ratio(apart, confidence=confidence, resamples=resamples)
    return kept[1] / kept[0], math.log(found.high / found.low) / 2 / min(kept)


def _constants(rows: Rows) -> dict[int, float]:
    """The share of a long chain that does not grow with its length, by each round with both."""
    steps = max((row[1] for row in rows), default=0)
    longs, shorts = _round_logs(rows, short=False), _round_logs(rows, short=True)
    if steps < 2:
        return {}
    return {
        number: (math.exp(shorts[number] - longs[number]) - 1) / (steps - 1)
        for number in longs.keys() & shorts.keys()
    }


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
