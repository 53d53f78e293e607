"""The verdict's statistics against known answers, and how often they are wrong."""

import math

import numpy as np
import pytest

from jaxbench.errors import DataError
from jaxbench.quality.control import halve_width, scale_width
from jaxbench.quality.verdict import (
    damage_trend,
    extra_share,
    find_margin,
    find_power,
    holm,
    judge_pairs,
    word_of,
)


# Published in the protocol's source note: pairs, margin over deviation, power.
@pytest.mark.parametrize(("pairs", "ratio", "power"), [(3, 3, 0.93), (6, 1.5, 0.93), (8, 1, 0.81)])
def test_find_power_of_the_paired_one_sided_test(pairs: int, ratio: float, power: float) -> None:
    assert find_power(pairs, ratio) == pytest.approx(power, abs=0.01)  # two digits


def test_find_power_is_what_simulated_tests_reach() -> None:
    generator = np.random.default_rng(0)
    found = [
        word_of(paired, paired.p_value) != "inconclusive"
        for _ in range(2000)
        for paired in [judge_pairs(generator.normal(0, 1, 6).tolist(), 1.5)]
    ]
    assert np.mean(found) == pytest.approx(find_power(6, 1.5), abs=0.03)


def test_judge_pairs_bounds_are_students() -> None:
    paired = judge_pairs([0.01, 0.03, 0.02], 0.1)
    # t(0.95, 2) = 2.919986; mean 0.02, deviation 0.01.
    reach = 2.919986 * 0.01 / math.sqrt(3)
    assert (paired.mean, paired.deviation) == (pytest.approx(0.02), pytest.approx(0.01))
    assert paired.high == pytest.approx(0.02 + reach, rel=1e-5)
    assert paired.low == pytest.approx(0.02 - reach, rel=1e-5)


@pytest.mark.parametrize(
    ("damages", "word"),
    [
        ([0.0, 0.01, -0.01, 0.0], "equivalent"),
        ([-0.5, -0.52, -0.48, -0.5], "non-inferior"),
        ([0.5, 0.52, 0.48, 0.5], "inferior"),
        ([0.1, 0.09, 0.11, 0.1], "inconclusive"),
        ([1.0, -1.0, 0.5, -0.5], "inconclusive"),
        ([0.0, 0.0, math.inf, 0.0], "inferior"),
    ],
)
def test_word_of_damages_with_a_margin_of_a_tenth(damages: list[float], word: str) -> None:
    paired = judge_pairs(damages, 0.1)
    assert word_of(paired, paired.p_value) == word


def test_variant_worse_by_the_margin_passes_once_in_twenty() -> None:
    generator = np.random.default_rng(1)
    passed = 0
    for _ in range(4000):
        paired = judge_pairs(generator.normal(0.1, 0.05, 6).tolist(), 0.1)
        passed += word_of(paired, paired.p_value) in ("non-inferior", "equivalent")
    assert passed / 4000 == pytest.approx(0.05, abs=0.012)


def test_holm_by_hand() -> None:
    # Holm 1979: the least p times three, the next times two, none below one before it.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert found == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def test_holm_can_turn_a_verdict_open() -> None:
    paired = judge_pairs([0.0, 0.05, -0.05, 0.04], 0.1)
    assert word_of(paired, paired.p_value) == "equivalent"
    assert word_of(paired, min(1.0, 4 * paired.p_value)) == "inconclusive"


def test_margin_is_a_quarter_of_the_controls_damage() -> None:
    assert find_margin([0.4, 0.8]) == pytest.approx(0.15)
    assert find_margin([-0.1, 0.05]) is None
    assert find_margin([math.inf]) is None


def test_extra_share_reads_the_margin_off_the_curve() -> None:
    curve = [(100, 0.5), (200, 0.7), (400, 0.8)]
    # 0.75 is reached halfway between 200 and 400: a third more samples.
    assert extra_share(curve, 0.05) == pytest.approx(1 / 3)
    assert extra_share(curve, 0.5) is None


def test_judge_pairs_needs_two_pairs_and_a_margin() -> None:
    for damages, margin in (([0.1], 0.1), ([0.1, 0.2], 0.0)):
        with pytest.raises(ValueError, match="need 2 and a positive one"):
            judge_pairs(damages, margin)


def test_halve_width_halves_widths_alone() -> None:
    config = {"stem": 16, "camera_channels": (32, 64), "camera_depths": (2, 2), "num_bins": 16}
    described = {"name": "net", "config": config, "validity": "base", "replaces": ""}
    halved = halve_width(described)
    assert halved["config"] == {**config, "stem": 8, "camera_channels": (16, 32)}
    assert halved["name"] == "net-half"
    assert config["stem"] == 16


def test_scale_width_keeps_the_group_and_the_file_it_is_made_from() -> None:
    config = {"embed_dim": 64, "channels": (8, 12), "num_heads": 4}
    described = {"name": "net", "base": "base", "config": config}
    doubled = scale_width(described, 2)
    assert doubled["config"] == {"embed_dim": 128, "channels": (16, 24), "num_heads": 4}
    assert (doubled["name"], doubled["base"], doubled["of"]) == ("net-x2", "base-x2", "net")
    assert scale_width(described, 1) == described
    with pytest.raises(DataError, match=r"has no width to take times 1.5"):
        scale_width({**described, "config": {"num_heads": 4}}, 1.5)


def test_damage_trend_is_said_only_where_it_is_seen() -> None:
    small = judge_pairs([0.01, 0.02, 0.03, 0.02], 0.1)
    large = judge_pairs([0.08, 0.09, 0.07, 0.09], 0.1)
    assert damage_trend(small, large).startswith("grows: +0.62 [")
    assert damage_trend(large, small).startswith("shrinks: -0.62 [")
    assert damage_trend(small, small).startswith("no trend seen: +0.00 [")
    assert damage_trend(small, None) == "not known"
