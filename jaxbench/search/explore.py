"""Asking and telling until as many networks as wanted have a price, near the front and far from it.

Every second batch holds neighbours: networks one choice away from one of the front, two choices
away where those are known, and then those of all other networks, the fastest first. Within narrow
bands, which one change alone nearly always leaves, it is these that find most of the space. The
sampler has the other batches, and learns from all. A search ends by itself only where both have
given next to nothing new for long.
"""

from __future__ import annotations

import collections
import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from jaxbench.run import Progress
from jaxbench.search.front import Times, pareto_front
from jaxbench.search.points import Points
from jaxbench.search.pricing import Pricing
from jaxbench.search.resolved import Resolved
from jaxbench.search.trials import Trials, changed_from

_BATCH = 16  # trials asked for at once
_STALE, _NEW = 1_000, 40  # trials that gave fewer new networks: the sampler has come to an end


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network that has a price. Seconds of one sample, by target."""

    resolved: Resolved
    composed_s: Times


@dataclass(kw_only=True, slots=True)
class Told:
    """What the trials of a search have given so far."""

    networks: dict[str, Network] = field(default_factory=dict)
    front: list[str] = field(default_factory=list)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    bounded: set[str] = field(default_factory=set)
    num_trials: int = 0

    def add(self, network: Network) -> None:
        """Takes in a network that has a price."""
        name = network.resolved.name
        self.networks[name] = network
        times = {one: self.networks[one].composed_s for one in (*self.front, name)}
        self.front = pareto_front(times)

    def knows(self, name: str) -> bool:
        """Whether a network has a price or a bound."""
        return name in self.networks or name in self.bounded


class Explorer:
    """The exploring part of one search."""

    def __init__(
        self,
        points: Points,
        pricing: Pricing,
        targets: Sequence[str],
        *,
        budget: int,
        near: bool,
        seed: int | None,
        progress: Progress,
    ) -> None:
        """Takes what it asks.

        Args:
          budget: Different networks that shall have a price.
          near: Whether the front's neighbours are priced too; else all is the sampler's.
          seed: Of the order of neighbours.
        """
        self._points, self._pricing, self._targets = points, pricing, targets
        self._budget, self._near, self._progress = budget, near, progress
        self._space, self._base = points.space, points.base
        self._random = random.Random(seed)
        self._exhausted: set[str] = set()  # networks all of whose neighbours were asked for

    def explore(self, trials: Trials) -> Told:
        """Asks and tells until as many networks as planned have a price."""
        told = Told()
        recent = collections.deque[int](maxlen=_STALE // _BATCH)
        enqueued = {self._base.name}
        near = False
        for _, point, values in trials.finished():
            self._sort_in(told, self._points.resolve(point), values)
        while len(told.networks) < self._budget and (
            len(recent) < _STALE // _BATCH or sum(recent) >= _NEW
        ):
            before = len(told.networks)
            most = min(_BATCH, self._budget - before)
            # Every second batch is of the front's neighbours, as long as there are new ones.
            if near:
                trials.enqueue(itertools.islice(self._neighbours(told, enqueued), most))
            near = not near and self._near
            asked = trials.ask(most)
            resolved = {number: self._points.resolve(point) for number, point in asked}
            self._pricing.fill([one for one in resolved.values() if self._is_worth_it(one)])
            for number, one in resolved.items():
                values = self._values(one)
                trials.tell(number, values)
                self._sort_in(told, one, values)
            recent.append(len(told.networks) - before)
            self._progress("networks priced", len(told.networks), self._budget)
        return told

    def _neighbours(self, told: Told, enqueued: set[str]) -> Iterator[Mapping[str, Any]]:
        """Yields points near priced networks that were never asked for: first those one choice away
        from the front, in any order, then those two away, then those of one other after the other,
        the fastest first."""
        front = [name for name in told.front if name not in self._exhausted]
        others = sorted(
            told.networks.keys() - set(told.front) - self._exhausted,
            key=lambda name: math.prod(told.networks[name].composed_s.values()),
        )
        for names in (front, *([name] for name in others)):
            for num_changes in (1, 2):
                yield from self._ring(told, names, num_changes, enqueued)
            # Nothing is forgotten, so nothing new will ever be there.
            self._exhausted.update(names)

    def _ring(
        self, told: Told, names: Sequence[str], num_changes: int, enqueued: set[str]
    ) -> Iterator[Mapping[str, Any]]:
        """Yields points so many choices away from some networks that were never asked for."""
        ring = [
            point
            for name in names
            for point in changed_from(
                told.networks[name].resolved.point, self._space["choices"], num_changes
            )
        ]
        self._random.shuffle(ring)
        for point in ring:
            one = self._points.resolve(point)
            if self._is_worth_it(one) and not (one.name in enqueued or told.knows(one.name)):
                enqueued.add(one.name)
                yield point

    def _sort_in(self, told: Told, one: Resolved | str, values: Sequence[float] | None) -> None:
        """Puts one told trial where it belongs; its values are those that were told."""
        told.num_trials += 1
        why = self._points.refusal(one)
        if why is not None or isinstance(one, str):
            told.refusals[str(why)] += 1
        elif values is None:
            told.refusals["a block does not compile, or forward_s is out of band"] += 1
        elif self._pricing.is_bounded(one):
            told.bounded.add(one.name)
        elif one.name != self._base.name:
            times = dict(zip(self._targets, values, strict=True))
            told.add(Network(resolved=one, composed_s=times))

    def violations(self, point: Mapping[str, Any]) -> list[float]:
        """What Optuna is told of constraints: positive where one is broken."""
        found = self._points.resolve(point)
        if isinstance(found, str):
            return [1e3] * max(1, len(self._space["bands"]))
        forward = [max(0.0, self._pricing.slow_forward(found))] * bool(self._pricing.by_forward)
        return [*found.violations, *forward] or [0.0]

    def _is_worth_it(self, one: Resolved | str) -> TypeGuard[Resolved]:
        """Whether a network is one of the space and may beat the base somewhere."""
        return not (
            isinstance(one, str) or self._points.refusal(one) or self._pricing.is_bounded(one)
        )

    def _values(self, one: Resolved | str) -> list[float] | None:
        """Returns what is told of a network: seconds of a sample by target, or none."""
        if isinstance(one, str) or self._points.refusal(one):
            return None
        if self._pricing.is_bounded(one):
            return [self._pricing.bounds(one)[target] for target in self._targets]
        times = self._pricing.price(one)
        if times is None or self._pricing.slow_forward(one) > 0:
            return None
        return [times[target] for target in self._targets]
