"""Measurements of two sessions: whether one machine gave both, and the ratio of their steps.

Within a session drift cancels, between two it does not. A fixed product, timed throughout each
session, is the yardstick that tells how much faster or slower the machine itself became.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxbench.signals import SIGNAL_ERROR
from jaxbench.stats import Interval, median_ratio

_BUSY = 1.01
_MOST_TAKEN = 0.9
_LEAST = 4  # values: a bootstrap of fewer tells nothing
_FIELDS = ("processor", "cores", "memory_bytes", "device", "system")


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionRatio:
    """Step time after over step time before, and what was done about drift, in words."""

    ratio: Interval
    reason: str


def unlike_protocols(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns why two measurements cannot be set against each other, whatever the machine."""
    for when, measured in (("before", before), ("now", after)):
        if not measured["samples_s"]:
            return f"no step was timed {when}"
        if not (measured.get("environment") or {}).get("fingerprint"):
            return f"the machine that measured {when} is not recorded"
    protocols = [measured.get("protocol") for measured in (before, after)]
    if protocols[0] != protocols[1]:
        return f"timed by protocol {protocols[0]} before, {protocols[1]} now"
    return ""


def unlike_machines(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Returns in what the machines of two measurements differ; empty if it was one."""
    one, other = before["environment"], after["environment"]
    if one["fingerprint"] == other["fingerprint"]:
        return ""
    named = []
    for name in (*_FIELDS, "fingerprint"):
        texts = [_shown(name, environment.get(name)) for environment in (one, other)]
        if texts[0] != texts[1] and not (named and name == "fingerprint"):
            named.append(f"{name.removesuffix('_bytes')} {texts[0]} before, {texts[1]} now")
    return "; ".join(named)


def _shown(name: str, value: Any) -> str:
    if name == "memory_bytes" and value is not None:
        return f"{value / 2**30:.0f} GiB"
    return str(value)


def session_ratio(
    before: Mapping[str, Any], after: Mapping[str, Any], *, one_compiler: bool
) -> SessionRatio:
    """Returns the ratio of step times of two sessions on one machine.

    r = (median step after / before) / (median yardstick after / before); its interval adds both
    bootstrap intervals as independent errors of logarithms. Without yardsticks r is not divided,
    and the known error of measurements widens its interval.

    The device's compiler makes the yardstick too. If that has changed, nobody knows whether the
    yardstick moved with the machine or with the compiler: the interval then covers both readings.

    Args:
      before, after: Measurements with samples.
      one_compiler: Whether one compiler made both yardsticks.
    """
    load = max(_load_factor(measured) for measured in (before, after))
    steps = _widen(_ratio(after["samples_s"], before["samples_s"]), load)
    busy = f"; the machine was busy, {load - 1:.0%} left for that" if load > _BUSY else ""
    yardsticks = [measured.get("yardstick_s") or () for measured in (after, before)]
    if min(map(len, yardsticks)) < _LEAST:
        error = SIGNAL_ERROR["measured"]
        return SessionRatio(
            ratio=_widen(steps, error),
            reason=f"no yardstick, {error - 1:.0%} left for drift{busy}",
        )
    drift = _ratio(*yardsticks)
    known = _divide(steps, drift)
    if one_compiler:
        return SessionRatio(
            ratio=known, reason=f"yardstick {drift.value - 1:+.1%}, divided out{busy}"
        )
    both = Interval(
        value=known.value, low=min(known.low, steps.low), high=max(known.high, steps.high)
    )
    return SessionRatio(
        ratio=both,
        reason=f"yardstick {drift.value - 1:+.1%}, by the machine or by the changed compiler{busy}",
    )


def _load_factor(measured: Mapping[str, Any]) -> float:
    """By how much others may have slowed a session: one over the share of cores left by them."""
    usage = measured.get("usage") or {}
    share = usage.get("others_cores", 0.0) / max(usage.get("cores", 1), 1)
    return 1 / (1 - min(share, _MOST_TAKEN))


def _widen(one: Interval, factor: float) -> Interval:
    return Interval(value=one.value, low=one.low / factor, high=one.high * factor)


def _ratio(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Ratio of medians with its interval; open where there are too few values for one."""
    value, low, high = median_ratio(first, second)
    if min(len(first), len(second)) < _LEAST:
        return Interval(value=value, low=0.0, high=math.inf)
    return Interval(value=value, low=low, high=high)


def _divide(one: Interval, other: Interval) -> Interval:
    """One over other, for independent errors of the two."""
    value = one.value / other.value
    if not one.low:
        return Interval(value=value, low=0.0, high=math.inf)
    up = math.hypot(math.log(one.high / one.value), math.log(other.value / other.low))
    down = math.hypot(math.log(one.value / one.low), math.log(other.high / other.value))
    return Interval(value=value, low=value * math.exp(-down), high=value * math.exp(up))
