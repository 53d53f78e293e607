"""The diffusion transformer: published sizes, exact rewrites, its schedule and its patches."""

import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import check_rewrites, count_parameters, forward_flops

from jaxbench.models import dit
from jaxbench.program import make_batch

NAMED = {candidate.name: candidate for candidate in dit.CANDIDATES}


# Peebles and Xie, ICCV 2023, table 4. The published code's number of parameters has the values of
# the fixed positions, 256 tokens wide, among them.
@pytest.mark.parametrize(
    ("name", "exact", "published"),
    [
        ("dit-paper-s2", 32_963_360 - 98_304, 33e6),
        ("dit-paper-b2", 130_512_416 - 196_608, 130e6),
        ("dit-paper-l2", 458_102_816 - 262_144, 458e6),
        ("dit-paper-xl2", 675_129_632 - 294_912, 675e6),
        ("dit-paper-xl2-cross", 597_862_688, 598e6),
        ("dit-paper-xl2-tokens", 449_162_528, 449e6),
        ("dit-paper-xl2-head64", 674_834_720, 675e6),
        ("dit-paper-xl2-head128", 674_834_720, 675e6),
    ],
)
def test_parameters_are_as_many_as_published(name: str, exact: int, published: float) -> None:
    count = count_parameters(NAMED[name])
    assert count == exact
    assert count == pytest.approx(published, rel=5e-3)


# The publication counts a multiplication and an addition as one.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dit-paper-s2", 6.06e9),
        ("dit-paper-xl2", 118.64e9),
        ("dit-paper-xl2at512", 524.6e9),
        ("dit-paper-xl2-cross", 137.6e9),
        ("dit-paper-xl2-tokens", 119.37e9),
    ],
)
def test_forward_flops_are_as_published(name: str, published: float) -> None:
    edge = dict(NAMED[name].workload.inputs)["latents"].shape[0]
    number = ((1,), jnp.int32)
    flops = forward_flops(NAMED[name], ((1, edge, edge, 4), jnp.float32), number, number)
    assert flops / 2 == pytest.approx(published, rel=5e-3)


def test_exact_rewrites_agree_in_value_and_gradient() -> None:
    exact = [c for c in dit.CANDIDATES if c.size == "cpu" and c.validity == "T0"]
    check_rewrites(dit, NAMED["dit-cpu-base"], exact)


def test_schedule_ends_in_noise_as_published() -> None:
    schedule = dit.make_schedule(1000)
    # Betas from 1e-4 to 0.02 (Ho et al. 2020, section 4) leave 4.0e-5 of the signal's variance.
    assert schedule.signal[-1] ** 2 == pytest.approx(4.0e-5, rel=1e-2)
    assert schedule.signal[0] ** 2 + schedule.noise[0] ** 2 == pytest.approx(1.0)
    # Step 1 by hand: beta_1 = 1e-4 + 0.0199 / 999, kept_0 = 1 - 1e-4.
    beta = 1e-4 + 0.0199 / 999
    posterior = beta * 1e-4 / (1 - (1 - 1e-4) * (1 - beta))
    assert schedule.log_posterior[:2] == pytest.approx([math.log(posterior)] * 2)


def test_patches_are_listed_by_rows_and_put_back() -> None:
    latents = jnp.arange(2 * 4 * 6 * 4, dtype=jnp.float32).reshape(2, 4, 6, 4)
    tokens = dit.patchify(latents, 2)
    assert tokens.shape == (2, 6, 16)
    np.testing.assert_array_equal(tokens[0, 1].reshape(2, 2, 4), latents[0, :2, 2:4])
    np.testing.assert_array_equal(dit.unpatchify(tokens, 4, 6, 2), latents)


def test_perfect_noise_costs_only_the_variances() -> None:
    class Known(nnx.Module):
        """Knows the noise and the lower variance, and nothing else."""

        config = NAMED["dit-cpu-base"].config

        def __init__(self, noise: Any) -> None:
            self.noise = nnx.Variable(noise)

        def __call__(self, noisy: Any, step: Any, label: Any) -> Any:
            return jnp.concatenate([self.noise[...], -jnp.ones_like(noisy)], axis=-1)

    batch = make_batch(NAMED["dit-cpu-base"].workload, jax.random.key(2))
    loss: Any = dit.loss  # typed for the real network only
    with mock.patch("jaxtyping.config.jaxtyping_disable", True):
        assert float(loss(Known(batch["noise"]), batch)) == pytest.approx(0.0, abs=1e-6)
