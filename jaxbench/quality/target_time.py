"""Time to target: samples to a metric, from runs here, times seconds a sample, from a target."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from jaxbench.compare import Ratio, compare_pair
from jaxbench.record import Record
from jaxbench.stats import Interval

Curve = Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTime:
    """A network's time to the metric over its base's, on one target; below 1 it is faster.

    Attributes:
      samples: Ratio of samples, with its 95 % interval over pairs.
      seconds: Ratio of seconds a sample, by the signal `signal`, with that signal's interval.
      time: Their product; intervals of logarithms are added in quadrature.
    """

    name: str
    target: str
    samples: Interval
    seconds: Interval
    signal: str
    time: Interval


def samples_to(curve: Curve, metric: float) -> float:
    """Returns after how many samples a learning curve first reaches a metric; inf if never.

    Linear between the points at which the network was judged; the first point counts whole.
    """
    before: tuple[int, float] | None = None
    for samples, value in curve:
        if value >= metric:
            if before is None or value == before[1]:
                return float(samples)
            share = (metric - before[1]) / (value - before[1])
            return before[0] + share * (samples - before[0])
        before = (samples, value)
    return math.inf


def samples_ratio(pairs: Iterable[tuple[Curve, Curve]], metric: float) -> Interval:
    """Returns the ratio of samples to a metric, second over first, over paired runs.

    Geometric mean with Student's interval; open where a run never reaches the metric.
    """
    logs = []
    for base, own in pairs:
        wanted, needed = samples_to(base, metric), samples_to(own, metric)
        if not math.isfinite(wanted):
            continue  # the base itself fell short: the pair says nothing
        if not math.isfinite(needed):
            return Interval(value=math.inf, low=1.0, high=math.inf)
        logs.append(math.log(needed / wanted))
    if len(logs) < 2:
        return Interval(value=math.nan, low=0.0, high=math.inf)
    mean = statistics.fmean(logs)
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    reach = float(stats.t.ppf(0.975, len(logs) - 1)) * error
    return Interval(value=math.exp(mean), low=math.exp(mean - reach), high=math.exp(mean + reach))


def time_to_target(
    name: str, base: str, samples: Interval, records: Sequence[Record]
) -> list[TargetTime]:
    """Returns the ratio of times to target on each target that has records of both networks."""
    found = []
    for comparison in compare_pair(records, base, name):
        ratio = _best({one.signal: one for one in comparison.ratios})
        if ratio is None:
            continue
        seconds = Interval(value=ratio.ratio, low=ratio.low, high=ratio.high)
        found.append(
            TargetTime(
                name=name,
                target=comparison.target,
                samples=samples,
                seconds=seconds,
                signal=ratio.signal,
                time=_product(samples, seconds),
            )
        )
    return found


def _best(ratios: Mapping[str, Ratio]) -> Ratio | None:
    return next((ratios[name] for name in ("measured", "compiler", "hlo") if name in ratios), None)


def _product(one: Interval, two: Interval) -> Interval:
    value = one.value * two.value
    if not (math.isfinite(value) and one.low > 0 and math.isfinite(one.high)):
        return Interval(value=value, low=0.0, high=math.inf)
    up = math.hypot(math.log(one.high / one.value), math.log(two.high / two.value))
    down = math.hypot(math.log(one.value / one.low), math.log(two.value / two.low))
    return Interval(value=value, low=value * math.exp(-down), high=value * math.exp(up))
