"""Exact rewrites compute the same: the three lifts of a map, the loop over a decoder's layers."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbench.models import bev, decoder

RIG = dataclasses.replace(bev.CPU, nearest_m=2, bin_m=2, num_bins=9, extent_m=16)
EDGE, NUM_CAMERAS, ROWS, COLUMNS, CHANNELS, BATCH = 8, 3, 4, 6, 5, 2


def rig() -> np.ndarray:
    return bev.rig_cells(RIG, num_cameras=NUM_CAMERAS, num_columns=COLUMNS, edge=EDGE)


def points(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random depths and contexts in float32, and a cotangent of the map."""
    draw = np.random.default_rng(seed).standard_normal
    pixels = (BATCH, NUM_CAMERAS, ROWS, COLUMNS)
    shapes = ((*pixels, RIG.num_bins), (*pixels, CHANNELS), (BATCH, EDGE * EDGE, CHANNELS))
    depth, context, cotangent = (draw(shape).astype(np.float32) for shape in shapes)
    return depth, context, cotangent


def lift_in_loops(
    depth: np.ndarray, context: np.ndarray, cotangent: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The map and the gradients of sum(map * cotangent), point by point in float64."""
    cells = rig()
    out = np.zeros(cotangent.shape)
    to_depth, to_context = np.zeros(depth.shape), np.zeros(context.shape)
    for b, n, h, w, d in np.ndindex(*depth.shape):
        cell = cells[n, w, d]
        if cell == EDGE * EDGE:
            continue
        vector = context[b, n, h, w].astype(np.float64)
        out[b, cell] += float(depth[b, n, h, w, d]) * vector
        to_depth[b, n, h, w, d] = vector @ cotangent[b, cell]
        to_context[b, n, h, w] += float(depth[b, n, h, w, d]) * cotangent[b, cell]
    return out, to_depth, to_context


def test_rig_cells_four_cameras_fall_where_worked_out_by_hand() -> None:
    # Columns look half a metre a metre to the left and to the right; depths are 2, 6 and 10 m;
    # cells of 3.2 m over [-8 m, 8 m): 5 by 5, so that no point is near an edge.
    config = dataclasses.replace(
        bev.CPU, fov_degrees=90, nearest_m=2, bin_m=4, num_bins=3, extent_m=8
    )
    cells = bev.rig_cells(config, num_cameras=4, num_columns=2, edge=5)
    none = 25
    assert cells.tolist() == [
        [[3 * 5 + 2, 4 * 5 + 3, none], [3 * 5 + 2, 4 * 5 + 1, none]],  # forward
        [[2 * 5 + 3, 1 * 5 + 4, none], [2 * 5 + 3, 3 * 5 + 4, none]],  # left
        [[1 * 5 + 2, 0 * 5 + 1, none], [1 * 5 + 2, 0 * 5 + 3, none]],  # back
        [[2 * 5 + 1, 3 * 5 + 0, none], [2 * 5 + 1, 1 * 5 + 0, none]],  # right
    ]


def test_rig_of_these_tests_has_full_empty_and_missed_cells() -> None:
    counts = np.bincount(rig().reshape(-1), minlength=EDGE * EDGE + 1)
    assert counts[:-1].max() > 1
    assert counts[:-1].min() == 0
    assert counts[-1] > 0


@pytest.mark.parametrize("lift", bev.LIFTS)
def test_lift_float32_value_and_gradient_equal_the_loop(lift: str) -> None:
    depth, context, cotangent = points(seed=0)
    cells = rig()

    def apply(depth: jax.Array, context: jax.Array) -> jax.Array:
        return bev.LIFTS[lift](depth, context, cells, EDGE * EDGE)

    out, pull = jax.vjp(apply, jnp.asarray(depth), jnp.asarray(context))
    found = (out, *pull(jnp.asarray(cotangent)))
    for got, want in zip(found, lift_in_loops(depth, context, cotangent), strict=True):
        assert got.dtype == jnp.float32
        # 1e-4 of the largest: sums of up to 100 products in float32 err by some 1e-6; a point that
        # is lost or in another cell errs by 1e-1.
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_lifts_each_pair_agree_in_value_and_gradient() -> None:
    depth, context, cotangent = points(seed=1)
    cells = rig()
    results = []
    for lift in bev.LIFTS.values():
        apply = functools.partial(lift, cells=cells, num_cells=EDGE * EDGE)
        out, pull = jax.vjp(apply, depth, context)
        results.append((out, *pull(jnp.asarray(cotangent))))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            # 1e-4 of the largest, as above: only the order of accumulation differs.
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * float(jnp.abs(want).max()))


SMALL = decoder.DecoderConfig(
    num_layers=3,
    embed_dim=128,
    mlp_dim=256,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    vocab_size=512,
    remat="none",
)


def decoders() -> tuple[decoder.Decoder, decoder.Decoder]:
    """A decoder with its layers written out, and one that loops over the same parameters."""
    draw = np.random.default_rng(3).standard_normal
    modules = []
    with nnx.use_eager_sharding(False):
        for layers in ("unroll", "scan"):
            config = dataclasses.replace(SMALL, layers=layers)
            make = functools.partial(decoder.Decoder, config)
            modules.append(nnx.eval_shape(lambda make=make: make(nnx.Rngs(0))))
        shapes = nnx.to_pure_dict(nnx.state(modules[0], nnx.Param))
        # 0.1 is near 1 / sqrt(embed_dim), so that activations stay near 1.
        values = jax.tree.map(lambda leaf: jnp.float32(0.1 * draw(leaf.shape)), shapes)
        nnx.update(modules[0], values)
        nnx.update(modules[1], _stacked(values))
    return modules[0], modules[1]


def _stacked(values: dict[str, Any]) -> dict[str, Any]:
    layers = [values["stack"][index] for index in sorted(values["stack"])]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return {**values, "stack": stack}


def _loss_and_gradient(module: decoder.Decoder) -> tuple[float, dict[str, Any]]:
    tokens = jax.random.randint(jax.random.key(2), (2, 33), 0, SMALL.vocab_size)
    graphdef, state = nnx.split(module)
    step = jax.value_and_grad(lambda s: decoder.token_loss(nnx.merge(graphdef, s), batch))
    batch = {"tokens": tokens}
    loss, gradient = jax.jit(step)(state)
    return float(loss), nnx.to_pure_dict(gradient)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        # The proof of T0: in float32 only the order inside a product may differ, some 1e-6.
        (jnp.float32, 1e-5),
        # As it trains. XLA fuses the two differently and rounds to bfloat16 in other places, each
        # time by up to 2^-9; a dozen roundings a layer, of random sign, stay below 2^-6.
        (jnp.bfloat16, 2**-6),
    ],
)
def test_decoder_scanned_and_unrolled_agree_in_loss_and_gradient(
    dtype: Any, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "DTYPE", dtype)
    unrolled, scanned = decoders()
    want_loss, want = _loss_and_gradient(unrolled)
    got_loss, got = _loss_and_gradient(scanned)
    # The loss is a mean over 64 tokens, which averages roundings further.
    assert got_loss == pytest.approx(want_loss, rel=tolerance / 8)
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(_stacked(want)), strict=True)
    for got_leaf, want_leaf in pairs:
        error = jnp.linalg.norm(got_leaf - want_leaf) / jnp.linalg.norm(want_leaf)
        assert error < tolerance
