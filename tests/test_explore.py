"""Exploring a space whose prices are a formula: what is priced, in which order, how often."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxbench.search.explore import Explorer, Told
from jaxbench.search.front import pareto_front
from jaxbench.search.resolved import Resolved
from jaxbench.search.trials import SamplerName, Trials, changed_from

VALUES = tuple(range(1, 7))
NAMES = ("a", "b", "c", "d")
SPACE = {
    "name": "formula",
    "digest": "f" * 64,
    "choices": [{"name": name, "values": VALUES, "validity": "T1"} for name in NAMES],
    "bands": [{"quantity": "num_params"}],
    "base_point": dict.fromkeys(NAMES, 4),
}
TARGETS = ("cpu", "tpu")


class Formula:
    """Points and prices of a made-up space: parameters are a sum, times have many valleys."""

    space = SPACE
    by_forward = None

    def __init__(self) -> None:
        self.base = self.resolve(SPACE["base_point"])

    def resolve(self, point: Mapping[str, Any]) -> Resolved:
        violation = abs(sum(point.values()) - 16) - 3.0
        return Resolved(
            point=dict(point),
            described={"name": "-".join(str(point[name]) for name in NAMES)},
            layout="data",
            validity="T1",
            changes="",
            quantities={},
            violations=(violation,),
            blocks=(),
        )

    def refusal(self, found: Resolved) -> str | None:
        return "num_params out of band" if found.violations[0] > 0 else None

    def is_bounded(self, one: Resolved) -> bool:
        return False

    def fill(self, networks: Any) -> None:
        pass

    def price(self, one: Resolved) -> dict[str, float]:
        a, b, c, d = (one.point[name] for name in NAMES)
        wave = 0.3 * math.sin(7.0 * a + 3.0 * c * d)
        return {"cpu": 20 + a * b - 2 * c + d + wave, "tpu": 90 - 2 * a - b * c - d + wave}

    def slow_forward(self, one: Resolved) -> float:
        return 0.0


class Narrow(Formula):
    """Only networks of one sum are within the band, so that every single change leaves it."""

    def resolve(self, point: Mapping[str, Any]) -> Resolved:
        return replace(super().resolve(point), violations=(abs(sum(point.values()) - 16) - 0.5,))


def explore(
    folder: Path,
    budget: int,
    sampler: SamplerName = "nsga2",
    seed: int = 1,
    formula: Any = None,
) -> Told:
    formula = formula or Formula()
    explorer = Explorer(
        formula,
        formula,
        TARGETS,
        budget=budget,
        near=sampler != "random",
        seed=seed,
        progress=lambda what, done, total: None,
    )
    trials = Trials(
        folder, SPACE, TARGETS, sampler=sampler, seed=seed, violations=explorer.violations
    )
    try:
        return explorer.explore(trials)
    finally:
        trials.close()


def unpriced_neighbours(told: Told) -> set[str]:
    formula = Formula()
    found = {
        one.name
        for name in told.front
        for point in changed_from(told.networks[name].resolved.point, SPACE["choices"])
        if formula.refusal(one := formula.resolve(point)) is None
    }
    return found - set(told.networks) - {formula.base.name}


@pytest.mark.parametrize("seed", [1, 2])
def test_a_quarter_of_a_space_priced_holds_most_of_its_front(tmp_path: Path, seed: int) -> None:
    formula = Formula()
    points = (zip(NAMES, values, strict=True) for values in itertools.product(VALUES, repeat=4))
    resolved = [formula.resolve(dict[str, Any](point)) for point in points]
    valid = [one for one in resolved if formula.refusal(one) is None]
    truth = set(pareto_front({one.name: formula.price(one) for one in valid}))
    assert len(truth) > 10
    told = explore(tmp_path / "near", len(valid) // 4, seed=seed)
    assert len(truth & set(told.front)) > 0.75 * len(truth)
    # That is no accident: at random, as many hold few of it.
    drawn = explore(tmp_path / "random", len(valid) // 4, "random", seed=seed)
    assert len(truth & set(drawn.front)) < len(truth) / 2


def test_every_neighbour_of_the_front_gets_a_price(tmp_path: Path) -> None:
    assert not unpriced_neighbours(explore(tmp_path / "near", 400))
    assert unpriced_neighbours(explore(tmp_path / "random", 400, "random"))


def test_narrow_band_that_every_single_change_leaves_is_searched_whole(tmp_path: Path) -> None:
    points = (zip(NAMES, values, strict=True) for values in itertools.product(VALUES, repeat=4))
    num = sum(sum(dict[str, int](point).values()) == 16 for point in points)
    assert num == 125
    told = explore(tmp_path / "near", num - 1, formula=Narrow())
    assert len(told.networks) == num - 1  # all but the base
    # Half of the trials are neighbours, of which each is new; the sampler finds one in ten.
    assert told.num_trials < 4 * num


def test_points_two_changes_away_differ_in_two_choices() -> None:
    base = SPACE["base_point"]
    points = list(changed_from(base, SPACE["choices"], 2))
    assert len(points) == 6 * 5**2  # pairs of four choices, five other values each
    for point in points:
        assert sum(point[name] != base[name] for name in NAMES) == 2


def test_front_is_that_of_all_networks_priced(tmp_path: Path) -> None:
    told = explore(tmp_path, 200)
    times = {name: one.composed_s for name, one in told.networks.items()}
    assert sorted(told.front) == sorted(pareto_front(times))


def test_search_goes_on_where_it_was_and_asks_for_nothing_twice(tmp_path: Path) -> None:
    first = explore(tmp_path, 40)
    again = explore(tmp_path, 40)
    assert again.num_trials == first.num_trials
    assert again.networks.keys() == first.networks.keys()
    more = explore(tmp_path, 60)
    assert list(more.networks)[:40] == list(first.networks)
    assert len(more.networks) == 60
