"""Motion forecasting: exact rewrites, neighbours, masks and the mixture's likelihood."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import check_rewrites, compiled_call, count_parameters, draw

from jaxbench.models import forecast
from jaxbench.program import make_batch

NAMED = {candidate.name: candidate for candidate in forecast.CANDIDATES}


def test_wider_heads_and_local_attention_keep_the_parameters() -> None:
    base = count_parameters(NAMED["forecast-paper-wayformer"])
    assert base == count_parameters(NAMED["forecast-paper-wayformer-head128"])
    # Factorised, the same layers stand in other places.
    assert base == count_parameters(NAMED["forecast-paper-wayformer-factorised"])
    local, full = (count_parameters(NAMED[f"forecast-paper-mtr{n}"]) for n in ("", "-global"))
    assert local == full


def test_exact_rewrites_agree_in_value_and_gradient() -> None:
    exact = [c for c in forecast.CANDIDATES if c.size == "cpu" and c.validity == "T0"]
    check_rewrites(forecast, NAMED["forecast-cpu-base"], exact)


def test_nearest_lists_seen_tokens_by_distance() -> None:
    positions = jnp.array([[[0.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.5, 0.0]]])
    seen = jnp.array([[True, True, True, False]])
    found = forecast.nearest(positions, seen, 2)
    np.testing.assert_array_equal(found[0], [[0, 2], [1, 2], [2, 0], [0, 2]])


def test_likelihood_of_a_correlated_normal() -> None:
    # By hand: deviations 1 and 2, correlation 0.3, point one deviation off in both.
    rho = 0.3
    normals = jnp.array([1.0, -2.0, 0.0, math.log(2.0), math.atanh(2 * rho)])
    found = forecast.negative_log_likelihood(normals, jnp.array([2.0, 0.0]))
    covariance = np.array([[1.0, 2 * rho], [2 * rho, 4.0]])
    off = np.array([1.0, 2.0])
    wanted = off @ np.linalg.inv(covariance) @ off / 2
    wanted += math.log(2 * math.pi) + math.log(np.linalg.det(covariance)) / 2
    assert float(found) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["forecast-cpu-base", "forecast-cpu-local"])
def test_what_was_not_seen_changes_nothing(name: str) -> None:
    candidate = NAMED[name]
    batch = make_batch(candidate.workload, jax.random.key(0))
    hidden = batch["lanes"].at[:, 3, :, -1].set(-2.0)
    network = compiled_call(candidate, draw(candidate))

    def call(lanes: Any) -> Any:
        return network(batch["history"], lanes)[1]

    # Only what the last feature does not say may change, and it stays where it was.
    changed = hidden.at[:, 3, :, 4:-1].add(1.0)
    np.testing.assert_array_equal(call(hidden), call(changed))
    assert bool(jnp.any(call(hidden) != call(hidden.at[:, 4, :, 4:-1].add(1.0))))
