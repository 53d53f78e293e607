"""T5: published sizes and operations, exact rewrites, position biases by hand."""

import dataclasses
import functools
import math
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from jaxbench.candidate import Candidate
from jaxbench.layout import Layout
from jaxbench.models import t5
from jaxbench.models.blocks.relative import PositionBias, position_buckets
from jaxbench.program import build_program, make_batch

BY_NAME = {candidate.name: candidate for candidate in t5.CANDIDATES}
# LLVM unoptimised: most of the time would go into code that runs once.
QUICK = {"xla_backend_optimization_level": 0}


def abstract(config: t5.T5Config) -> Any:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: t5.build(config, nnx.Rngs(params=0)))


def num_params(name: str) -> int:
    state = nnx.state(abstract(BY_NAME[name].config), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


@functools.cache
def start(config: t5.T5Config) -> dict[str, Any]:
    """Random parameters of a config; all are made random, also factors that start at zero."""
    pure = nnx.to_pure_dict(nnx.state(abstract(config), nnx.Param))
    leaves, tree = jax.tree.flatten(pure)
    draw = np.random.default_rng(0).standard_normal
    return jax.tree.unflatten(tree, [0.1 * draw(x.shape).astype(np.float32) for x in leaves])


def value_and_gradient(config: t5.T5Config, pure: dict[str, Any], work: Candidate) -> Any:
    graph, state = nnx.split(abstract(config), nnx.Param)
    batch = make_batch(work.workload, jax.random.key(1))

    def loss_of(pure: dict[str, Any]) -> Any:
        nnx.replace_by_pure_dict(state, pure)
        return work.loss(nnx.merge(graph, state), batch)

    with mock.patch.object(t5, "DTYPE", jnp.float32):
        step = jax.jit(jax.value_and_grad(loss_of), compiler_options=QUICK)
        value, gradient = jax.device_get(step(pure))
    return float(value), gradient


def carry_layers(pure: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Takes stacked layers apart, as a network whose layers are written out holds them."""
    carried = dict(pure)
    for side in ("encoder", "decoder"):
        layers = pure[side]["stack"]["layers"]
        apart = {i: jax.tree.map(lambda leaf, i=i: leaf[i], layers) for i in range(num_layers)}
        carried[side] = pure[side] | {"stack": {"layers": apart}}
    return carried


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        # Hugging Face's count of each checkpoint's parameters.
        ("t5-paper-small", 60_506_624),
        ("t5-paper-base", 222_903_552),
        ("t5-paper-large", 737_668_096),
        ("t5-paper-v11small", 76_961_152),
        ("t5-paper-v11large", 783_150_080),
        ("t5-fleet-11b", 11_307_321_344),
    ],
)
def test_parameters_are_as_many_as_published(name: str, exact: int) -> None:
    assert num_params(name) == exact


@pytest.mark.parametrize(
    ("change", "exact", "published"),
    [
        ("", 222_951_168, 223e6),
        ("-geglu", 222_951_168, 223e6),
        ("-rms", 222_903_552, 223e6),
        ("-rezero", 222_855_996, 223e6),
        ("-deepest", 223_042_944, 224e6),
        ("-deeper", 222_996_992, 223e6),
        ("-shallower", 222_920_832, 223e6),
        ("-shallowest", 222_905_856, 223e6),
        ("-tiedinputs", 247_625_472, 248e6),
        ("-tieddecoder", 247_625_472, 248e6),
        ("-untied", 272_299_776, 273e6),
        ("-thin", 227_161_856, 227e6),
        ("-thinshared", 202_487_552, 202e6),
        ("-block", 65_875_200, 65e6),
        ("-blockthin", 45_411_584, 45e6),
        ("-blockthinshared", 20_737_280, 20e6),
        ("-encoderblock", 169_734_912, 170e6),
        ("-decoderblock", 143_765_760, 144e6),
    ],
)
def test_modifications_have_the_parameters_of_the_table(
    change: str, exact: int, published: float
) -> None:
    found = num_params(f"t5-paper-vanilla{change}")
    assert found == exact
    # Narang et al., table 1, give whole millions, some rounded and some cut.
    assert abs(found - published) < 1e6


@pytest.mark.parametrize(
    ("change", "width", "published"),
    [("", 768, 11.1e12), ("-thin", 128, 9.4e12), ("-thinshared", 128, 9.1e12)],
)
def test_forward_operations_of_64_sequences_are_those_of_the_table(
    change: str, width: int, published: float
) -> None:
    given = BY_NAME[f"t5-paper-vanilla{change}"]
    workload = dataclasses.replace(given.workload, kind="forward", global_batch=64)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    layout = Layout(axes=(("data", 1),))
    program = build_program(dataclasses.replace(given, workload=workload), layout, mesh, "cpu")
    # Mesh TensorFlow looks tokens up by a product with one-hot rows, which the table counts.
    lookups = 2 * 64 * (512 + 114) * given.config.vocab_size * width
    # Two digits, or three, of the table: half of the last one.
    assert program.mathematics.flops + lookups == pytest.approx(published, abs=0.05e12)


@pytest.mark.parametrize("change", ["chunked", "remat", "unrolled"])
def test_exact_rewrites_agree_in_value_and_gradient(change: str) -> None:
    base, variant = BY_NAME["t5-cpu-base"], BY_NAME[f"t5-cpu-base-{change}"]
    pure, num_layers = start(base.config), base.config.num_layers
    carry = functools.partial(carry_layers, num_layers=num_layers)
    value, gradient = value_and_gradient(base.config, pure, base)
    if change == "unrolled":
        pure, gradient = carry(pure), carry(gradient)
    other_value, other_gradient = value_and_gradient(variant.config, pure, base)
    assert other_value == pytest.approx(value, rel=1e-5)
    for wanted, found in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True
    ):
        # Sums in another order: some 1e-6 of a tensor's largest entry.
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


def test_shared_layers_are_layers_with_equal_parameters() -> None:
    shared = BY_NAME["t5-cpu-vanilla-block"]
    apart = dataclasses.replace(shared.config, sharing="none")
    pure, num_layers = start(shared.config), apart.num_layers
    stacked = dict(pure)
    for side in ("encoder", "decoder"):
        one = pure[side]["stack"]["once"]["layers"][0]
        layers = jax.tree.map(lambda leaf: np.stack([leaf] * num_layers), one)
        stacked[side] = pure[side] | {"stack": {"layers": layers}}
    value, gradient = value_and_gradient(shared.config, pure, shared)
    other_value, other_gradient = value_and_gradient(apart, stacked, shared)
    assert other_value == pytest.approx(value, rel=1e-5)
    wanted = gradient["encoder"]["stack"]["once"]["layers"][0]["mlp"]["part"]["up"]["kernel"]
    found = other_gradient["encoder"]["stack"]["layers"]["mlp"]["part"]["up"]["kernel"]
    np.testing.assert_allclose(found.sum(axis=0), wanted, rtol=1e-4, atol=1e-6)


def test_position_buckets_of_both_directions_by_hand() -> None:
    # 16 buckets a direction, 8 of one distance each; then 8 for 8 ... 128, two for each doubling.
    offset = np.array([0, -1, -7, -8, -16, -127, -1000, 1, 7, 8, 16, 32, 1000])
    found = position_buckets(offset, both=True, num_buckets=32, max_distance=128)
    assert found.tolist() == [0, 1, 7, 8, 10, 15, 15, 17, 23, 24, 26, 28, 31]


def test_position_buckets_of_one_direction_by_hand() -> None:
    # 16 of one distance each; 16 for 16 ... 128, that is 16/3 for each doubling.
    offset = np.array([5, 0, -1, -15, -16, -32, -64, -128, -1000])
    found = position_buckets(offset, both=False, num_buckets=32, max_distance=128)
    assert found.tolist() == [0, 0, 1, 15, 16, 21, 26, 31, 31]


@pytest.mark.parametrize("both", [True, False])
def test_position_bias_is_the_tables_row_for_key_minus_query(both: bool) -> None:
    T, N = 5, 3
    with nnx.use_eager_sharding(False):
        module = PositionBias(
            8, N, both=both, num_buckets=8, max_distance=16, rngs=nnx.Rngs(params=0)
        )
    found = module(jnp.zeros((1, T, 8), jnp.float32))
    offset = np.arange(T)[None] - np.arange(T)[:, None]
    buckets = position_buckets(offset, both=both, num_buckets=8, max_distance=16)
    wanted = np.asarray(module.table[...])[buckets].transpose(2, 0, 1)
    np.testing.assert_array_equal(found[0], wanted)
