"""Statistics of raw samples: exact answers, and how often intervals hold what was planted."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from jaxbench.stats import change_point, median_ratio, median_s, paired_ratio, two_modes

Noise = Callable[[np.random.Generator, int], np.ndarray]


def normal(generator: np.random.Generator, size: int) -> np.ndarray:
    return generator.normal(size=size)


def heavy_tailed(generator: np.random.Generator, size: int) -> np.ndarray:
    """Student's t with three degrees of freedom: the fourth moment is infinite."""
    return generator.standard_t(3, size=size)


def mixed(generator: np.random.Generator, size: int) -> np.ndarray:
    """One in ten is ten times as noisy."""
    return generator.normal(size=size) * np.where(generator.random(size) < 0.1, 10.0, 1.0)


def autocorrelated(generator: np.random.Generator, size: int) -> np.ndarray:
    """Each is 0.3 of the one before it, and something new."""
    found = generator.normal(size=size)
    found[0] /= math.sqrt(1 - 0.3**2)
    for index in range(1, size):
        found[index] += 0.3 * found[index - 1]
    return found


def test_paired_ratio_constant_ratios_give_it_exactly() -> None:
    found = paired_ratio([1.02] * 9)
    # exp and log only.
    assert (found.value, found.low, found.high) == pytest.approx((1.02,) * 3, rel=1e-12)
    assert found.excludes(1.0)
    assert not paired_ratio([1.0] * 9).excludes(1.0)


def test_paired_ratio_is_the_mean_of_the_middle_logarithms() -> None:
    logs = [-5.0, -4.0, -4.0, 0.01, 0.02, 0.03, 0.06, 3.0, 7.0, 9.0]
    assert paired_ratio(np.exp(logs).tolist()).value == pytest.approx(math.exp(0.03), rel=1e-12)


def test_paired_ratio_turned_round_gives_the_inverse_and_scales() -> None:
    ratios = np.exp(0.02 * normal(np.random.default_rng(2), 21))
    there, back = paired_ratio(ratios.tolist()), paired_ratio((1 / ratios).tolist())
    assert (back.value, back.low) == pytest.approx((1 / there.value, 1 / there.high), rel=2e-3)
    scaled = paired_ratio((3 * ratios).tolist())
    found = (scaled.value / 3, scaled.low / 3, scaled.high / 3)
    assert found == pytest.approx((there.value, there.low, there.high), rel=1e-12)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_paired_ratio_below_four_is_open(size: int) -> None:
    found = paired_ratio([1.5] * size)
    assert (found.low, found.high) == (0.0, math.inf)
    assert not found.excludes(1.0)
    assert math.isnan(found.value) if size == 0 else found.value == pytest.approx(1.5)


def test_paired_ratio_same_ratios_give_the_same_interval() -> None:
    ratios = np.exp(0.02 * normal(np.random.default_rng(3), 12)).tolist()
    assert paired_ratio(ratios) == paired_ratio(ratios)


@pytest.mark.parametrize("outlier", [5.0, 0.2])
def test_paired_ratio_a_quarter_of_outliers_moves_it_within_the_rest(outlier: float) -> None:
    good = np.exp(math.log(1.01) + 0.002 * normal(np.random.default_rng(4), 30))
    ratios = [*good.tolist(), *[outlier] * 10]
    np.random.default_rng(5).shuffle(ratios)
    assert good.min() <= paired_ratio(ratios).value <= good.max()


def test_paired_ratio_more_confidence_is_wider_and_more_rounds_are_narrower() -> None:
    ratios = np.exp(0.02 * normal(np.random.default_rng(6), 64)).tolist()
    wide, usual = paired_ratio(ratios, confidence=0.99), paired_ratio(ratios)
    assert wide.low < usual.low < usual.value < usual.high < wide.high
    few = paired_ratio(ratios[:16])
    # A quarter of the rounds: twice the width, and a little for Student; 1.3 leaves room for luck.
    assert few.high / few.low - 1 > 1.3 * (usual.high / usual.low - 1)


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("noise", [normal, heavy_tailed, mixed, autocorrelated])
def test_paired_ratio_95_percent_interval_holds_the_truth_that_often(
    noise: Noise, size: int
) -> None:
    generator, truth, sessions = np.random.default_rng(7), 1.03, 1000
    held = 0
    for _ in range(sessions):
        ratios = truth * np.exp(0.01 * noise(generator, size))
        held += not paired_ratio(ratios.tolist(), resamples=300).excludes(truth)
    # Counting 1000 alone has a standard deviation of 0.7 %: three of them below 95 %, and 3 % more
    # for what neighbours share, of which stretches of two or three rounds know a part.
    assert held / sessions >= (0.90 if noise is autocorrelated else 0.93)
    # An interval that nearly always holds says nothing; few rounds are on the safe side by 2 %.
    assert held / sessions <= 0.985


