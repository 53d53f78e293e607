"""Frozen key frames of driving: compressed arrays with a manifest that names every file's digest.

A data set is a folder: `manifest.json` and shards `*.npz`. What is compared later must have read
the same bytes, so the manifest's digest is the data's version.

Arrays of a shard, for K key frames (metres and radians in the ego vehicle's frame, x forward, y
left; steps of `step_s` seconds):

    scene int32 [K], frame int32 [K]
    images uint8 [K, N, I, J, 3]      N cameras with evenly spaced yaws, the first looks ahead
    drivable uint8 [K, X, Y]          1 where the road is; cells along x, then y, back to front
    vehicles uint8 [K, X, Y]          1 where another vehicle is
    occupied uint8 [K, X, Y]          one bit a level of height, the lowest first
    agents float32 [K, A, P, 6]       past of other vehicles: x, y, vx, vy, heading, seen
    futures float32 [K, A, F, 3]      their way: x, y, known
    ego float32 [K, P, 5]             own past: x, y, vx, vy, heading
    way float32 [K, F, 3]             own way: x, y, heading
    lanes float32 [K, R, Q, 3]        lane centres: x, y, there
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.cache import storage_errors
from jaxbench.errors import DataError

MANIFEST = "manifest.json"
VERSION = 1
ARRAYS = (
    "scene",
    "frame",
    "images",
    "drivable",
    "vehicles",
    "occupied",
    "agents",
    "futures",
    "ego",
    "way",
    "lanes",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Data:
    """Key frames in memory.

    Attributes:
      digest: Of the manifest: the data's version.
      about: Geometry and origin: `extent_m`, `step_s`, `fov_degrees`, `source` and others.
      train, test: Arrays by name; no scene is in both.
    """

    digest: str
    about: Mapping[str, Any]
    train: Mapping[str, np.ndarray]
    test: Mapping[str, np.ndarray]


def write_data(
    folder: Path,
    shards: Mapping[str, Mapping[str, np.ndarray]],
    about: Mapping[str, Any],
    *,
    test: tuple[str, ...],
) -> str:
    """Writes shards and their manifest, the manifest last, and returns its digest.

    Args:
      shards: Arrays of each shard, by its name.
      about: Geometry and origin.
      test: Names of the shards that are kept for judging.
    """
    files = {}
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, arrays in shards.items():
            path = folder / f"{name}.npz"
            np.savez_compressed(path, allow_pickle=False, **arrays)
            files[path.name] = {
                "sha256": _digest(path.read_bytes()),
                "frames": len(arrays["scene"]),
                "use": "test" if name in test else "train",
            }
        manifest = {"version": VERSION, "about": dict(about), "files": files}
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return _digest(text.encode())


def read_data(folder: Path) -> Data:
    """Reads a data set after checking every file's digest.

    Raises:
      DataError: if there is none, or a shard is missing, damaged, or of another version.
    """
    path = folder / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{folder} holds no {MANIFEST}. `jaxbench quality build-data {folder}` makes one, and "
            "without --data the small set that ships with jaxbench is read."
        ) from error
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error}. Get it back or build the data again."
        ) from error
    if manifest.get("version") != VERSION:
        raise DataError(
            f"{path} is of version {manifest.get('version')}; this jaxbench reads {VERSION}. Build "
            "the data again."
        )
    parts: dict[str, list[dict[str, np.ndarray]]] = {"train": [], "test": []}
    for name, entry in sorted(manifest["files"].items()):
        parts[entry["use"]].append(_read_shard(folder / name, entry["sha256"]))
    missing = [use for use, shards in parts.items() if not shards]
    if missing:
        raise DataError(f"{path} names no shard for {missing[0]}. Build the data again.")
    train, test = (_joined(parts[use]) for use in ("train", "test"))
    return Data(digest=_digest(text), about=manifest["about"], train=train, test=test)


def packaged_folder() -> Path:
    """Returns the folder of the small data set that ships with jaxbench."""
    return Path(str(resources.files("jaxbench.quality"))) / "data"


def _read_shard(path: Path, sha256: str) -> dict[str, np.ndarray]:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} is missing; its digest is {sha256}. Get it back.") from error
    found = _digest(raw)
    if found != sha256:
        raise DataError(
            f"{path} is damaged: its digest is {found}, and {sha256} in {MANIFEST}. Get the file "
            "back or build the data again."
        )
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _joined(shards: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([shard[name] for shard in shards]) for name in shards[0]}


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()
