"""ConvNeXt: published sizes, exact rewrites, and what a block's filter reaches."""

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

from jaxbench import mathematics
from jaxbench.layout import Layout
from jaxbench.models import convnext
from jaxbench.program import build_program, make_batch

QUICK = {"xla_backend_optimization_level": 0}
CANDIDATES = {candidate.name: candidate for candidate in convnext.CANDIDATES}
BASE = CANDIDATES["convnext-cpu-base"]


def abstract(config: convnext.ConvNeXtConfig) -> tuple[Any, Any]:
    """Graph and state, as shapes."""
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: convnext.build(config, nnx.Rngs(params=0))))


def num_params(config: convnext.ConvNeXtConfig) -> int:
    leaves = jax.tree.leaves(abstract(config)[1])
    return sum(math.prod(leaf.shape) for leaf in leaves)


# Published: Liu et al., CVPR 2022, table 9, to the million; torchvision's table, to the unit.
@pytest.mark.parametrize(
    ("config", "exact", "published"),
    [
        (convnext.T, 28_589_128, 28.59e6),
        (convnext.S, 50_223_688, 50.22e6),
        (convnext.B, 88_591_464, 88.59e6),
    ],
)
def test_paper_sizes_have_the_published_parameters(
    config: convnext.ConvNeXtConfig, exact: int, published: float
) -> None:
    assert num_params(config) == exact
    assert exact == pytest.approx(published, rel=5e-3)


def all_pairs(size: int, taps: int, outputs: int, *others: int) -> int:
    """Counts taps on padding too, as the published figures do."""
    return outputs * taps


# Published in multiply-adds: torchvision's table.
@pytest.mark.parametrize(("name", "published"), [("t", 4.456e9), ("s", 8.684e9), ("b", 15.355e9)])
def test_forward_pass_has_the_published_flops(name: str, published: float) -> None:
    candidate = CANDIDATES[f"convnext-paper-{name}"]
    workload = dataclasses.replace(candidate.workload, kind="forward", global_batch=1)
    forward = dataclasses.replace(candidate, workload=workload)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with mock.patch.object(mathematics, "_valid_pairs", all_pairs):
        program = build_program(forward, Layout(axes=(("data", 1),)), mesh, "cpu")
    assert program.mathematics.flops / 2 == pytest.approx(published, rel=5e-3)


def differentiate(config: convnext.ConvNeXtConfig, values: dict[str, Any]) -> tuple[Any, Any]:
    """Loss and its gradient in float32 on a random batch."""
    graphdef, state = abstract(config)
    nnx.replace_by_pure_dict(state, values)
    workload = dataclasses.replace(BASE.workload, global_batch=2)
    batch = make_batch(workload, jax.random.key(1))

    def loss(state: Any) -> jax.Array:
        return convnext.loss(nnx.merge(graphdef, state), batch)

    with mock.patch.object(convnext, "DTYPE", jnp.float32):
        value, gradient = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(state)
    return value, nnx.to_pure_dict(gradient)


@functools.cache
def base_result() -> tuple[dict[str, Any], Any, Any]:
    """Random values of all parameters, so that no scale hides a part; loss and gradient there."""
    shapes, tree = jax.tree.flatten(nnx.to_pure_dict(abstract(BASE.config)[1]))
    draw = np.random.default_rng(0).standard_normal
    drawn = [0.2 * draw(shape.shape).astype(np.float32) for shape in shapes]
    values = jax.tree.unflatten(tree, drawn)
    return values, *differentiate(BASE.config, values)


def carry_unrolled(values: dict[str, Any], depths: tuple[int, ...]) -> dict[str, Any]:
    """Cuts the stacked blocks' values into those of blocks written out."""
    stages = {}
    for stage, depth in enumerate(depths):
        given = values["stages"][stage]
        stacked = given["blocks"]["layers"]
        blocks = {i: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
        stages[stage] = {**given, "blocks": {"layers": blocks}}
    return {**values, "stages": stages}


@pytest.mark.parametrize(
    "change", [name for name, c in CANDIDATES.items() if c.size == "cpu" and c.validity == "T0"]
)
def test_exact_rewrites_give_the_bases_loss_and_gradient(change: str) -> None:
    config = CANDIDATES[change].config
    values, value, gradient = base_result()
    if config.layers == "unroll":
        values, gradient = (carry_unrolled(v, config.depths) for v in (values, gradient))
    other, other_gradient = differentiate(config, values)
    # Only the order of float32 sums differs.
    assert float(other) == pytest.approx(float(value), rel=1e-4)
    jax.tree.map_with_path(assert_close, gradient, other_gradient)


def assert_close(path: Any, one: Any, other: Any) -> None:
    atol = 1e-4 * float(np.max(np.abs(one))) + 1e-7
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize(
    ("kernel", "group", "edge", "channels"), [(7, 1, 7, 1), (5, 1, 5, 1), (7, 8, 7, 8)]
)
def test_filter_reaches_its_window_and_its_group(
    kernel: Any, group: Any, edge: int, channels: int
) -> None:
    config = dataclasses.replace(BASE.config, kernel=kernel, group=group)
    with nnx.use_eager_sharding(False):
        block = convnext.Block(config, 16, rngs=nnx.Rngs(params=0))
    impulse = np.zeros((1, 15, 15, 16), np.float32)
    impulse[0, 7, 7, 0] = 1.0
    reached = np.asarray(block.filter(jnp.asarray(impulse)))[0] != 0
    low, high = 7 - edge // 2, 7 + edge // 2 + 1
    assert reached[low:high, low:high, :channels].all()
    assert reached.sum() == edge * edge * channels
