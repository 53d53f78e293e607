"""Pareto sets over targets, and what it costs to choose on one target and train on another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

Times = Mapping[str, float]  # seconds of one sample, by target


def pareto_front(networks: Mapping[str, Times], *, slack: float = 0.0) -> list[str]:
    """Returns the networks that no other beats on every target, by more than a share `slack`.

    One is beaten if another is at least as fast everywhere and faster somewhere, once its own times
    are divided by 1 + slack.
    """
    return [
        name
        for name, own in networks.items()
        if not any(
            _beats(other, {target: s / (1 + slack) for target, s in own.items()})
            for key, other in networks.items()
            if key != name
        )
    ]


def _beats(one: Times, other: Times) -> bool:
    return all(one[target] <= s for target, s in other.items()) and any(
        one[target] < s for target, s in other.items()
    )


def winners(networks: Mapping[str, Times]) -> dict[str, str]:
    """Returns the fastest network on each target."""
    targets = sorted({target for times in networks.values() for target in times})
    return {
        target: min(networks, key=lambda name, at=target: networks[name][at]) for target in targets
    }


def regret_table(networks: Mapping[str, Times]) -> dict[tuple[str, str], float]:
    """Returns, for (chosen on, used on), time of the one's winner over that of the other's."""
    best = winners(networks)
    return {
        (chosen, used): networks[best[chosen]][used] / networks[best[used]][used]
        for chosen in best
        for used in best
    }


def least_worst(networks: Mapping[str, Times]) -> str:
    """Returns the network whose worst time over the target's best is the least: one for all."""
    best = {target: networks[name][target] for target, name in winners(networks).items()}

    def worst(name: str) -> float:
        return max(networks[name][target] / s for target, s in best.items())

    return min(networks, key=worst)


def choose_near_front(
    networks: Mapping[str, Times], *, base: str, most: int, slack: float
) -> list[str]:
    """Returns networks other than the base, at most so many, the most wanted first.

    First come one for all targets and each target's winner, whatever `most` is, then the others of
    the front, then those that are on it with `slack`; the faster ones first.
    """
    first = dict.fromkeys([least_worst(networks), *winners(networks).values()])

    def front(slack: float) -> list[str]:
        names = pareto_front(networks, slack=slack)
        return sorted(names, key=lambda name: math.prod(networks[name].values()))

    chosen = dict.fromkeys((*first, *front(0.0), *front(slack)))
    chosen.pop(base, None)
    return list(chosen)[: max(most, len(first))]


def coverage(truth: Sequence[str], kept: Sequence[str]) -> float:
    """Returns the share of a true front that a set holds."""
    return sum(name in set(kept) for name in truth) / len(truth) if truth else 1.0
