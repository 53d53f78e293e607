"""Lets another process drive the ego vehicle in MetaDrive, scene by scene.

Runs in the environment of `metadrive_scenes.py`, with the same roads and traffic:
`python metadrive_drive.py FIRST_SEED NUM_SCENES NUM_STATES STEP_S`. A scene is lines of JSON on the
standard output: its lanes, then a state each step, to which [steering, throttle] is answered by a
line on the standard input, then how it ended.
"""

import json
import os
import sys

import numpy as np
from metadrive_scenes import _lanes, _state, make_env


def main(first_seed: int, num_scenes: int, num_states: int, step_s: float) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the simulator prints, too

    def say(what):
        out.write(json.dumps(what) + "\n")
        out.flush()

    env = make_env(first_seed, num_scenes, horizon=num_states, step_s=step_s)
    try:
        for seed in range(first_seed, first_seed + num_scenes):
            _drive(env, seed, say)
    finally:
        env.close()


def _drive(env, seed, say):
    env.reset(seed=seed)
    ego = env.agent
    lines, widths = _lanes(env)
    say(
        {
            "lane_points": np.concatenate(lines).tolist(),
            "lane_sizes": [len(line) for line in lines],
            "lane_widths": widths,
            "wheelbase_m": float(ego.FRONT_WHEELBASE + ego.REAR_WHEELBASE),
            "steering_rad": float(np.radians(ego.max_steering)),
        }
    )
    names, done = {ego.name: 0}, False
    while not done:
        state = _state(env, ego, names)
        say({"state": {track: [float(value) for value in state[track]] for track in state}})
        _, _, terminated, truncated, info = env.step(json.loads(sys.stdin.readline()))
        done = terminated or truncated
    say(
        {
            "completion": float(info["route_completion"]),
            "arrived": bool(info["arrive_dest"]),
            "crashed": bool(info["crash"]),
            "off_road": bool(info["out_of_road"]),
        }
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:4]), float(sys.argv[4]))
