"""Data of one's own with cameras: folders laid out as nuScenes, read without its devkit.

    ROOT/v1.0-*/{scene,sample,sample_data,calibrated_sensor,sensor,ego_pose,sample_annotation,
                 instance,category,log}.json
    ROOT/maps/expansion/LOCATION.json   with `lane`, `lane_connector` and `arcline_path_3`
    ROOT/samples/CAM_*/*.jpg

Only key samples are used; between them vehicles are taken to move evenly. The road is what lies
within half a lane's width of a lane's centre line, as in the other data sets.

Source: Caesar et al., "nuScenes: A multimodal dataset for autonomous driving", CVPR 2020; its
schema and map expansion as published at nuscenes.org.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.errors import DataError
from jaxbench.quality.labels import Scene
from jaxbench.quality.rig_images import Camera

_TABLES = (
    "scene",
    "sample",
    "sample_data",
    "calibrated_sensor",
    "sensor",
    "ego_pose",
    "sample_annotation",
    "instance",
    "category",
    "log",
)
_DT = 0.1  # seconds between the states of a scene
_LANE_WIDTH_M = 3.5
_SPACING_M = 1.0  # of points of a lane
_EGO_SIZE = (4.1, 1.7, 1.6)  # metres; the published platform is a Renault Zoe

Table = dict[str, dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drive:
    """One scene with its key samples.

    Attributes:
      frames: Indices of the states at which cameras looked.
      cameras: What they were, one list a frame.
    """

    name: str
    scene: Scene
    frames: tuple[int, ...]
    cameras: tuple[tuple[Camera, ...], ...]


def read_nuscenes(root: Path) -> Iterator[Drive]:
    """Yields each scene of a folder.

    Raises:
      DataError: if a table or a map is missing, or is not as published.
    """
    versions = sorted(path for path in root.glob("v1.0-*") if path.is_dir())
    if not versions:
        raise DataError(f"{root} holds no v1.0-* folder of tables. Give the root of nuScenes data.")
    try:
        tables = {name: _table(versions[0] / f"{name}.json") for name in _TABLES}
        yield from _Tables(root, tables).drives()
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"{versions[0]} is not as nuScenes publishes it: {type(error).__name__}: {error}."
        ) from error


def _table(path: Path) -> Table:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} is missing. Give the root of nuScenes data.") from error
    return {row["token"]: row for row in rows}


class _Tables:
    def __init__(self, root: Path, tables: Mapping[str, Table]) -> None:
        self._root, self._tables = root, tables
        self._maps: dict[str, tuple[list[np.ndarray], list[float]]] = {}
        self._boxes: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        for box in tables["sample_annotation"].values():
            category = tables["instance"][box["instance_token"]]["category_token"]
            if tables["category"][category]["name"].startswith("vehicle."):
                self._boxes[box["sample_token"]].append(box)
        self._shots: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        for shot in tables["sample_data"].values():
            if shot["is_key_frame"] and self._channel(shot).startswith("CAM"):
                self._shots[shot["sample_token"]].append(shot)

    def _channel(self, shot: Mapping[str, Any]) -> str:
        calibrated = self._tables["calibrated_sensor"][shot["calibrated_sensor_token"]]
        return self._tables["sensor"][calibrated["sensor_token"]]["channel"]

    def drives(self) -> Iterator[Drive]:
        for scene in self._tables["scene"].values():
            samples = self._samples(scene)
            if len(samples) < 2:
                continue
            location = self._tables["log"][scene["log_token"]]["location"]
            seconds = np.array([sample["timestamp"] for sample in samples]) * 1e-6
            seconds -= seconds[0]
            times = np.arange(0.0, seconds[-1] + 1e-6, _DT)
            lines, widths = self._map(location)
            tracks, valid = self._tracks(samples, seconds, times)
            # A key sample is at the nearest state; they are some hundredths of a second apart.
            frames = np.clip(np.rint(seconds / _DT).astype(int), 0, len(times) - 1)
            yield Drive(
                name=scene["name"],
                scene={
                    "dt": np.float64(_DT),
                    "tracks": tracks,
                    "valid": valid,
                    "lane_points": np.concatenate(lines).astype(np.float32),
                    "lane_sizes": np.array([len(line) for line in lines], np.int32),
                    "lane_widths": np.array(widths, np.float32),
                },
                frames=tuple(int(frame) for frame in frames),
                cameras=tuple(self._cameras(sample["token"]) for sample in samples),
            )

    def _samples(self, scene: Mapping[str, Any]) -> list[dict[str, Any]]:
        found, token = [], scene["first_sample_token"]
        while token:
            found.append(self._tables["sample"][token])
            token = found[-1]["next"]
        return found

    def _cameras(self, sample: str) -> tuple[Camera, ...]:
        cameras = []
        for shot in sorted(self._shots[sample], key=self._channel):
            calibrated = self._tables["calibrated_sensor"][shot["calibrated_sensor_token"]]
            cameras.append(
                Camera(
                    image=self._root / shot["filename"],
                    rotation=rotation_of(calibrated["rotation"]),
                    intrinsic=np.asarray(calibrated["camera_intrinsic"], np.float64),
                )
            )
        return tuple(cameras)

    def _tracks(
        self, samples: Sequence[Mapping[str, Any]], seconds: np.ndarray, times: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns states [T, M, 8] and where they are valid, the ego vehicle first."""
        seen: dict[str, dict[int, tuple[float, ...]]] = collections.defaultdict(dict)
        for at, sample in enumerate(samples):
            pose = self._tables["ego_pose"][self._shots[sample["token"]][0]["ego_pose_token"]]
            seen["ego"][at] = _state(pose, _EGO_SIZE)
            for box in self._boxes[sample["token"]]:
                width, length, height = box["size"]
                seen[box["instance_token"]][at] = _state(box, (length, width, height))
        names = ["ego", *(name for name in seen if name != "ego")]
        tracks = np.zeros((len(times), len(names), 8), np.float32)
        valid = np.zeros((len(times), len(names)), bool)
        for row, name in enumerate(names):
            tracks[:, row], valid[:, row] = _evenly(seen[name], seconds, times)
        return tracks, valid

    def _map(self, location: str) -> tuple[list[np.ndarray], list[float]]:
        if location not in self._maps:
            path = self._root / "maps" / "expansion" / f"{location}.json"
            try:
                given = json.loads(path.read_text(encoding="utf-8"))
            except OSError as error:
                raise DataError(
                    f"{path} is missing: the road is drawn from it. Unpack the map expansion."
                ) from error
            paths = given["arcline_path_3"]
            tokens = [one["token"] for kind in ("lane", "lane_connector") for one in given[kind]]
            lines = [lane_line(paths[token]) for token in tokens if token in paths]
            if not lines:
                raise DataError(f"{path} has no lanes.")
            self._maps[location] = lines, [_LANE_WIDTH_M] * len(lines)
        return self._maps[location]


