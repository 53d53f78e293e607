"""The vision transformer: published sizes, exact rewrites, and who sees whom in windows."""

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

from jaxbench.layout import Layout
from jaxbench.models import vit
from jaxbench.program import build_program, make_batch

QUICK = {"xla_backend_optimization_level": 0}
CANDIDATES = {candidate.name: candidate for candidate in vit.CANDIDATES}
BASE = CANDIDATES["vit-cpu-base"]


def abstract(config: vit.ViTConfig) -> tuple[Any, Any]:
    """Graph and state, as shapes."""
    with nnx.use_eager_sharding(False):
        return nnx.split(nnx.eval_shape(lambda: vit.build(config, nnx.Rngs(params=0))))


def num_params(config: vit.ViTConfig) -> int:
    leaves = jax.tree.leaves(abstract(config)[1])
    return sum(math.prod(leaf.shape) for leaf in leaves)


# Published: Dosovitskiy et al., ICLR 2021, table 1 (86 and 307 million, with a hidden layer in the
# head); torchvision's table, which has the head used here; timm's for S.
@pytest.mark.parametrize(
    ("config", "exact", "published"),
    [
        (vit.S16, 22_050_664, 22.05e6),
        (vit.B16, 86_567_656, 86.57e6),
        (vit.L16, 304_326_632, 304.33e6),
    ],
)
def test_paper_sizes_have_the_published_parameters(
    config: vit.ViTConfig, exact: int, published: float
) -> None:
    assert num_params(config) == exact
    assert exact == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("change", ["wideheads", "mean", "tanh", "rms"])
def test_reparameterised_rivals_have_the_parameters_of_their_base(change: str) -> None:
    rival = CANDIDATES[f"vit-paper-b16-{change}"]
    assert rival.validity == "T1"
    assert num_params(rival.config) == pytest.approx(num_params(vit.B16), rel=3e-2)


# Published in multiply-adds: torchvision's table, 17.56 and 61.55 billion.
@pytest.mark.parametrize(("name", "published"), [("b16", 17.56e9), ("l16", 61.55e9)])
def test_forward_pass_has_the_published_flops(name: str, published: float) -> None:
    candidate = CANDIDATES[f"vit-paper-{name}"]
    workload = dataclasses.replace(candidate.workload, kind="forward", global_batch=1)
    forward = dataclasses.replace(candidate, workload=workload)
    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,))
    program = build_program(forward, Layout(axes=(("data", 1),)), mesh, "cpu")
    assert program.mathematics.flops / 2 == pytest.approx(published, rel=5e-3)


def differentiate(config: vit.ViTConfig, values: dict[str, Any]) -> tuple[Any, Any]:
    """Loss and its gradient in float32 on a random batch."""
    graphdef, state = abstract(config)
    nnx.replace_by_pure_dict(state, values)
    workload = dataclasses.replace(BASE.workload, global_batch=2)
    batch = make_batch(workload, jax.random.key(1))

    def loss(state: Any) -> jax.Array:
        return vit.loss(nnx.merge(graphdef, state), batch)

    with mock.patch.object(vit, "DTYPE", jnp.float32):
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


def carry_unrolled(values: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Cuts the stacked layers' values into those of layers written out."""
    stacked = values["stack"]["layers"]
    layers = {i: jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers)}
    return {**values, "stack": {"layers": layers}}


@pytest.mark.parametrize(
    "change", [name for name, c in CANDIDATES.items() if c.size == "cpu" and c.validity == "T0"]
)
def test_exact_rewrites_give_the_bases_loss_and_gradient(change: str) -> None:
    config = CANDIDATES[change].config
    values, value, gradient = base_result()
    if config.layers == "unroll":
        values, gradient = (carry_unrolled(v, config.num_layers) for v in (values, gradient))
    other, other_gradient = differentiate(config, values)
    # Only the order of float32 sums differs.
    assert float(other) == pytest.approx(float(value), rel=1e-4)
    jax.tree.map_with_path(assert_close, gradient, other_gradient)


def assert_close(path: Any, one: Any, other: Any) -> None:
    # A bias of the keys shifts all of a query's scores alike: its gradient is rounding around zero.
    atol = 1e-4 * float(np.max(np.abs(one))) + 1e-7
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_window_by_window_of_four_by_four_patches_is_as_written_by_hand() -> None:
    image = jnp.arange(16, dtype=jnp.float32).reshape(1, 4, 4, 1)
    windows = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert vit.window_by_window(image, 2).reshape(4, 4).tolist() == windows
    assert vit.window_by_window(image, 1).reshape(16).tolist() == list(range(16))


def attend_in_windows(registers: Any, moved: int) -> np.ndarray:
    """Whether each token's result changes as the token `moved` does, among 2 x 2 windows of 4."""
    config = dataclasses.replace(BASE.config, pool="mean", registers=registers)
    with nnx.use_eager_sharding(False):
        layer = vit.SelfAttention(config, windows=2, rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).standard_normal((2, registers + 16, 64)).astype(np.float32)
    other = x.copy()
    other[:, moved] += 1.0
    differs = np.abs(np.asarray(layer(jnp.asarray(x)) - layer(jnp.asarray(other)))) > 1e-6
    assert (differs.any(axis=-1)[0] == differs.any(axis=-1)[1]).all()
    return differs.any(axis=-1)[0]


def test_token_in_a_window_is_seen_in_that_window_alone() -> None:
    assert attend_in_windows(0, moved=6).tolist() == [False] * 4 + [True] * 4 + [False] * 8


def test_registers_see_all_windows_and_are_seen_in_all() -> None:
    assert attend_in_windows(4, moved=4 + 6).tolist() == (
        [True] * 4 + [False] * 4 + [True] * 4 + [False] * 8
    )
    assert attend_in_windows(4, moved=0).all()
