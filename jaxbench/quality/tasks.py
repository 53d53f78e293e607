"""Tasks: which arrays of a data set a network is given, and what it is judged by.

A network's task follows from the names of its workload's inputs. Shapes of its workload and the
geometry in its config are set to the data's. Every metric is better where it is more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbench.candidate import Candidate
from jaxbench.errors import DataError
from jaxbench.quality.tokens import draw_tokens

Arrays = Mapping[str, np.ndarray]
Sums = dict[str, Any]
_GEOMETRY = ("extent_m", "fov_degrees")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question to networks.

    Attributes:
      inputs: Names of the workload's inputs by which its networks are known.
      prepare: `prepare(arrays, about, candidate)` returns the network's inputs, key frame by key
        frame, as arrays.
      score: `score(module, batch)` returns sums over a batch.
      finish: `finish(sums)` returns the metric of all batches.
      metric: Its name.
      drive: `drive(module, batch)` returns waypoints [B, P, 2] ahead and to the left in metres, and
        the last one's speed [B] in m/s, where networks can drive.
    """

    name: str
    inputs: frozenset[str]
    prepare: Callable[[Arrays, Mapping[str, Any], Candidate], dict[str, np.ndarray]]
    score: Callable[[Any, dict[str, Any]], Sums]
    finish: Callable[[Sums], float]
    metric: str
    drive: Callable[[Any, dict[str, Any]], tuple[Any, Any]] | None = None


def find_task(candidate: Candidate) -> Task:
    """Returns the task of a candidate.

    Raises:
      DataError: if there is none for its inputs.
    """
    names = dict(candidate.workload.inputs)
    shaped = {name: len(given.shape) for name, given in names.items()}
    for task in TASKS:
        if task.inputs == frozenset(names) and (
            "labels" not in shaped or shaped["labels"] == _RANKS[task.name]
        ):
            return task
    known = "; ".join(f"{task.name}: {', '.join(sorted(task.inputs))}" for task in TASKS)
    raise DataError(
        f"No driving task has the inputs of {candidate.name}: {', '.join(sorted(names))}. Known: "
        f"{known}."
    )


def fit_to_data(candidate: Candidate, arrays: Arrays, about: Mapping[str, Any]) -> Candidate:
    """Returns a candidate with the shapes and the geometry of a data set."""
    task = find_task(candidate)
    fields = {field.name for field in dataclasses.fields(candidate.config)}
    geometry = {
        name: _as_kind_of(getattr(candidate.config, name), about[name], name)
        for name in _GEOMETRY
        if name in fields and name in about
    }
    candidate = dataclasses.replace(
        candidate, config=dataclasses.replace(candidate.config, **geometry)
    )
    few = {name: array[:1] for name, array in arrays.items()}
    prepared = task.prepare(few, about, candidate)
    inputs = tuple(
        (name, dataclasses.replace(given, shape=prepared[name].shape[1:]))
        for name, given in candidate.workload.inputs
    )
    return dataclasses.replace(
        candidate, workload=dataclasses.replace(candidate.workload, inputs=inputs)
    )


def _as_kind_of(own: Any, value: float, name: str) -> Any:
    """Returns the data's value as the config has it, which may be whole."""
    kept = type(own)(value)
    if kept != value:
        raise DataError(
            f"The data has {name}={value}, and the network's config takes whole numbers there. "
            "Build the data with one."
        )
    return kept


# --- Bird's-eye view ------------------------------------------------------------------------------


def _images(arrays: Arrays) -> np.ndarray:
    if "images" not in arrays:
        raise DataError(
            "The data has no images. Networks that forecast or plan need none; for others build "
            "data with cameras."
        )
    return arrays["images"].astype(np.float32) / 127.5 - 1


def _prepare_map(arrays: Arrays, about: Mapping[str, Any], candidate: Candidate) -> Any:
    return {"images": _images(arrays), "labels": arrays["drivable"].astype(np.int32)}


