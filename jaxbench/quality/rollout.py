"""Closed loop: a trained planner drives the ego vehicle in MetaDrive, and what comes of it.

A secondary endpoint: no verdict rests on it. A planner is asked every `step_s` for waypoints; pure
pursuit steers towards the last of them, and the throttle follows its speed. It is told the road,
the lanes and the others, no route: at a fork it may choose another way than the simulator's.

Source: Coulter, "Implementation of the Pure Pursuit Path Tracking Algorithm", 1992.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np

from jaxbench.errors import DataError
from jaxbench.quality.labels import Geometry, label_frame

FIRST_SEED = 50_000  # of its scenes, beyond those of any data set
_NUM_STATES = 150
_LEAST_M = 2.0  # to the point that is steered towards
_THROTTLE = 0.5  # for each m/s of missing speed
_ENDS = ("completion", "arrived", "crashed", "off_road")

Path = Callable[[Mapping[str, np.ndarray]], tuple[np.ndarray, float]]
"""Gives waypoints [P, 2] ahead and to the left in metres, and the last one's speed in m/s."""


def drive_scenes(
    path: Path, *, python: str, num_scenes: int, about: Mapping[str, Any]
) -> dict[str, float]:
    """Lets a planner drive scenes that no data set holds.

    Args:
      path: Plans from the arrays of one key frame, as `label_frame` gives them.
      python: Of the simulator's environment.
      about: The data's, whose geometry the planner was trained with.

    Returns:
      Mean share of the route driven (`completion`), and shares of scenes that `arrived`, `crashed`
      or left the road (`off_road`).

    Raises:
      DataError: if the simulator ends early.
    """
    geometry = Geometry(**{name: about[name] for name in Geometry.__dataclass_fields__})
    script = str(resources.files("jaxbench.quality") / "metadrive_drive.py")
    arguments = map(str, (FIRST_SEED, num_scenes, _NUM_STATES, geometry.step_s))
    with subprocess.Popen(
        [python, script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as simulator:
        try:
            ends = [_drive(simulator, path, geometry) for _ in range(num_scenes)]
        finally:
            simulator.kill()
    return {name: statistics.fmean(float(end[name]) for end in ends) for name in _ENDS}


def _drive(simulator: Any, path: Path, geometry: Geometry) -> dict[str, Any]:
    road, states = _hear(simulator), []
    lanes = {name: np.asarray(road[name]) for name in road if name.startswith("lane_")}
    lanes["lane_points"] = lanes["lane_points"].astype(np.float32)
    while "state" in (heard := _hear(simulator)):
        states.append({int(track): values for track, values in heard["state"].items()})
        places, speed = path(label_frame(*_scene(states, lanes, geometry), geometry))
        ego = states[-1][0]
        action = steer(places, speed, now=math.hypot(ego[3], ego[4]), road=road)
        simulator.stdin.write(json.dumps(action) + "\n")
        simulator.stdin.flush()
    return heard


def _hear(simulator: Any) -> dict[str, Any]:
    line = simulator.stdout.readline()
    if not line:
        raise DataError(
            "The simulator ended in the middle of a scene. Leave --rollout out to judge without it."
        )
    return json.loads(line)


def _scene(
    states: Sequence[Mapping[int, Sequence[float]]],
    lanes: Mapping[str, np.ndarray],
    geometry: Geometry,
) -> tuple[dict[str, Any], int]:
    """The last states as a scene, and which of them is now; what follows is not known yet."""
    seen = list(states[-geometry.num_past :])
    seen = [seen[0]] * (geometry.num_past - len(seen)) + seen
    num = len(seen) + geometry.num_future
    size = 1 + max(max(state) for state in seen)
    tracks, valid = np.zeros((num, size, 8), np.float32), np.zeros((num, size), bool)
    for at, state in enumerate(seen):
        for track, values in state.items():
            tracks[at, track], valid[at, track] = values, True
    tracks[len(seen) :] = tracks[len(seen) - 1]
    return {"dt": geometry.step_s, "tracks": tracks, "valid": valid, **lanes}, len(seen) - 1


def steer(
    places: np.ndarray, speed: float, *, now: float, road: Mapping[str, Any]
) -> tuple[float, float]:
    """Returns steering and throttle, each from -1 to 1, left and forward positive.

    Args:
      places: Waypoints [P, 2], ahead and to the left, in metres.
      speed: Wanted at the last of them, in m/s.
      now: Speed in m/s.
      road: Its `wheelbase_m` and its largest `steering_rad` are the vehicle's.
    """
    ahead, left = (float(part) for part in places[-1])
    apart = math.hypot(ahead, left)
    turn = 0.0
    if apart >= _LEAST_M and ahead > 0:
        turn = math.atan(2 * left / apart**2 * road["wheelbase_m"]) / road["steering_rad"]
    throttle = _THROTTLE * (speed - now)
    return max(-1.0, min(1.0, turn)), max(-1.0, min(1.0, throttle))
