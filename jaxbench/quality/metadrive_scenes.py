"""Drives scenes in MetaDrive and writes them as plain arrays, which `labels.py` describes.

Runs in an environment of its own with MetaDrive, under Python 3.11, and imports nothing of
jaxbench: `python metadrive_scenes.py OUT FIRST_SEED NUM_SCENES NUM_STATES`.
"""

import sys
from pathlib import Path

import numpy as np

_LINE_SPACING_M = 2.0
_PHYSICS_S = 0.02
_DT_S = 0.1


def main(out: Path, first_seed: int, num_scenes: int, num_states: int) -> None:
    env = make_env(first_seed, num_scenes, horizon=num_states, step_s=_DT_S, alone=True)
    try:
        for seed in range(first_seed, first_seed + num_scenes):
            scene = _drive(env, seed, num_states)
            if scene is not None:
                np.savez_compressed(out / f"scene-{seed:05d}.npz", **scene)
            print(seed, flush=True)
    finally:
        env.close()


def make_env(first_seed, num_scenes, *, horizon, step_s, alone=False):
    """Makes the roads and their traffic; `alone` lets the simulator drive the ego vehicle."""
    from metadrive.engine.base_engine import BaseEngine

    # Its first use would fetch models and textures, which nothing here needs.
    BaseEngine.try_pull_asset = staticmethod(lambda: None)
    from metadrive.envs.metadrive_env import MetaDriveEnv
    from metadrive.policy.idm_policy import IDMPolicy

    settings = {
        "use_render": False,
        "log_level": 50,
        "start_seed": first_seed,
        "num_scenarios": num_scenes,
        "map": 4,
        "traffic_density": 0.15,
        "random_traffic": False,
        "random_lane_width": True,
        "random_lane_num": True,
        "horizon": horizon,
        "decision_repeat": round(step_s / _PHYSICS_S),
    }
    return MetaDriveEnv({**settings, "agent_policy": IDMPolicy} if alone else settings)


def _drive(env, seed, num_states):
    env.reset(seed=seed)
    ego = env.agent
    names, states = {ego.name: 0}, []
    for _ in range(num_states):
        states.append(_state(env, ego, names))
        _, _, terminated, truncated, _ = env.step([0.0, 0.0])
        if terminated or truncated:
            break
    if len(states) < 2:
        return None
    tracks = np.zeros((len(states), len(names), 8), np.float32)
    valid = np.zeros((len(states), len(names)), bool)
    for at, state in enumerate(states):
        for track, values in state.items():
            tracks[at, track], valid[at, track] = values, True
    lines, widths = _lanes(env)
    return {
        "dt": np.float64(_DT_S),
        "tracks": tracks,
        "valid": valid,
        "lane_points": np.concatenate(lines).astype(np.float32),
        "lane_sizes": np.array([len(line) for line in lines], np.int32),
        "lane_widths": np.array(widths, np.float32),
    }


def _state(env, ego, names):
    from metadrive.component.vehicle.base_vehicle import BaseVehicle

    found = {}
    for vehicle in env.engine.get_objects(lambda one: isinstance(one, BaseVehicle)).values():
        track = names.setdefault(vehicle.name, len(names))
        x, y = vehicle.position
        vx, vy = vehicle.velocity
        size = (vehicle.LENGTH, vehicle.WIDTH, vehicle.HEIGHT)
        found[track] = (x, y, vehicle.heading_theta, vx, vy, *size)
    return found


def _lanes(env):
    lines, widths = [], []
    for lane in env.current_map.road_network.get_all_lanes():
        line = np.asarray(lane.get_polyline(interval=_LINE_SPACING_M), np.float64)[:, :2]
        if len(line) > 1:
            lines.append(line)
            widths.append(float(lane.width))
    return lines, widths


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(argument) for argument in sys.argv[2:5]))
