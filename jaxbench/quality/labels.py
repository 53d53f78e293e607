"""From driven scenes to what networks see and are asked: everything in the ego vehicle's frame.

A scene is plain arrays, whoever drove it:

    dt float []                seconds between two states
    tracks float32 [T, M, 8]   x, y, heading, vx, vy, length, width, height; the ego is track 0
    valid bool [T, M]          whether a track is there
    lane_points float32 [S, 2] centre lines, one after the other, in metres
    lane_sizes int32 [L]       points of each
    lane_widths float32 [L]    metres
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Scene = Mapping[str, Any]

_SEGMENTS = 64  # of lanes, looked at together


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """What of a scene is kept.

    Attributes:
      step_s: Between two states of past and future.
      every_s: Between two key frames.
      edge: Cells along an edge of the map, which reaches `extent_m` each way.
      levels: Of occupancy, `level_m` high each, from the ground.
    """

    step_s: float = 0.2
    every_s: float = 1.0
    extent_m: float = 32.0
    edge: int = 64
    levels: int = 8
    level_m: float = 0.5
    num_agents: int = 16
    num_past: int = 5
    num_future: int = 20
    num_lanes: int = 48
    lane_points: int = 10
    lane_spacing_m: float = 4.0


def key_range(scene: Scene, geometry: Geometry) -> tuple[int, int]:
    """Returns the first state with a whole past, and the first without a whole future."""
    stride = round(geometry.step_s / float(scene["dt"]))
    return (
        (geometry.num_past - 1) * stride,
        len(scene["tracks"]) - geometry.num_future * stride,
    )


def key_frames(scene: Scene, geometry: Geometry) -> list[int]:
    """Returns the states that have whole pasts and futures, `every_s` apart."""
    apart = max(1, round(geometry.every_s / float(scene["dt"])))
    return [at for at in range(*key_range(scene, geometry), apart) if scene["valid"][at, 0]]


def label_frame(scene: Scene, at: int, geometry: Geometry) -> dict[str, np.ndarray]:
    """Returns the arrays of one key frame, as `shards.py` lists them, without images."""
    x, y, heading = scene["tracks"][at, 0, :3]
    frame = _Frame(float(x), float(y), float(heading))
    stride = round(geometry.step_s / float(scene["dt"]))
    past = at - stride * np.arange(geometry.num_past)[::-1]
    future = at + stride * np.arange(1, geometry.num_future + 1)
    drivable = draw_lanes(scene, frame, geometry)
    vehicles, occupied = draw_boxes(scene, at, frame, geometry)
    chosen = _nearest(scene, at, frame, geometry.num_agents)
    return {
        "drivable": drivable,
        "vehicles": vehicles,
        "occupied": occupied,
        "agents": _pasts(scene, past, chosen, frame, geometry),
        "futures": _futures(scene, future, chosen, frame, geometry),
        "ego": _states(scene["tracks"][past, 0], frame),
        "way": _states(scene["tracks"][future, 0], frame)[:, [0, 1, 4]],
        "lanes": _lanes(scene, frame, geometry),
    }


@dataclass(frozen=True, slots=True)
class _Frame:
    """The ego vehicle's place and heading, into whose frame points are turned."""

    x: float
    y: float
    heading: float

    def points(self, points: np.ndarray) -> np.ndarray:
        return self.vectors(points - np.array([self.x, self.y], np.float32))

    def vectors(self, vectors: np.ndarray) -> np.ndarray:
        cos, sin = np.cos(self.heading), np.sin(self.heading)
        forward = vectors[..., 0] * cos + vectors[..., 1] * sin
        left = vectors[..., 1] * cos - vectors[..., 0] * sin
        return np.stack([forward, left], axis=-1).astype(np.float32)

    def angles(self, angles: np.ndarray) -> np.ndarray:
        return ((angles - self.heading + np.pi) % (2 * np.pi) - np.pi).astype(np.float32)


def centre_lines(scene: Scene) -> list[tuple[np.ndarray, float]]:
    """Returns each lane's centre line [Q, 2] and width."""
    ends = np.cumsum(scene["lane_sizes"])
    starts = ends - scene["lane_sizes"]
    return [
        (scene["lane_points"][start:end], float(width))
        for start, end, width in zip(starts, ends, scene["lane_widths"], strict=True)
    ]


def _cells(geometry: Geometry) -> np.ndarray:
    """Centres of the map's cells [X, Y, 2], back to front and right to left."""
    size = 2 * geometry.extent_m / geometry.edge
    along = (np.arange(geometry.edge) + 0.5) * size - geometry.extent_m
    return np.stack(np.meshgrid(along, along, indexing="ij"), axis=-1).astype(np.float32)


