"""The hydra family: its backbone's size, where cells and rays look, and its exact rewrites."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rewrites
from flax import nnx

from jaxbench.models import hydra
from jaxbench.models.blocks import view
from jaxbench.models.blocks.video import LinearRecurrence

NAMED = {candidate.name: candidate for candidate in hydra.CANDIDATES}


def test_backbone_has_the_parameters_of_regnety_4gf_without_its_classifier() -> None:
    camera = rewrites.abstract(NAMED["hydra-paper-base"]).camera
    parts = (nnx.state(camera.stem, nnx.Param), nnx.state(camera.stages, nnx.Param))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts))
    classifier = 1088 * 1000 + 1000
    assert count + classifier == 20_646_656
    # Radosavovic et al., CVPR 2020, table 4 gives 20.6 million.
    assert count + classifier == pytest.approx(20.6e6, rel=0.005)


def test_sectors_are_of_cells_that_lie_in_their_cameras_direction() -> None:
    order = view.sector_order(16, 8).reshape(8, -1)
    assert sorted(order.reshape(-1)) == list(range(256))
    forward, left = view.raster_positions(16)[order].transpose(2, 0, 1)
    away = np.arctan2(left, forward) - np.arange(8)[:, None] * math.pi / 4
    away = np.abs((away + math.pi) % (2 * math.pi) - math.pi)
    # A square's eighth of the area spans atan(1/2) to each side of a camera that looks straight.
    assert np.max(away) < math.atan(0.5) + math.radians(3)


def test_sector_ahead_of_four_by_four_cells_by_hand() -> None:
    # The two middle cells of the front row, and of those at 45 degrees the first to each side.
    assert view.sector_order(4, 4)[:4].tolist() == [12, 13, 14, 10]


def test_rays_of_four_cameras_by_hand() -> None:
    rays = view.ray_directions(4, 2, 2, fov_degrees=90.0) * 180
    # Half a metre a metre to each side is 26.57 degrees, the same up is 24.09 on such a slant.
    np.testing.assert_allclose(rays[0, :, :, 0], [[26.565, -26.565]] * 2, atol=1e-3)
    np.testing.assert_allclose(rays[1, :, :, 0], [[116.565, 63.435]] * 2, atol=1e-3)
    np.testing.assert_allclose(rays[2, :, :, 1], [[24.095] * 2, [-24.095] * 2], atol=1e-3)


def test_linear_recurrence_is_the_loop_over_its_frames() -> None:
    with nnx.use_eager_sharding(False):
        module = LinearRecurrence(8, rngs=nnx.Rngs(params=0))
    x = np.random.default_rng(0).standard_normal((2, 5, 3, 3, 8)).astype(np.float32)
    state = jnp.zeros(())
    for t in range(5):
        gate, value = jnp.split(module.frame(jnp.asarray(x[:, t])), 2, axis=-1)
        keep = jax.nn.sigmoid(gate)
        state = keep * state + (1 - keep) * value
    np.testing.assert_allclose(module(jnp.asarray(x)), x[:, -1] + module.out(state), atol=1e-5)


@pytest.mark.parametrize(("frames", "old_is_trained"), [("all", True), ("newest", False)])
def test_gradient_of_old_frames_is_stopped_where_only_the_newest_is_trained(
    frames: Any, old_is_trained: bool
) -> None:
    base = NAMED["hydra-cpu-base"]
    candidate = dataclasses.replace(base, config=dataclasses.replace(hydra.CPU, frames=frames))
    graph, state = nnx.split(rewrites.fill(candidate, rewrites.draw(candidate)))

    def energy(images: jax.Array) -> jax.Array:
        x = nnx.merge(graph, state, copy=True)._observe_frames(images, 8)
        return jnp.sum(x * x)

    images = np.random.default_rng(0).standard_normal((1, 2, 4, 32, 48, 3)).astype(np.float32)
    slope = jax.jit(jax.grad(energy), compiler_options=rewrites.QUICK)(images)
    old, new = (float(jnp.max(jnp.abs(slope[:, t]))) for t in range(2))
    assert new > 0
    assert (old > 0) == old_is_trained


def test_exact_rewrites_have_the_base_s_loss_and_gradient() -> None:
    changes = ("chunked", "scancameras", "remat")
    rewrites.check_rewrites(
        hydra, NAMED["hydra-cpu-base"], [NAMED[f"hydra-cpu-{change}"] for change in changes]
    )