def _score_map(module: Any, batch: dict[str, Any]) -> Sums:
    wanted = batch["labels"] == 1
    found = module(batch["images"], wanted.shape[-1]) > 0
    return {"both": jnp.sum(wanted & found), "either": jnp.sum(wanted | found)}


def _iou(sums: Sums) -> float:
    return float(np.mean(sums["both"] / np.maximum(sums["either"], 1)))


# --- Occupancy ------------------------------------------------------------------------------------


def _prepare_voxels(arrays: Arrays, about: Mapping[str, Any], candidate: Candidate) -> Any:
    """Class 0 is the road's surface, at the lowest level; class 1 is other vehicles; all else is
    free space, a number beyond all classes."""
    levels = dict(candidate.workload.inputs)["labels"].shape[-1]
    bits = (arrays["occupied"][..., None] >> np.arange(levels)) & 1
    labels = np.where(bits == 1, 1, 10_000)
    road = (arrays["drivable"] == 1) & (labels[..., 0] != 1)
    labels[..., 0] = np.where(road, 0, labels[..., 0])
    return {"images": _images(arrays), "labels": labels.astype(np.int32)}


def _score_voxels(module: Any, batch: dict[str, Any]) -> Sums:
    config, labels = module.config, batch["labels"]
    level = np.arange(config.num_levels) * labels.shape[-1] // config.num_levels
    wanted = jnp.minimum(labels[..., level], config.num_classes - 1)
    found = jnp.argmax(module(batch["images"], labels.shape[1]), axis=-1)
    classes = range(2)
    return {
        "both": jnp.stack([jnp.sum((wanted == c) & (found == c)) for c in classes]),
        "either": jnp.stack([jnp.sum((wanted == c) | (found == c)) for c in classes]),
    }


# --- Forecasting ----------------------------------------------------------------------------------


def _prepare_forecast(arrays: Arrays, about: Mapping[str, Any], candidate: Candidate) -> Any:
    """Agent 0 is the ego vehicle, whose way is forecast; the scene is in its frame.

    Velocities are a step's, as the network reads them; its `walk` is what the way's steps differ
    by from the last velocity, in tenths of a metre.
    """
    shapes = {name: given.shape for name, given in candidate.workload.inputs}
    (A, P, C), (R, Q, _), (F, _) = shapes["history"], shapes["lanes"], shapes["walk"]
    K, step_s = len(arrays["ego"]), about["step_s"]
    history = np.full((K, A, P, C), -2.0, np.float32)  # not seen
    history[..., :-1] = 0.0
    own = _last(arrays["ego"], P)
    history[:, 0, -own.shape[1] :, :5] = np.concatenate(
        [own[..., :2], own[..., 2:4] * step_s, own[..., 4:5]], axis=-1
    )
    history[:, 0, -own.shape[1] :, -1] = 0.0
    others = _last(arrays["agents"][:, : A - 1], P, axis=2)
    place = np.s_[:, 1 : 1 + others.shape[1], -others.shape[2] :]
    history[place][..., :2] = others[..., :2]
    history[place][..., 2:4] = others[..., 2:4] * step_s
    history[place][..., 4] = others[..., 4]
    history[place][..., -1] = np.where(others[..., 5] > 0, 0.0, -2.0)
    lanes = np.full((K, R, Q, C), 0.0, np.float32)
    lanes[..., -1] = -2.0
    given = arrays["lanes"][:, :R, :Q]
    part = np.s_[:, : given.shape[1], : given.shape[2]]
    lanes[part][..., :2] = given[..., :2]
    lanes[part][..., -1] = np.where(given[..., 2] > 0, 0.0, -2.0)
    way = arrays["way"][:, :F, :2]
    if way.shape[1] < F:
        raise DataError(f"The data knows {way.shape[1]} steps ahead; {candidate.name} asks {F}.")
    steps = np.diff(way, axis=1, prepend=np.zeros((K, 1, 2), np.float32))
    walk = (steps - history[:, 0, -1:, 2:4]) / 0.1
    return {"history": history, "lanes": lanes, "walk": walk.astype(np.float32)}


