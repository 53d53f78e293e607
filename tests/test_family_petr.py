"""Queries over image tokens: exact rewrites agree; rays, boxes and matching by hand."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import check_rewrites, count_parameters, find

from jaxbench.models import petr
from jaxbench.models.blocks import camera, queries


def test_paper_backbone_has_the_parameters_of_resnet50() -> None:
    base = find("petr-paper-base")
    # He et al., CVPR 2016, as in torchvision: 25,557,032, less 2,049,000 of the classifier.
    assert count_parameters(base, "camera.backbone") == 23_508_032
    # No publication counts the whole of it.
    assert count_parameters(base) == 35_375_328


def test_fleet_backbone_has_the_parameters_of_resnet101() -> None:
    # As in torchvision: 44,549,160, less the classifier.
    assert count_parameters(find("petr-fleet-base"), "camera.backbone") == 42_500_160


def test_rewrites_agree_in_loss_and_gradient() -> None:
    changes = ("chunked", "remat")
    check_rewrites(petr, find("petr-cpu-base"), [find(f"petr-cpu-{change}") for change in changes])


@pytest.mark.parametrize("change", ["heads2x", "heads4x"])
@pytest.mark.parametrize("size", ["cpu", "paper"])
def test_wider_heads_leave_the_parameters_as_many(size: str, change: str) -> None:
    wide, base = (count_parameters(find(f"petr-{size}-{name}")) for name in (change, "base"))
    assert wide == base


def test_ray_points_project_back_to_their_pixel() -> None:
    config = dataclasses.replace(petr._CPU, num_points=4)
    rows, columns, P, far = 3, 5, 4, config.farthest_m
    found = petr.ray_points(config, num_cameras=4, num_rows=rows, num_columns=columns)
    chance = 1 / (1 + np.exp(-np.asarray(found, np.float64)))
    ground = (2 * chance[..., : 2 * P] - 1).reshape(4, rows, columns, P, 2) * far
    up = (2 * chance[..., 2 * P :] - 1) * petr.LIFT_M
    for n, i, j in np.ndindex(4, rows, columns):
        # The last point of the outer rows is above or below the range and is clipped.
        points = np.concatenate([ground[n, i, j], up[n, i, j, :, None]], axis=-1)[:3]
        column, row, depth = camera.project(
            points, num_cameras=4, num_rows=rows, num_columns=columns, fov_degrees=70
        )
        np.testing.assert_allclose(depth[n], petr.ray_depths(config)[:3], rtol=1e-4)
        np.testing.assert_allclose(column[n], j, atol=1e-3)
        np.testing.assert_allclose(row[n], i, atol=1e-3)


def test_ray_depths_steps_grow_linearly() -> None:
    config = dataclasses.replace(petr._CPU, num_points=3, farthest_m=13)
    # Steps of 12 / (3 * 4) = 1 m times 0, 2, 6.
    assert petr.ray_depths(config).tolist() == [1.0, 3.0, 7.0]


def test_match_greedily_takes_each_query_once_in_the_labels_order() -> None:
    cost = jnp.asarray([[[1.0, 0.0], [5.0, 3.0], [2.0, 4.0]]])
    # The first object takes query 0, which the second would have had at 0; its next is query 1.
    assert queries.match_greedily(cost).tolist() == [[0, 1]]


def test_set_loss_of_perfect_boxes_leaves_the_classes_alone() -> None:
    codes = jnp.arange(20).reshape(1, 2, 10) * 50
    classes = jnp.asarray([[1, 0]])
    boxes = queries.decode_boxes(codes)[:, ::-1]
    logits = jnp.zeros((1, 2, 2))
    # At chance 1/2 everywhere: 2 hits of 1/4 and 2 misses of 3/4, each by 1/4 ln 2; over 2
    # objects, doubled.
    wanted = 2 * (2 * 0.25 + 2 * 0.75) * 0.25 * math.log(2) / 2
    found = float(queries.set_loss(logits, boxes, classes, codes))
    assert found == pytest.approx(wanted, rel=1e-6)
