"""The planner: exact rewrites of its recurrent net, and the path and boxes it learns from."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import check_rewrites

from jaxbench.models import planner

NAMED = {candidate.name: candidate for candidate in planner.CANDIDATES}


def test_exact_rewrites_agree_in_value_and_gradient() -> None:
    exact = [c for c in planner.CANDIDATES if c.size == "cpu" and c.validity == "T0"]
    check_rewrites(planner, NAMED["planner-cpu-base"], exact)


def test_path_without_noise_is_straight_at_8_metres_a_second() -> None:
    places, headings, speeds = planner.true_path(jnp.zeros((10, 1, 2)), 100)
    # 8 m/s x 0.2 s = 1.6 m, two cells of 0.8 m, up from row 75.
    np.testing.assert_allclose(places[:, 0, 0], 75 - 2 * np.arange(1, 11), rtol=1e-5)
    np.testing.assert_allclose(places[:, 0, 1], 50, rtol=1e-5)
    np.testing.assert_array_equal(headings, 0)
    np.testing.assert_allclose(speeds, 0.8, rtol=1e-5)


def test_path_turns_left_where_the_yaw_is_positive() -> None:
    noise = jnp.zeros((2, 1, 2)).at[0, 0, 1].set(math.pi / 2 / (0.3 * planner.STEP_S))
    places, _, _ = planner.true_path(noise, 100)
    assert places[1, 0].tolist() == pytest.approx([75.0, 46.0], rel=1e-5)


def test_box_is_drawn_along_the_heading() -> None:
    # A map of 400 cells of 0.2 m: the car has 24 x 10.5 cells.
    places = jnp.tile(jnp.array([[[200.0, 100.0]]]), (2, 1, 1))
    boxes = np.asarray(planner.draw_boxes(places, jnp.array([[0.0], [math.pi / 2]]), 400))
    rows, columns = (np.flatnonzero(boxes[0, 0].any(axis=axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (188, 211, 95, 104)
    np.testing.assert_array_equal(boxes[1, 0].sum(), boxes[0, 0].sum())
    assert boxes[1, 0].any(axis=0).sum() == 24
