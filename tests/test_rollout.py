"""Planners drive in closed loop: a bicycle model stands for the simulator."""

import math
import stat
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbench.errors import DataError
from jaxbench.models import planner
from jaxbench.quality.labels import Geometry
from jaxbench.quality.rollout import drive_scenes, steer
from jaxbench.quality.tasks import TASKS

ROAD = {"wheelbase_m": 2.5, "steering_rad": 0.7}
ABOUT = asdict(Geometry())
PLANNING = next(task for task in TASKS if task.name == "planning")

# A straight lane along x, a bicycle that begins 3 m to its right, and a car ahead from the third
# state on.
SIMULATOR = """
import json, math, sys
first, scenes, states, step_s = int(sys.argv[2]), int(sys.argv[3]), 40, float(sys.argv[5])
for scene in range(scenes):
    print(json.dumps({"lane_points": [[2.0 * i - 40, 0.0] for i in range(200)], "lane_sizes": [200],
                      "lane_widths": [4.0], "wheelbase_m": 2.5, "steering_rad": 0.7}), flush=True)
    x, y, heading, speed = 0.0, -3.0, 0.0, 4.0
    for at in range(states):
        velocity = speed * math.cos(heading), speed * math.sin(heading)
        state = {"0": [x, y, heading, *velocity, 4, 2, 1]}
        if at >= 2:
            state["1"] = [x + 10, 0.0, 0.0, 0.0, 0.0, 4, 2, 1]
        print(json.dumps({"state": state}), flush=True)
        turn, throttle = json.loads(sys.stdin.readline())
        for _ in range(20):
            heading += step_s / 20 * speed * math.tan(turn * 0.7) / 2.5
            x += step_s / 20 * speed * math.cos(heading)
            y += step_s / 20 * speed * math.sin(heading)
        speed += 3 * throttle * step_s
    if DIES:
        sys.exit(3)
    print(json.dumps({"completion": x, "arrived": abs(y) < 0.3, "crashed": False,
                      "off_road": abs(speed - 8) > 0.5}), flush=True)
"""


def simulator(folder: Path, *, dies: bool = False) -> str:
    """A Python that runs the simulator above instead of what it is asked to."""
    script, python = folder / "simulator.py", folder / "python"
    script.write_text(SIMULATOR.replace("DIES", str(dies)))
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(python)


def test_planner_that_sees_the_lane_ends_on_it_at_its_speed(tmp_path: Path) -> None:
    seen = []

    def path(arrays: Any) -> tuple[np.ndarray, float]:
        seen.append(arrays)
        pieces = arrays["lanes"].reshape(-1, 3)
        points = pieces[pieces[:, 2] > 0, :2]
        ahead = points[points[:, 0] > 6]
        return ahead[np.argmin(ahead[:, 0])][None], 8.0

    found = drive_scenes(path, python=simulator(tmp_path), num_scenes=2, about=ABOUT)
    assert found["arrived"] == 1
    assert found["off_road"] == found["crashed"] == 0
    assert 40 * 0.2 * 5 < found["completion"] < 40 * 0.2 * 8
    assert len(seen) == 2 * 40
    # The lane lies to the left at first; the past is the first state again until there is one.
    assert seen[0]["ego"].shape == (5, 5)
    assert seen[0]["ego"][:, :2] == pytest.approx(np.zeros((5, 2)))
    assert seen[39]["ego"][0, 0] == pytest.approx(-4 * 0.2 * 8, rel=0.1)
    assert seen[1]["agents"][..., 5].sum() == 0
    assert seen[3]["agents"][0, :, 5].tolist() == [0, 0, 0, 1, 1]
    assert seen[3]["vehicles"].any()


def test_simulator_that_ends_early_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ended in the middle of a scene. Leave --rollout out"):
        drive_scenes(
            lambda arrays: (np.array([[5.0, 0.0]]), 4.0),
            python=simulator(tmp_path, dies=True),
            num_scenes=1,
            about=ABOUT,
        )


@pytest.mark.parametrize("radius", [8.0, -8.0, 40.0])
@pytest.mark.parametrize("angle", [0.3, 0.7])
def test_steer_follows_the_circle_through_the_waypoint(radius: float, angle: float) -> None:
    side = math.copysign(1, radius)
    place = np.array([[abs(radius) * math.sin(angle), radius * (1 - math.cos(angle))]])
    turn, throttle = steer(place, 5.0, now=5.0, road=ROAD)
    assert turn == pytest.approx(side * math.atan(2.5 / abs(radius)) / 0.7)
    assert throttle == 0


def test_steer_keeps_to_what_the_vehicle_can(tmp_path: Path) -> None:
    assert steer(np.array([[1.0, 3.0]]), 20.0, now=0.0, road=ROAD) == (1.0, 1.0)
    # Nothing ahead: straight on, and brake.
    assert steer(np.array([[0.1, 0.0]]), 0.0, now=9.0, road=ROAD) == (0.0, -1.0)


def test_drive_of_a_planner_gives_the_places_its_loss_wants() -> None:
    """Waypoints of a made-up path, put into the network's outputs as its loss asks for them."""
    noise, edge = jnp.array(np.random.default_rng(0).normal(size=(4, 2, 2))), 40
    places, _, speeds = planner.true_path(noise, edge)
    cells = np.floor(np.asarray(places)).astype(int)
    points = np.zeros((4, 2, edge, edge), np.float32)
    for at in np.ndindex(4, 2):
        points[(*at, *cells[at])] = 9
    details = np.concatenate(
        [places - cells, np.zeros((4, 2, 1)), np.asarray(speeds)[..., None]], axis=-1
    )

    def network(raster: Any) -> Any:
        return jnp.asarray(points), None, jnp.asarray(details)

    assert PLANNING.drive is not None
    found, speed = PLANNING.drive(network, {"raster": np.zeros((2, 8, 8, 20))})
    assert found.shape == (2, 4, 2)
    metres = np.cumsum(np.asarray(speeds) * 10 * planner.STEP_S, axis=0).T
    # Nearly straight on from the car: as far as it drove.
    assert np.linalg.norm(found, axis=-1) == pytest.approx(metres, rel=0.05)
    assert speed == pytest.approx(10 * speeds[-1])