def _last(array: np.ndarray, length: int, axis: int = 1) -> np.ndarray:
    have = array.shape[axis]
    return np.take(array, np.arange(max(0, have - length), have), axis=axis)


def _score_forecast(module: Any, batch: dict[str, Any]) -> Sums:
    velocity = batch["history"][:, 0, -1:, 2:4]
    path = jnp.cumsum(velocity + 0.1 * batch["walk"], axis=1)
    _, normals = module(batch["history"], batch["lanes"])
    apart = normals[:, :, : path.shape[1], :2] - path[:, None]
    distance = jnp.mean(jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1)), axis=-1)
    return {"metres": jnp.sum(jnp.min(distance, axis=-1)), "paths": jnp.float32(len(path))}


def _closeness(sums: Sums) -> float:
    return -float(sums["metres"] / sums["paths"])


# --- Planning -------------------------------------------------------------------------------------

_ROAD, _LANES, _OTHERS = 0, 1, 12  # channels of the raster, of `models/planner.py`


def _prepare_plan(arrays: Arrays, about: Mapping[str, Any], candidate: Candidate) -> Any:
    """Draws the raster from above; `path` is the noise that drives the network's own true path.

    The way is followed by its speeds and headings, a waypoint every `STEP_S`.
    """
    from jaxbench.models import planner

    edge, _, channels = dict(candidate.workload.inputs)["raster"].shape
    (F, _) = dict(candidate.workload.inputs)["path"].shape
    if abs(about["step_s"] - planner.STEP_S) > 1e-6:
        raise DataError(
            f"The data has a step of {about['step_s']} s and {candidate.name} one of "
            f"{planner.STEP_S}. Build the data with that step."
        )
    cell_m = planner.EXTENT_M / edge
    forward = (planner.START * edge - np.arange(edge) - 0.5) * cell_m
    left = (0.5 * edge - np.arange(edge) - 0.5) * cell_m
    raster = np.zeros((len(arrays["scene"]), edge, edge, channels), np.float32)
    for channel, name in ((_ROAD, "drivable"), (_OTHERS, "vehicles")):
        raster[..., channel] = _resample(arrays[name], about["extent_m"], forward, left)
    for index, lanes in enumerate(arrays["lanes"]):
        points = lanes[lanes[..., 2] > 0]
        row = np.floor(planner.START * edge - points[:, 0] / cell_m).astype(int)
        column = np.floor(0.5 * edge - points[:, 1] / cell_m).astype(int)
        inside = (row >= 0) & (row < edge) & (column >= 0) & (column < edge)
        raster[index, row[inside], column[inside], _LANES] = 1
    way = arrays["way"][:, :F]
    steps = np.diff(way[..., :2], axis=1, prepend=np.zeros_like(way[:, :1, :2]))
    speed = np.linalg.norm(steps, axis=-1) / planner.STEP_S
    heading = np.unwrap(way[..., 2], axis=1)
    path = np.stack(
        [
            np.diff(speed, axis=1, prepend=np.full_like(speed[:, :1], 8.0)) / (2 * planner.STEP_S),
            np.diff(heading, axis=1, prepend=np.zeros_like(heading[:, :1]))
            / (0.3 * planner.STEP_S),
        ],
        axis=-1,
    )
    return {"raster": raster, "path": path.astype(np.float32)}


def _resample(maps: np.ndarray, extent_m: float, forward: np.ndarray, left: np.ndarray) -> Any:
    """Nearest cells of maps [K, X, Y] at places [I] forward and [J] to the left; 0 outside."""
    edge = maps.shape[1]
    x, y = (
        np.floor((place + extent_m) * edge / (2 * extent_m)).astype(int)
        for place in (forward, left)
    )
    inside = ((x >= 0) & (x < edge))[:, None] & ((y >= 0) & (y < edge))[None, :]
    found = maps[:, np.clip(x, 0, edge - 1)[:, None], np.clip(y, 0, edge - 1)[None, :]]
    return np.where(inside, found, 0)


