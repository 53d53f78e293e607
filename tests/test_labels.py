"""Labels in the ego vehicle's frame, from scenes made by hand."""

from typing import Any

import numpy as np
import pytest

from jaxbench.quality.labels import Geometry, key_frames, label_frame

GEOMETRY = Geometry(num_past=3, num_future=4)


def scene(heading: float = 0.0, num_states: int = 40) -> dict[str, np.ndarray]:
    """The ego drives at 10 m/s from (100, 50); a car 10 m ahead keeps its distance.

    The road is one lane, 4 m wide, along the way; all turned by `heading` about the start.
    """
    ahead = np.array([np.cos(heading), np.sin(heading)])
    start = np.array([100.0, 50.0])
    tracks = np.zeros((num_states, 3, 8), np.float32)
    for at in range(num_states):
        place = start + ahead * at  # 10 m/s, 0.1 s
        for track, offset in ((0, 0.0), (1, 10.0)):
            tracks[at, track] = (*(place + ahead * offset), heading, *(10 * ahead), 4, 2, 1.5)
    valid = np.zeros((num_states, 3), bool)
    valid[:, :2] = True
    line = start + np.arange(-50, 101, 2)[:, None] * ahead
    return {
        "dt": np.float64(0.1),
        "tracks": tracks,
        "valid": valid,
        "lane_points": line.astype(np.float32),
        "lane_sizes": np.array([len(line)], np.int32),
        "lane_widths": np.array([4.0], np.float32),
    }


def test_key_frames_have_whole_pasts_and_futures() -> None:
    frames = key_frames(scene(num_states=40), GEOMETRY)
    # Past: two steps of 0.2 s; future: four; every second.
    assert frames == [4, 14, 24]
    assert key_frames(scene(num_states=12), GEOMETRY) == []


@pytest.fixture(params=[0.0, 1.0, -2.5])
def labels(request: pytest.FixtureRequest) -> dict[str, Any]:
    return label_frame(scene(request.param), 10, GEOMETRY)


def test_label_frame_road_is_ahead_and_four_metres_wide(labels: dict[str, Any]) -> None:
    drivable = labels["drivable"]
    assert drivable.shape == (64, 64)
    # Cells of one metre; their centres 0.5 and 1.5 m to each side are within 2 m.
    assert (drivable[:, 30:34] == 1).all()
    assert drivable.sum() == 64 * 4


def test_label_frame_car_ahead_is_where_it_is_and_as_high(labels: dict[str, Any]) -> None:
    rows, columns = np.nonzero(labels["vehicles"])
    # From 8 to 12 m ahead, a metre to each side.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (40, 43, 31, 32)
    assert set(labels["occupied"][labels["vehicles"] == 1]) == {0b111}  # 1.5 m in half metres
    assert not labels["occupied"][labels["vehicles"] == 0].any()


def test_label_frame_ego_drives_ahead_at_its_speed(labels: dict[str, Any]) -> None:
    assert labels["ego"] == pytest.approx(
        np.array([[-4, 0, 10, 0, 0], [-2, 0, 10, 0, 0], [0, 0, 10, 0, 0]]), abs=1e-3
    )
    assert labels["way"] == pytest.approx(
        np.array([[2, 0, 0], [4, 0, 0], [6, 0, 0], [8, 0, 0]]), abs=1e-3
    )


def test_label_frame_other_car_has_a_past_and_a_future(labels: dict[str, Any]) -> None:
    assert labels["agents"][0] == pytest.approx(
        np.array([[6, 0, 10, 0, 0, 1], [8, 0, 10, 0, 0, 1], [10, 0, 10, 0, 0, 1]]), abs=1e-3
    )
    assert labels["futures"][0, :, 0] == pytest.approx([12, 14, 16, 18], abs=1e-3)
    assert not labels["agents"][1:].any()


def test_label_frame_lanes_are_evenly_spaced_points(labels: dict[str, Any]) -> None:
    there = labels["lanes"][labels["lanes"][..., 2] == 1]
    assert np.abs(there[:, 1]).max() < 1e-3
    first = labels["lanes"][0]
    assert np.diff(first[:, 0]) == pytest.approx([4.0] * 9, abs=1e-3)