def test_change_point_planted_step_is_found_with_its_factor() -> None:
    noise = np.exp(0.01 * normal(np.random.default_rng(8), 30))
    split, factor = change_point((np.where(np.arange(30) < 12, 1.3, 1.0) * noise).tolist())
    assert split == 12
    # Medians of 12 and of 18 of 1 %: 0.5 % together.
    assert factor == pytest.approx(1.3, rel=0.015)


def test_change_point_step_upwards_gives_a_factor_below_1() -> None:
    assert change_point([1.0] * 5 + [2.0] * 7) == (5, pytest.approx(0.5))


def test_change_point_without_a_step_or_with_one_outlier_gives_1() -> None:
    noise = np.exp(0.001 * normal(np.random.default_rng(9), 40))
    assert change_point(noise.tolist())[1] == pytest.approx(1.0, abs=0.003)
    noise[17] = 9.0
    assert change_point(noise.tolist())[1] == pytest.approx(1.0, abs=0.003)


def test_change_point_too_few_samples_tell_nothing() -> None:
    assert change_point([1.0, 1.0, 5.0, 5.0, 5.0]) == (0, 1.0)
    assert change_point([1.0, 1.0, 5.0, 5.0, 5.0], least=2) == (2, pytest.approx(0.2))
    assert change_point([]) == (0, 1.0)


def test_change_point_leaves_least_samples_on_each_side() -> None:
    split, _ = change_point([9.0, *[1.0] * 19], least=4)
    assert 4 <= split <= 16


@pytest.mark.parametrize(
    ("draw", "share"),
    [
        (lambda generator: generator.normal(size=20_000), 2 / math.pi),
        (lambda generator: generator.uniform(size=20_000), 0.75),
    ],
)
def test_two_modes_one_heap_is_explained_as_mathematics_says(
    draw: Callable[[np.random.Generator], np.ndarray], share: float
) -> None:
    found, smaller, _ = two_modes(np.exp(0.01 * draw(np.random.default_rng(10))).tolist())
    assert found == pytest.approx(share, abs=0.02)
    assert smaller == pytest.approx(0.5, abs=0.05)


def test_two_modes_two_heaps_are_told_apart() -> None:
    noise = np.exp(0.003 * normal(np.random.default_rng(11), 50))
    share, smaller, apart = two_modes((noise * np.where(np.arange(50) % 5, 1.0, 1.1)).tolist())
    assert share > 0.98
    assert smaller == pytest.approx(0.2)
    assert apart == pytest.approx(1.1, rel=0.003)


@pytest.mark.parametrize("samples", [[], [1.0], [2.0] * 9])
def test_two_modes_of_no_variance_are_none(samples: list[float]) -> None:
    assert two_modes(samples) == (0.0, 0.0, 1.0)


def test_median_ratio_known_samples_gives_ratio_inside_its_interval() -> None:
    first, second = [3.0, 1.0, 2.0], [1.0, 0.5, 4.0]
    assert median_s(first) == 2.0
    ratio, low, high = median_ratio(first, second)
    assert ratio == 2.0
    # The outermost resamples are all one value: 1/4 and 3/0.5.
    assert 0.25 <= low < ratio < high <= 6.0
    assert median_ratio([2.0] * 5, [1.0] * 5) == (2.0, 2.0, 2.0)
    assert median_ratio(first, second) == (ratio, low, high)


def test_median_ratio_true_ratio_lies_in_most_intervals() -> None:
    generator = np.random.default_rng(1)
    held = 0
    for _ in range(60):
        draws = generator.normal(1.0, 0.05, (2, 15))
        _, low, high = median_ratio(draws[0] * 2, draws[1])
        held += low <= 2.0 <= high
    # Expected are 57; 51 or fewer would have a chance of one in three hundred.
    assert held >= 52
