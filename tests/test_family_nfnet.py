"""NFNet: published sizes, standardised weights, activations and deviations that are known."""

import dataclasses
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jaxbench import mathematics
from jaxbench.candidate import Input
from jaxbench.layout import Layout
from jaxbench.models import nfnet
from jaxbench.program import build_program

CANDIDATES = {candidate.name: candidate for candidate in nfnet.CANDIDATES}
BASE = CANDIDATES["nfnet-cpu-base"]


# Published: Brock et al., ICML 2021, table 7.
@pytest.mark.parametrize(
    ("config", "exact", "published"),
    [
        (nfnet.F0, 71_489_284, 71.5e6),
        (nfnet.F1, 132_634_256, 132.6e6),
        (nfnet.F3, 254_924_200, 254.9e6),
        (nfnet.F5, 377_214_144, 377.2e6),
    ],
)
def test_published_sizes_have_the_published_parameters(
    config: nfnet.NFNetConfig, exact: int, published: float
) -> None:
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: nfnet.build(config, nnx.Rngs(params=0)))
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == exact
    assert exact == pytest.approx(published, rel=5e-3)


def all_pairs(size: int, taps: int, outputs: int, *others: int) -> int:
    """Counts taps on padding too, as the published figures do."""
    return outputs * taps


# Published in multiply-adds at the resolution of tests: Brock et al., ICML 2021, table 7.
@pytest.mark.parametrize(
    ("name", "edge", "published"), [("f0", 256, 12.38e9), ("f1", 320, 35.54e9)]
)
def test_forward_pass_has_the_published_flops(name: str, edge: int, published: float) -> None:
    candidate = CANDIDATES[f"nfnet-paper-{name}"]
    inputs = (
        ("images", Input(shape=(edge, edge, 3))),
        ("labels", Input(shape=(), dtype="int32", high=1000)),
    )
    workload = dataclasses.replace(
        candidate.workload, kind="forward", global_batch=1, inputs=inputs
    )
    forward = dataclasses.replace(candidate, workload=workload)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with mock.patch.object(mathematics, "_valid_pairs", all_pairs):
        program = build_program(forward, Layout(axes=(("data", 1),)), mesh, "cpu")
    assert program.mathematics.flops / 2 == pytest.approx(published, rel=5e-3)


def test_expected_deviations_of_two_stages_are_as_added_up_by_hand() -> None:
    first, second = nfnet.expected_deviations((2, 3), 0.5)
    # 1; 1 + 1/4 | 1 + 2/4, then again from 1: 1 + 1/4; 1 + 2/4
    assert first.tolist() == pytest.approx([1.0, math.sqrt(1.25)])
    assert second.tolist() == pytest.approx([math.sqrt(1.5), math.sqrt(1.25), math.sqrt(1.5)])


def test_blocks_of_a_loop_have_the_deviations_of_their_places() -> None:
    config = dataclasses.replace(BASE.config, depths=(1, 3))

    def deviations() -> tuple[jax.Array, jax.Array]:
        stage: Any = nfnet.Stage(config, 1, rngs=nnx.Rngs(params=0))
        return stage.first.deviation[...], stage.others.layers.deviation[...]

    with nnx.use_eager_sharding(False):
        first, others = jax.jit(deviations)()
    given = [*first.tolist(), *others[:, 0].tolist()]
    expected = nfnet.expected_deviations((1, 3), config.alpha)[1]
    assert given == pytest.approx(expected.tolist())


def test_standardised_weights_have_mean_zero_and_unit_gain_whatever_their_scale() -> None:
    weights = np.random.default_rng(0).standard_normal((3, 3, 4, 16))
    weights = jnp.asarray(weights, jnp.float32)
    kernel = np.asarray(nfnet.standardise(weights, jnp.ones(16)))
    # Four channels of 3 x 3 taps: an output of white noise of variance 1 has variance 1.
    np.testing.assert_allclose(kernel.mean(axis=(0, 1, 2)), 0.0, atol=1e-6)
    np.testing.assert_allclose(kernel.var(axis=(0, 1, 2)) * 36, 1.0, rtol=1e-5)
    moved = nfnet.standardise(3 * weights + 1, 2 * jnp.ones(16))
    np.testing.assert_allclose(np.asarray(moved), 2 * kernel, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "silu", "relu"])
def test_scaled_activation_of_a_standard_normal_has_variance_one(activation: Any) -> None:
    act = nfnet.ScaledActivation(dataclasses.replace(BASE.config, activation=activation))
    x = np.linspace(-8, 8, 16_001)
    density = np.exp(-(x**2) / 2)
    density /= density.sum()
    y = np.asarray(act(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1)))[0, 0, 0]
    variance = (density * y**2).sum() - (density * y).sum() ** 2
    assert variance == pytest.approx(1.0, rel=2e-3)
