"""Data of one's own: ScenarioNet folders, into which Waymo, nuScenes, nuPlan and Argoverse convert.

A ScenarioNet folder holds one pickled ScenarioDescription a file. Unpickling runs code: read only
files that you trust. Scenes become the arrays that `labels.py` describes. They have no images, and
forecasting and planning need none.

Source: Li et al., "ScenarioNet", NeurIPS 2023; the ScenarioDescription of MetaDrive 0.4.3.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.errors import DataError
from jaxbench.quality.labels import Scene

_LANE_WIDTH_M = 3.5  # where a map says none
_SUMMARY = ("dataset_summary.pkl", "dataset_mapping.pkl")


def read_scenarionet(folder: Path) -> Iterator[tuple[str, Scene]]:
    """Yields the name and the arrays of each scene of a ScenarioNet folder.

    Raises:
      DataError: if there is none, or one is not as described.
    """
    files = sorted(path for path in folder.rglob("*.pkl") if path.name not in _SUMMARY)
    if not files:
        raise DataError(f"{folder} holds no scenario (*.pkl). Give a folder of ScenarioNet.")
    for path in files:
        with path.open("rb") as file:
            try:
                scenario = pickle.load(file)
                yield path.stem, scene_of(scenario)
            except (KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
                raise DataError(
                    f"{path} is no ScenarioDescription: {type(error).__name__}: {error}. Convert "
                    "it with ScenarioNet, or take it out."
                ) from error


def scene_of(scenario: Mapping[str, Any]) -> Scene:
    """Returns the arrays of one scenario; the self-driving car is track 0."""
    about, tracks = scenario["metadata"], scenario["tracks"]
    times = np.asarray(about["ts"], np.float64)
    ego = about["sdc_id"]
    names = [ego, *(name for name in tracks if name != ego and tracks[name]["type"] == "VEHICLE")]
    states = np.zeros((len(times), len(names), 8), np.float32)
    valid = np.zeros((len(times), len(names)), bool)
    for row, name in enumerate(names):
        state = tracks[name]["state"]
        states[:, row, :2] = np.asarray(state["position"])[:, :2]
        states[:, row, 2] = np.asarray(state["heading"]).reshape(-1)
        states[:, row, 3:5] = np.asarray(state["velocity"])[:, :2]
        for column, size in enumerate(("length", "width", "height"), start=5):
            states[:, row, column] = np.asarray(state[size], np.float32).reshape(-1)
        valid[:, row] = np.asarray(state["valid"], bool).reshape(-1)
    lines, widths = _lanes(scenario["map_features"])
    return {
        "dt": np.float64(np.median(np.diff(times))),
        "tracks": states,
        "valid": valid,
        "lane_points": np.concatenate(lines).astype(np.float32),
        "lane_sizes": np.array([len(line) for line in lines], np.int32),
        "lane_widths": np.array(widths, np.float32),
    }


def _lanes(features: Mapping[str, Any]) -> tuple[list[np.ndarray], list[float]]:
    lines, widths = [], []
    for feature in features.values():
        if not str(feature["type"]).startswith("LANE"):
            continue
        line = np.asarray(feature["polyline"], np.float64)[:, :2]
        if len(line) > 1:
            lines.append(line)
            width = np.asarray(feature.get("width", _LANE_WIDTH_M), np.float64)
            widths.append(float(np.mean(width)) or _LANE_WIDTH_M)
    if not lines:
        raise ValueError("the map has no lanes")
    return lines, widths
