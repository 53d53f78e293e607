"""Time to target: samples by learning curves, times seconds a sample by records."""

import math

import pytest
from records import make_record

from jaxbench.quality.target_time import samples_ratio, samples_to, time_to_target
from jaxbench.stats import Interval

CURVE = ((100, 0.5), (200, 0.7), (400, 0.8))


@pytest.mark.parametrize(
    ("metric", "samples"), [(0.4, 100), (0.5, 100), (0.6, 150), (0.75, 300), (0.9, math.inf)]
)
def test_samples_to_a_metric_between_the_points(metric: float, samples: float) -> None:
    assert samples_to(CURVE, metric) == pytest.approx(samples)


def slower(factor: float) -> tuple[tuple[int, float], ...]:
    return tuple((round(factor * samples), value) for samples, value in CURVE)


def test_samples_ratio_is_paired() -> None:
    pairs = [(slower(speed), slower(1.5 * speed)) for speed in (1.0, 2.0, 7.0)]
    found = samples_ratio(pairs, 0.75)
    assert found.value == pytest.approx(1.5, rel=1e-3)
    assert found.high / found.low < 1.01


def test_samples_ratio_of_one_that_never_gets_there_is_open() -> None:
    found = samples_ratio([(CURVE, CURVE[:1]), (CURVE, CURVE)], 0.75)
    assert (found.value, found.high) == (math.inf, math.inf)
    # A base that falls short itself says nothing.
    assert samples_ratio([(CURVE[:1], CURVE)] * 3, 0.75).high == math.inf


def test_time_to_target_multiplies_and_widens() -> None:
    records = [
        make_record("base", target="gpu-h100", hlo_s=0.10),
        make_record("fast", target="gpu-h100", hlo_s=0.05),
    ]
    samples = Interval(value=1.2, low=1.1, high=1.3)
    (found,) = time_to_target("fast", "base", samples, records)
    assert found.target == "gpu-h100"
    assert found.signal == "hlo"
    assert found.seconds.value == pytest.approx(0.5)
    assert found.time.value == pytest.approx(0.6)
    assert found.time.low < 0.6 * 1.1 / 1.2
    assert math.log(found.time.high / 0.6) == pytest.approx(
        math.hypot(math.log(1.3 / 1.2), math.log(found.seconds.high / 0.5))
    )
