"""Ratios of candidates timed in the same rounds: rows made by hand, answers known."""

import math

import numpy as np
import pytest

from jaxbench.measure.paired import (
    chain_ratios,
    compare_rows,
    constant_share,
    step_samples_s,
)

Row = tuple[float, ...]
STEPS = 20


def rows_of(
    step_s: float,
    *,
    constant_s: float = 0.0,
    rounds: int = 20,
    noise: float = 0.0,
    seed: int = 0,
    steps: int = STEPS,
) -> list[Row]:
    """Two long chains a round, and one of one step in every fifth: t(n) = c + n s."""
    generator, rows = np.random.default_rng(seed), []
    for number in range(rounds):
        for num_steps in ([1] if number % 5 == 0 else []) + [steps] * 2:
            factor = math.exp(noise * generator.normal())
            rows.append((number, num_steps, (constant_s + num_steps * step_s) * factor))
    return rows


def test_chain_ratios_of_steady_chains_are_the_ratio_of_steps() -> None:
    base = rows_of(0.003)
    other = [(number, 2 * steps, 2 * seconds * 1.25) for number, steps, seconds in base]
    other = [row for row in other if row[1] > 2]
    assert chain_ratios(base, other) == pytest.approx([1.25] * 40, rel=1e-12)


def test_chain_ratios_leave_out_rounds_in_which_one_is_missing_or_incomplete() -> None:
    base = [(number, 4, 1.0 + number) for number in range(5) for _ in range(2)]
    other = [(number, 4, 2.0 + number) for number in range(5) for _ in range(2)]
    base.remove((1, 4, 2.0))
    base.remove((1, 4, 2.0))
    other.remove((3, 4, 5.0))
    assert chain_ratios(base, other) == pytest.approx([2, 2, 4 / 3, 4 / 3, 6 / 5, 6 / 5])


def test_chain_ratios_short_chains_say_nothing() -> None:
    base = rows_of(0.003, constant_s=0.05)
    assert chain_ratios(base, [row for row in base if row[1] == 1]) == []
    assert chain_ratios([], base) == []


def test_chain_ratios_are_first_over_first_and_last_over_last() -> None:
    base = [(0, 2, 1.0), (0, 2, 4.0), (1, 1, 9.0), (1, 2, 1.0), (1, 2, 1.0), (2, 2, 5.0)]
    other = [(0, 2, 3.0), (0, 2, 2.0), (1, 2, 2.0), (1, 1, 9.0), (1, 2, 1.5), (2, 2, 5.0)]
    assert chain_ratios(base, other) == pytest.approx([3.0, 0.5, 2.0, 1.5])