def _score_plan(module: Any, batch: dict[str, Any]) -> Sums:
    from jaxbench.models import planner

    points, _, details = module(batch["raster"])
    noise = jnp.swapaxes(batch["path"], 0, 1)
    P, edge = noise.shape[0], points.shape[-1]
    places, _, _ = planner.true_path(noise, edge)
    apart = _likeliest(points, details)[:P] - places
    metres = jnp.sqrt(jnp.sum(jnp.square(apart), axis=-1)) * planner.EXTENT_M / edge
    return {"metres": jnp.sum(jnp.mean(metres, axis=0)), "paths": jnp.float32(metres.shape[1])}


def _likeliest(points: Any, details: Any) -> Any:
    """Returns the places [P, B, 2] of the likeliest waypoints, row and column in cells."""
    edge = points.shape[-1]
    best = jnp.argmax(points.reshape(*points.shape[:2], -1), axis=-1)
    return jnp.stack([best // edge, best % edge], axis=-1).astype(jnp.float32) + details[..., :2]


def _drive_plan(module: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    from jaxbench.models import planner

    points, _, details = module(batch["raster"])
    edge = points.shape[-1]
    rows, columns = jnp.moveaxis(jnp.swapaxes(_likeliest(points, details), 0, 1), -1, 0)
    cells = jnp.stack([planner.START * edge - rows, 0.5 * edge - columns], axis=-1)
    return cells * planner.EXTENT_M / edge, 10 * details[-1, :, 3]


# --- Tokens ---------------------------------------------------------------------------------------

_SEQUENCES = 3  # drawn for each key frame: a default run sees none of them twice


def _prepare_tokens(arrays: Arrays, about: Mapping[str, Any], candidate: Candidate) -> Any:
    given = dict(candidate.workload.inputs)["tokens"]
    seeds = (arrays["frame"][:, None] * _SEQUENCES + np.arange(_SEQUENCES)).ravel()
    return {"tokens": draw_tokens(seeds, given.shape[0], vocab_size=given.high)}


def _score_tokens(module: Any, batch: dict[str, Any]) -> Sums:
    tokens, found = batch["tokens"], module(batch["tokens"])
    num = jnp.float32(tokens[:, 1:].size)
    if found.ndim == 0:  # some decoders put out no logits but their mean over all tokens
        return {"nats": found.astype(jnp.float32) * num, "tokens": num}
    logits = found[:, :-1].astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return {"nats": jnp.sum(jax.nn.logsumexp(logits, axis=-1) - picked), "tokens": num}


def _likelihood(sums: Sums) -> float:
    return -float(sums["nats"] / sums["tokens"])


_RANKS = {"map": 2, "occupancy": 3}
TASKS = (
    Task(
        name="map",
        inputs=frozenset(("images", "labels")),
        prepare=_prepare_map,
        score=_score_map,
        finish=_iou,
        metric="IoU of drivable cells",
    ),
    Task(
        name="occupancy",
        inputs=frozenset(("images", "labels")),
        prepare=_prepare_voxels,
        score=_score_voxels,
        finish=_iou,
        metric="mean IoU of road and vehicles",
    ),
    Task(
        name="forecast",
        inputs=frozenset(("history", "lanes", "walk")),
        prepare=_prepare_forecast,
        score=_score_forecast,
        finish=_closeness,
        metric="-minADE in metres",
    ),
    Task(
        name="planning",
        inputs=frozenset(("raster", "path")),
        prepare=_prepare_plan,
        score=_score_plan,
        finish=_closeness,
        metric="-displacement in metres",
        drive=_drive_plan,
    ),
    Task(
        name="tokens",
        inputs=frozenset(("tokens",)),
        prepare=_prepare_tokens,
        score=_score_tokens,
        finish=_likelihood,
        metric="-NLL in nats a token",
    ),
)
