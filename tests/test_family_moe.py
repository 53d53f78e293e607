"""Mixture-of-experts decoders: published sizes, exact rewrites, slots and balance by hand."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import ClosedJaxpr
from rewrites import check_rewrites, count_parameters

from jaxbench.models import moe
from jaxbench.models.blocks import experts

BY_NAME = {candidate.name: candidate for candidate in moe.CANDIDATES}


def ragged_products(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ragged_dot_general":
            yield equation
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr):
                yield from ragged_products(value.jaxpr)


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        # Hugging Face's count of each checkpoint's parameters.
        ("moe-paper-mixtral-8x7b", 46_702_792_704),
        ("moe-paper-deepseek-v2-lite", 15_706_484_224),
        ("moe-fleet-mixtral-8x22b", 140_620_634_112),
    ],
)
def test_parameters_are_as_many_as_published(name: str, exact: int) -> None:
    assert count_parameters(BY_NAME[name]) == exact


@pytest.mark.parametrize("base", ["moe-cpu-mixtral", "moe-cpu-deepseek"])
def test_exact_rewrites_agree_in_value_and_gradient(base: str) -> None:
    rivals = [rival for rival in moe.CANDIDATES if rival.base == base and rival.validity == "T0"]
    assert len(rivals) >= 2
    check_rewrites(moe, BY_NAME[base], rivals)


def test_slots_by_token_first_choices_come_first_and_the_rest_is_dropped() -> None:
    # Expert 0 is the first choice of tokens 0 and 2, so that token 1 comes too late there; expert 1
    # is the first choice of token 1 and has one more slot, which token 0 gets.
    chosen = jnp.array([[[0, 1], [1, 0], [0, 1]]])
    gates = jnp.array([[[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]]])
    dispatch, combine = experts.slots_by_token(gates, chosen, 2, 2)
    filled = {tuple(index) for index in np.argwhere(np.asarray(dispatch[0])).tolist()}
    assert filled == {(0, 0, 0), (2, 0, 1), (1, 1, 0), (0, 1, 1)}  # token, expert, slot
    found = [float(combine[0, token, expert, slot]) for token, expert, slot in sorted(filled)]
    assert found == pytest.approx([0.6, 0.4, 0.7, 0.9])


def test_slots_by_expert_fill_every_slot_with_the_most_probable_tokens() -> None:
    probs = jnp.array([[[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]])
    dispatch, combine = experts.slots_by_expert(probs, 2)
    filled = {tuple(index) for index in np.argwhere(np.asarray(dispatch[0])).tolist()}
    assert filled == {(0, 0, 0), (2, 0, 1), (1, 1, 0), (2, 1, 1)}  # token, expert, slot
    assert combine[0].sum(axis=(1, 2)).tolist() == pytest.approx([0.9, 0.8, 1.0])


def test_balance_loss_of_even_and_of_one_sided_choice() -> None:
    even = jnp.full((1, 4, 4), 0.25, jnp.float32)
    chosen = jnp.array([[[0, 1], [2, 3], [0, 1], [2, 3]]])
    assert float(experts.balance_loss(even, chosen, "batch")) == pytest.approx(2)  # top_k
    assert float(experts.balance_loss(even, chosen, "sequence")) == pytest.approx(1)
    one_sided = jax.nn.one_hot(jnp.zeros((1, 4), jnp.int32), 4)
    alone = jnp.zeros((1, 4, 1), jnp.int32)
    for over in ("batch", "sequence"):
        assert float(experts.balance_loss(one_sided, alone, over)) == pytest.approx(4)  # experts


def test_added_loss_enters_the_gradient_and_not_the_value() -> None:
    x = jnp.arange(6, dtype=jnp.float32).reshape(1, 2, 3)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(experts.add_loss(x, 3 * jnp.sum(x**2))))(
        x
    )
    assert float(value) == 15
    np.testing.assert_allclose(gradient, 1 + 6 * x)


def test_ragged_products_are_bfloat16_and_lower_for_accelerators() -> None:
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(
            lambda: experts.Experts(16, 32, 4, top_k=2, rngs=nnx.Rngs(params=0))
        )
    graph, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((2, 8, 16), jnp.bfloat16)

    def total(state: Any, x: Any) -> Any:
        return jnp.sum(nnx.merge(graph, state)(x).astype(jnp.float32))

    traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(state, x)
    products = list(ragged_products(traced.jaxpr.jaxpr))
    assert len(products) == 9  # three forward, two backward for each
    for equation in products:
        assert {str(operand.aval.dtype) for operand in equation.invars[:2]} == {"bfloat16"}
    for platform in ("tpu", "cuda"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("chlo.ragged_dot") >= 9