def draw_lanes(scene: Scene, frame: _Frame, geometry: Geometry) -> np.ndarray:
    """Marks the cells whose centres lie within half a lane's width of its centre line."""
    cells = _cells(geometry).reshape(-1, 2)
    found = np.zeros(len(cells), bool)
    reach = geometry.extent_m * 1.5
    starts, ends, halves = [], [], []
    for line, width in centre_lines(scene):
        points = frame.points(line)
        near = np.all(np.abs(points[:-1]) < reach, axis=1)
        starts.append(points[:-1][near])
        ends.append(points[1:][near])
        halves.append(np.full(near.sum(), width / 2, np.float32))
    segments = [np.concatenate(parts) for parts in (starts, ends, halves)]
    for at in range(0, len(segments[2]), _SEGMENTS):
        start, end, half = (part[at : at + _SEGMENTS] for part in segments)
        found |= np.any(_distances(cells, start, end) <= half[:, None], axis=0)
    return found.reshape(geometry.edge, geometry.edge).astype(np.uint8)


def _distances(points: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Distances [S, P] of points [P, 2] from segments [S, 2] to [S, 2]."""
    along = ends - starts
    apart = points[None] - starts[:, None]
    square = np.maximum(np.sum(along**2, axis=1), 1e-9)
    share = np.clip(np.einsum("spc,sc->sp", apart, along) / square[:, None], 0, 1)
    return np.linalg.norm(apart - share[..., None] * along[:, None], axis=-1)


def draw_boxes(
    scene: Scene, at: int, frame: _Frame, geometry: Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Marks the cells under other vehicles, and the levels they fill, one bit each."""
    cells = _cells(geometry)
    vehicles = np.zeros(cells.shape[:2], np.uint8)
    occupied = np.zeros(cells.shape[:2], np.uint8)
    for track in np.flatnonzero(scene["valid"][at]):
        if track == 0:
            continue
        x, y, heading, _, _, length, width, height = scene["tracks"][at, track]
        centre = frame.points(np.array([x, y]))
        if np.any(np.abs(centre) > geometry.extent_m + length):
            continue
        own = _Frame(float(centre[0]), float(centre[1]), float(frame.angles(heading)))
        apart = np.abs(own.points(cells))
        inside = (apart[..., 0] <= length / 2) & (apart[..., 1] <= width / 2)
        vehicles[inside] = 1
        filled = min(geometry.levels, max(1, int(np.ceil(height / geometry.level_m))))
        occupied[inside] |= np.uint8((1 << filled) - 1)
    return vehicles, occupied


def _states(tracks: np.ndarray, frame: _Frame) -> np.ndarray:
    """x, y, vx, vy, heading of states [..., 8]."""
    return np.concatenate(
        [
            frame.points(tracks[..., :2]),
            frame.vectors(tracks[..., 3:5]),
            frame.angles(tracks[..., 2])[..., None],
        ],
        axis=-1,
    )


def _nearest(scene: Scene, at: int, frame: _Frame, most: int) -> np.ndarray:
    """Tracks of other vehicles that are there, the nearest first."""
    there = np.flatnonzero(scene["valid"][at])
    there = there[there != 0]
    apart = np.linalg.norm(frame.points(scene["tracks"][at, there, :2]), axis=-1)
    return there[np.argsort(apart, kind="stable")][:most]


def _pasts(
    scene: Scene, past: np.ndarray, chosen: np.ndarray, frame: _Frame, geometry: Geometry
) -> np.ndarray:
    out = np.zeros((geometry.num_agents, geometry.num_past, 6), np.float32)
    for row, track in enumerate(chosen):
        seen = scene["valid"][past, track]
        out[row, :, :5] = np.where(seen[:, None], _states(scene["tracks"][past, track], frame), 0)
        out[row, :, 5] = seen
    return out


def _futures(
    scene: Scene, future: np.ndarray, chosen: np.ndarray, frame: _Frame, geometry: Geometry
) -> np.ndarray:
    out = np.zeros((geometry.num_agents, geometry.num_future, 3), np.float32)
    for row, track in enumerate(chosen):
        known = scene["valid"][future, track]
        places = frame.points(scene["tracks"][future, track, :2])
        out[row, :, :2] = np.where(known[:, None], places, 0)
        out[row, :, 2] = known
    return out


def _lanes(scene: Scene, frame: _Frame, geometry: Geometry) -> np.ndarray:
    """Pieces of centre lines of evenly spaced points, the nearest pieces first."""
    length = geometry.lane_points
    pieces: list[tuple[float, np.ndarray]] = []
    for line, _ in centre_lines(scene):
        points = _evenly(frame.points(line), geometry.lane_spacing_m)
        for start in range(0, len(points), length):
            piece = points[start : start + length]
            nearest = float(np.min(np.linalg.norm(piece, axis=1)))
            if nearest < 2 * geometry.extent_m:
                pieces.append((nearest, piece))
    pieces.sort(key=lambda item: item[0])
    out = np.zeros((geometry.num_lanes, length, 3), np.float32)
    for row, (_, piece) in enumerate(pieces[: geometry.num_lanes]):
        out[row, : len(piece), :2] = piece
        out[row, : len(piece), 2] = 1
    return out


def _evenly(points: np.ndarray, spacing_m: float) -> np.ndarray:
    """Points of a polyline, so far apart from each other along it."""
    lengths = np.linalg.norm(np.diff(points, axis=0), axis=1)
    along = np.concatenate([[0.0], np.cumsum(lengths)])
    wanted = np.arange(0.0, along[-1] + 1e-6, spacing_m)
    return np.stack([np.interp(wanted, along, points[:, axis]) for axis in (0, 1)], axis=1)
