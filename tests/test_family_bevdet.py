"""Lifted maps with a centre head: exact rewrites agree; sums, scans and peaks by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import check_rewrites, count_parameters, find

from jaxbench.models import bev, bevdet


def test_rewrites_agree_in_loss_and_gradient() -> None:
    changes = ("gather", "product", "sorted")
    check_rewrites(
        bevdet, find("bevdet-cpu-base"), [find(f"bevdet-cpu-{change}") for change in changes]
    )


def test_paper_backbone_has_the_parameters_of_resnet50() -> None:
    # As in torchvision: 25,557,032, less 2,049,000 of the classifier.
    assert count_parameters(find("bevdet-paper-base"), "camera.backbone") == 23_508_032


def test_sorted_sum_equals_the_segment_sum_also_of_empty_cells() -> None:
    cells = np.asarray([[[4, 1], [1, 9], [0, 4]]], np.int32)  # cell 9 is outside
    keys = jax.random.split(jax.random.key(0))
    depth = jax.random.uniform(keys[0], (2, 1, 3, 3, 2))
    context = jax.random.normal(keys[1], (2, 1, 3, 3, 5))
    want = bev.LIFTS["segment_sum"](depth, context, cells, 9)
    found = bevdet.lift_by_sorted_sum(depth, context, cells, 9)
    # A running sum of 6 points in float32.
    np.testing.assert_allclose(found, want, atol=1e-5)
    assert not np.any(found[:, [2, 3, 5, 6, 7, 8]])


def test_rig_cells_are_those_of_the_lift_splat_family() -> None:
    config = find("bevdet-cpu-base").config
    rig = find("bev-cpu-segsum").config
    same = ("fov_degrees", "num_bins", "nearest_m", "bin_m", "extent_m")
    assert [getattr(config, name) for name in same] == [getattr(rig, name) for name in same]
    found = bevdet.rig_cells(config, num_cameras=3, num_columns=7)
    want = bev.rig_cells(rig, num_cameras=3, num_columns=7, edge=config.grid)
    np.testing.assert_array_equal(found, want)


def test_linear_scan_is_the_recurrence() -> None:
    with nnx.use_eager_sharding(False):
        module = bevdet.LinearScan(8, rngs=nnx.Rngs(params=0))
    maps = jax.random.normal(jax.random.key(1), (2, 5, 1, 2, 8))
    state = jnp.zeros((2, 1, 2, 8))
    for frame in jnp.moveaxis(maps, 1, 0):
        keep = jax.nn.sigmoid(module.keep(frame))
        state = keep * state + (1 - keep) * module.value(frame)
    # Five products and sums in float32.
    np.testing.assert_allclose(module(maps), maps[:, -1] + module.out(state), atol=1e-5)


def test_heat_loss_of_one_object_in_two_cells() -> None:
    # A logit of 0 in its own cell, of 0 in the next, one cell away; another class is sure of none.
    logits = jnp.asarray([[[[0.0, -40.0], [0.0, -40.0]]]])
    found = bevdet.heat_loss(logits, jnp.asarray([[[0, 1]]]), jnp.asarray([[0]]))
    want = 0.25 * math.log(2) * (1 + (1 - math.exp(-0.5)) ** 4)
    assert float(found) == pytest.approx(want, rel=1e-5)