def _state(posed: Mapping[str, Any], size: tuple[float, ...]) -> tuple[float, ...]:
    x, y, _ = posed["translation"]
    forward = rotation_of(posed["rotation"])[:, 0]
    return x, y, math.atan2(forward[1], forward[0]), *size


def _evenly(
    seen: Mapping[int, tuple[float, ...]], seconds: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns states [T, 8] between what was seen at samples, and where there are any."""
    at = sorted(seen)
    known = np.array([seen[index] for index in at], np.float64)
    known[:, 2] = np.unwrap(known[:, 2])
    found = np.stack(
        [np.interp(times, seconds[at], known[:, column]) for column in range(known.shape[1])],
        axis=1,
    )
    velocity = np.gradient(found[:, :2], _DT, axis=0) if len(times) > 1 else 0 * found[:, :2]
    valid = (times >= seconds[at[0]] - 1e-6) & (times <= seconds[at[-1]] + 1e-6)
    states = np.concatenate([found[:, :3], velocity, found[:, 3:]], axis=1)
    return np.where(valid[:, None], states, 0).astype(np.float32), valid


def rotation_of(quaternion: Sequence[float]) -> np.ndarray:
    """Returns the matrix [3, 3] of a unit quaternion (w, x, y, z)."""
    w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def lane_line(path: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Returns points [Q, 2] of a lane's centre line, given as arcs and straights.

    Args:
      path: Each with `start_pose` (x, y, heading), `shape`, three of L, R and S, `radius`, and
        `segment_length`, metres of the three.
    """
    points: list[tuple[float, float]] = []
    for piece in path:
        x, y, heading = map(float, piece["start_pose"])
        points.append((x, y))
        for turn, length in zip(piece["shape"], piece["segment_length"], strict=True):
            bend = {"L": 1.0, "R": -1.0, "S": 0.0}[turn] / float(piece["radius"])
            steps = max(1, math.ceil(length / _SPACING_M))
            step = length / steps
            for _ in range(steps if length > 0 else 0):
                # The chord of an arc points along its middle heading.
                half = bend * step / 2
                chord = step * (math.sin(half) / half if half else 1.0)
                x += chord * math.cos(heading + half)
                y += chord * math.sin(heading + half)
                heading += 2 * half
                points.append((x, y))
    return np.asarray(points)