def test_chain_ratios_one_disturbed_chain_in_six_leaves_the_ratio() -> None:
    generator = np.random.default_rng(5)

    def rows(step_s: float) -> list[Row]:
        factors = np.where(generator.random(400) < 1 / 6, generator.uniform(1.2, 3, 400), 1.0)
        return [(place // 2, 4, 4 * step_s * factor) for place, factor in enumerate(factors)]

    found = compare_rows(rows(0.01), rows(0.0102))
    assert found.value == pytest.approx(1.02, abs=1e-6)


def drifting(speed: list[float]) -> tuple[list[Row], list[Row]]:
    """A round A B B A, each step of B 1.05 times one of A, at the given slownesses."""
    base = [(0, 10, slowness) for slowness in (speed[0], speed[3])]
    other = [(0, 10, 1.05 * slowness) for slowness in (speed[1], speed[2])]
    return base, other


@pytest.mark.parametrize("drift", [0.01, -0.05, 0.3])
def test_chain_ratios_drift_by_the_same_factor_each_chain_cancels_exactly(drift: float) -> None:
    found = chain_ratios(*drifting([math.exp(drift * place) for place in range(4)]))
    assert math.prod(found) ** 0.5 == pytest.approx(1.05, rel=1e-12)


def test_chain_ratios_drift_by_the_same_seconds_each_chain_cancels_to_its_square() -> None:
    found = math.prod(chain_ratios(*drifting([1 + 0.01 * place for place in range(4)]))) ** 0.5
    # (1 + d)(1 + 2 d) against 1 (1 + 3 d): half of 2 d^2 is left.
    assert found == pytest.approx(1.05, rel=1.01 * 0.01**2)


def test_constant_share_planted_constant_is_found_exactly() -> None:
    found = constant_share(rows_of(0.001, constant_s=0.002))
    # c / (c + K s) = 2 / 22.
    assert (found.low, found.value, found.high) == pytest.approx((2 / 22,) * 3, rel=1e-9)


def test_constant_share_planted_constant_lies_in_most_intervals() -> None:
    held = 0
    for seed in range(200):
        found = constant_share(rows_of(0.001, constant_s=0.002, rounds=60, noise=0.02, seed=seed))
        held += not found.excludes(2 / 22)
    # Expected are 190, give or take 3: four of those below.
    assert held >= 178


def test_constant_share_that_noise_hides_is_zero() -> None:
    rows = rows_of(0.001, constant_s=0.00002, rounds=40, noise=0.05, seed=1)
    found = constant_share(rows)
    assert (found.low, found.value, found.high) == (0.0, 0.0, 0.0)


def test_constant_share_without_any_constant_is_mostly_zero() -> None:
    resolved = sum(
        constant_share(rows_of(0.001, rounds=60, noise=0.02, seed=seed)).value > 0
        for seed in range(200)
    )
    # An interval of 95 % misses on one side in 2.5 % of cases: 5, and four deviations more.
    assert resolved <= 14


@pytest.mark.parametrize(
    "rows",
    [
        [],
        rows_of(0.001, constant_s=0.01, rounds=15),  # three rounds with short chains
        [row for row in rows_of(0.001, constant_s=0.01) if row[1] > 1],
        [row for row in rows_of(0.001, constant_s=0.01) if row[1] == 1],
    ],
)
def test_constant_share_too_little_to_tell_is_zero(rows: list[Row]) -> None:
    assert constant_share(rows).value == 0.0


def test_compare_rows_corrects_for_different_constants() -> None:
    base = rows_of(0.001, constant_s=0.001)
    other = rows_of(0.0011, constant_s=0.005)
    # Uncorrected it is (5 + 22) / (1 + 20) = 1.286.
    assert chain_ratios(base, other) == pytest.approx([27 / 21] * 40)
    found = compare_rows(base, other)
    assert (found.low, found.value, found.high) == pytest.approx((1.1,) * 3, rel=1e-9)


def test_compare_rows_corrects_for_chains_of_different_length() -> None:
    base = rows_of(0.001, constant_s=0.004, steps=10)
    other = rows_of(0.001, constant_s=0.004, steps=40)
    assert compare_rows(base, other).value == pytest.approx(1.0, rel=1e-9)


def test_compare_rows_doubt_about_the_constants_widens_the_interval() -> None:
    base = rows_of(0.001, constant_s=0.01, rounds=40, noise=0.01, seed=1)
    other = rows_of(0.001, constant_s=0.03, rounds=40, noise=0.01, seed=2)
    longs = [[row for row in rows if row[1] > 1] for rows in (base, other)]
    found, raw = compare_rows(base, other), compare_rows(*longs)
    assert found.high / found.low > raw.high / raw.low
    assert not found.excludes(1.0)


def test_compare_rows_equal_constants_change_nothing() -> None:
    for seed in range(100):
        base = rows_of(0.001, constant_s=0.02, rounds=60, noise=0.01, seed=2 * seed)
        other = rows_of(0.001, constant_s=0.02, rounds=60, noise=0.01, seed=2 * seed + 1)
        longs = [[row for row in rows if row[1] > 1] for rows in (base, other)]
        # Each by itself is seen in nearly every one; a wrong difference would be one of percents.
        assert compare_rows(base, other) == compare_rows(*longs)


COPIES = 4


def in_processes(rows: list[Row], spread: float, seed: int) -> list[Row]:
    """The same rows from four processes in turn, each with a speed of its own."""
    generator = np.random.default_rng(1000 + seed)
    speeds = np.exp(spread * generator.normal(size=COPIES))
    turns = np.concatenate([generator.permutation(COPIES) for _ in range(len(rows))])
    return [
        (number, steps, seconds * speeds[turns[int(number)]], 0.0, 0.0, int(turns[int(number)]))
        for number, steps, seconds in rows
    ]


@pytest.mark.parametrize("spread", [0.0, 0.002, 0.004, 0.02])
def test_compare_rows_processes_of_the_same_program_lie_apart_no_further_than_told(
    spread: float,
) -> None:
    held, held_by_rounds = 0, 0
    for seed in range(200):
        base, other = (
            in_processes(
                rows_of(0.03, rounds=60, noise=0.012, seed=2 * seed + one, steps=2),
                spread,
                2 * seed + one,
            )
            for one in (0, 1)
        )
        held += not compare_rows(base, other, resamples=400).excludes(1.0)
        one_process = [[row[:5] for row in rows] for rows in (base, other)]
        held_by_rounds += not compare_rows(*one_process, resamples=400).excludes(1.0)
    # Expected are 190, give or take 3: four of those below.
    assert held >= 178
    if spread >= 0.004:
        assert held_by_rounds < 170


def test_compare_rows_interval_of_processes_alike_is_wider_by_little() -> None:
    wider = []
    for seed in range(20):
        base, other = (
            in_processes(rows_of(0.03, rounds=60, noise=0.012, seed=one, steps=2), 0.0, one)
            for one in (2 * seed, 2 * seed + 1)
        )
        one_process = [[row[:5] for row in rows] for rows in (base, other)]
        one, two = compare_rows(base, other), compare_rows(*one_process)
        assert one.value == two.value
        wider.append(math.log(one.high / one.low) / math.log(two.high / two.low))
    # Student's quantile for six degrees of freedom over the normal one is 1.25.
    assert 1.2 < np.median(wider) < 1.6


def test_compare_rows_true_ratio_lies_in_most_intervals() -> None:
    held = 0
    for seed in range(200):
        base = rows_of(0.001, constant_s=0.002, rounds=30, noise=0.02, seed=2 * seed)
        other = rows_of(0.00103, constant_s=0.006, rounds=30, noise=0.02, seed=2 * seed + 1)
        held += not compare_rows(base, other).excludes(1.03)
    # Expected are 190, give or take 3: four of those below.
    assert held >= 178


def test_compare_rows_too_few_rounds_leave_everything_open() -> None:
    found = compare_rows(rows_of(0.001, rounds=3), rows_of(0.002, rounds=3))
    assert (found.low, found.value, found.high) == (0.0, pytest.approx(2.0), math.inf)


def test_step_samples_s_are_the_steps_without_the_constant() -> None:
    samples_s = step_samples_s(rows_of(0.001, constant_s=0.002))
    assert samples_s == pytest.approx([0.001] * 40, rel=1e-9)


def test_step_samples_s_unresolved_constant_stays_in() -> None:
    rows = rows_of(0.001, constant_s=0.002, rounds=4)
    assert step_samples_s(rows) == pytest.approx([0.0011] * 8, rel=1e-9)
    assert step_samples_s([]) == []
