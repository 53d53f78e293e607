"""The occupancy family: its backbone's size, where points fall, and its exact rewrites."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rewrites
from flax import nnx

from jaxbench.models import occupancy
from jaxbench.models.occupancy import OccupancyConfig

# Columns and rows look half a metre a metre away from the axis; depths are 2, 6 and 10 m; 5 by 5
# cells of 3.2 m and 4 levels of 1.6 m from -1 m, so that no point is near an edge.
RIG = dataclasses.replace(
    occupancy.CPU, fov_degrees=90.0, nearest_m=2.0, bin_m=4.0, num_bins=3, extent_m=8.0
)
EDGE, LEVELS = 5, 4


def points(seed: int) -> tuple[jax.Array, jax.Array]:
    """Random depths and contexts of two samples, four cameras and 2 by 2 pixels."""
    draw = np.random.default_rng(seed).standard_normal
    pixels = (2, 4, 2, 2)
    return jnp.asarray(draw((*pixels, 3)), jnp.float32), jnp.asarray(
        draw((*pixels, 7)), jnp.float32
    )


def lifted(config: OccupancyConfig, num_levels: int) -> tuple[jax.Array, Any]:
    """The volume, and gradients of the sum of its squares."""
    depth, context = points(0)

    def energy(depth: jax.Array, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = occupancy.lift(depth, context, config, edge=EDGE, num_levels=num_levels)
        return jnp.sum(x * x), x

    gradient, x = jax.grad(energy, argnums=(0, 1), has_aux=True)(depth, context)
    return x, gradient


def test_backbone_has_the_parameters_of_resnet50_without_its_classifier() -> None:
    with nnx.use_eager_sharding(False):
        net = nnx.eval_shape(lambda: occupancy.build(occupancy.PAPER, nnx.Rngs(params=0)))
    parts = (nnx.state(net.camera.stem, nnx.Param), nnx.state(net.camera.stages, nnx.Param))
    # torchvision's ResNet-50 has 25,557,032, of which 2,049,000 are the classifier's; group norm
    # has as many as batch norm.
    assert sum(leaf.size for leaf in jax.tree.leaves(parts)) == 25_557_032 - 2_049_000


def test_rig_levels_fall_where_worked_out_by_hand() -> None:
    levels = occupancy.rig_levels(RIG, num_rows=2, num_columns=2, num_levels=LEVELS)
    # From 1.5 m the upper row is at 2.5, 4.5 and 6.5 m, the lower one at 0.5, -1.5 and -3.5 m.
    upper, lower = np.zeros((3, 4)), np.zeros((3, 4))
    upper[0, 2] = upper[1, 3] = lower[0, 0] = 1
    np.testing.assert_array_equal(levels, np.stack([upper, lower]))


def test_lift_puts_every_point_into_its_voxel() -> None:
    depth, context = points(0)
    cells = occupancy.rig_cells(RIG, num_cameras=4, num_columns=2, edge=EDGE)
    levels = occupancy.rig_levels(RIG, num_rows=2, num_columns=2, num_levels=LEVELS)
    expected = np.zeros((2, EDGE * EDGE + 1, LEVELS, 7))
    for b, n, h, w, d in np.ndindex(*depth.shape):
        vector = float(depth[b, n, h, w, d]) * np.asarray(context[b, n, h, w], np.float64)
        expected[b, cells[n, w, d]] += levels[h, d][:, None] * vector
    found, _ = lifted(RIG, LEVELS)
    # Forward camera, 2 m: its left column is a metre to the left, in the middle cell of x = 3.
    assert cells[0, 0, 0] == 3 * EDGE + 2
    np.testing.assert_allclose(
        np.asarray(found).reshape(2, -1, LEVELS, 7), expected[:, :-1], rtol=1e-5, atol=1e-5
    )


def test_lift_by_product_is_the_segment_sum_in_value_and_gradient() -> None:
    base, product = (
        lifted(dataclasses.replace(RIG, lift=lift), LEVELS) for lift in ("segment_sum", "product")
    )
    for found, wanted in zip(jax.tree.leaves(product), jax.tree.leaves(base), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_lift_to_one_level_is_the_sum_over_all_levels() -> None:
    many, one = (lifted(RIG, num_levels)[0] for num_levels in (LEVELS, 1))
    np.testing.assert_allclose(jnp.sum(many, axis=3), one[..., 0, :], rtol=1e-4, atol=1e-5)


def test_exact_rewrites_have_the_base_s_loss_and_gradient() -> None:
    named = {candidate.name: candidate for candidate in occupancy.CANDIDATES}
    base = named["occupancy-cpu-conv3d"]
    everything = dataclasses.replace(base.config, remat="full", lift="product")
    rewrites.check_rewrites(
        occupancy,
        base,
        [named["occupancy-cpu-remat"], dataclasses.replace(base, config=everything)],
    )
