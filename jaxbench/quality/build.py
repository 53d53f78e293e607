"""Builds a data set: MetaDrive drives in an environment of its own, Panda3D draws, we label.

What a seed drives is the same again up to millimetres, but not bit by bit; so data is made once,
frozen and hashed, and comparisons read only what is frozen.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np

from jaxbench.errors import DataError
from jaxbench.quality.labels import Geometry, Scene, key_frames, key_range, label_frame
from jaxbench.quality.nuscenes import Drive, read_nuscenes
from jaxbench.quality.readers import read_scenarionet
from jaxbench.quality.rig_images import Rig, rig_images
from jaxbench.quality.shards import write_data
from jaxbench.quality.simulator import SIMULATOR, run_simulator, simulator_python
from jaxbench.run import Progress

_TEST_SHARE = 0.25  # of scenes
_SHARD_SCENES = 10
_AT_ONCE = 5  # scenes a simulator drives
_PROCESSES = 2  # simulators, or cameras, side by side


def build_data(
    folder: Path,
    *,
    num_scenes: int,
    progress: Progress,
    first_seed: int = 0,
    num_states: int = 300,
    rig: Rig | None = None,
    geometry: Geometry | None = None,
) -> str:
    """Drives scenes, draws and labels their key frames, and writes them as frozen shards.

    Args:
      folder: Of the data set; must not hold one.
      num_scenes: Each has a seed of its own; a quarter of them is kept for judging.
      num_states: At most, of one scene, a tenth of a second apart.

    Returns:
      The data's digest.

    Raises:
      DataError: if there is no simulator to be had, or it fails.
    """
    _check_new(folder)
    python = simulator_python(progress)
    rig, geometry = rig or Rig(), geometry or Geometry()
    with tempfile.TemporaryDirectory(prefix="jaxbench-scenes-") as work:
        scenes = _drive(python, Path(work), first_seed, num_scenes, num_states, progress)
        frames = []
        with ThreadPoolExecutor(_PROCESSES) as pool:
            labelled = pool.map(
                lambda given: label_scene(given[1], given[0], rig, geometry, python),
                enumerate(scenes),
            )
            for arrays in labelled:
                frames.append(arrays)
                progress("drawing and labelling", len(frames), len(scenes))
    return freeze(folder, [one for one in frames if one], rig, geometry, source=SIMULATOR)


def convert_scenarionet(
    folder: Path, source: Path, *, progress: Progress, geometry: Geometry | None = None
) -> str:
    """Writes the scenes of a ScenarioNet folder as frozen shards, without images.

    Forecasting, planning and tokens need none.

    Returns:
      The data's digest.

    Raises:
      DataError: if `folder` holds a data set, or the source is not as described.
    """
    _check_new(folder)
    geometry, found = geometry or Geometry(), []
    for index, (name, scene) in enumerate(read_scenarionet(source)):
        found.append(_labelled(scene, key_frames(scene, geometry), index, geometry))
        progress(f"labelling {name}", index + 1, index + 1)
    return freeze(folder, [one for one in found if one], Rig(), geometry, source="ScenarioNet")


def convert_nuscenes(
    folder: Path,
    source: Path,
    *,
    progress: Progress,
    rig: Rig | None = None,
    geometry: Geometry | None = None,
) -> str:
    """Writes the scenes of a folder laid out as nuScenes as frozen shards, images turned to `rig`.

    Returns:
      The data's digest.

    Raises:
      DataError: if `folder` holds a data set, or the source is not as described.
    """
    _check_new(folder)
    rig, geometry, found = rig or Rig(), geometry or Geometry(), []
    for index, drive in enumerate(read_nuscenes(source)):
        found.append(_converted(drive, index, rig, geometry))
        progress(f"labelling {drive.name}", index + 1, index + 1)
    return freeze(folder, [one for one in found if one], rig, geometry, source="nuScenes")


def _converted(drive: Drive, index: int, rig: Rig, geometry: Geometry) -> dict[str, np.ndarray]:
    usable = range(*key_range(drive.scene, geometry))
    seen = [(at, own) for at, own in zip(drive.frames, drive.cameras, strict=True) if at in usable]
    arrays = _labelled(drive.scene, [at for at, _ in seen], index, geometry)
    if arrays:
        arrays["images"] = np.stack([rig_images(own, rig) for _, own in seen])
    return arrays


def _check_new(folder: Path) -> None:
    if (folder / "manifest.json").exists():
        raise DataError(f"{folder} holds a data set already, and data is frozen. Give another DIR.")


def freeze(
    folder: Path,
    scenes: Sequence[Mapping[str, np.ndarray]],
    rig: Rig,
    geometry: Geometry,
    *,
    source: str,
) -> str:
    """Writes labelled scenes as shards; the last quarter of them is kept for judging."""
    if len(scenes) < 2:
        raise DataError(
            f"{len(scenes)} scenes have key frames; training and judging need one each. Drive more "
            "or longer scenes."
        )
    num_test = max(1, round(_TEST_SHARE * len(scenes)))
    parts = {"train": scenes[:-num_test], "test": scenes[-num_test:]}
    shards, tests = {}, []
    for use, part in parts.items():
        for start in range(0, len(part), _SHARD_SCENES):
            name = f"{use}-{start // _SHARD_SCENES:03d}"
            group = part[start : start + _SHARD_SCENES]
            shards[name] = {key: np.concatenate([one[key] for one in group]) for key in group[0]}
            if use == "test":
                tests.append(name)
    about = {"source": source, **asdict(rig), **asdict(geometry)}
    return write_data(folder, shards, about, test=tuple(tests))


def label_scene(
    path: Path, index: int, rig: Rig, geometry: Geometry, python: Path
) -> dict[str, np.ndarray]:
    """Returns the key frames of one driven scene, images included; empty if it has none."""
    with np.load(path) as stored:
        scene = {name: stored[name] for name in stored.files}
    frames = key_frames(scene, geometry)
    arrays = _labelled(scene, frames, index, geometry)
    if arrays:
        arrays["images"] = _draw(path, frames, rig, python)
    return arrays


def _labelled(
    scene: Scene, frames: Sequence[int], index: int, geometry: Geometry
) -> dict[str, np.ndarray]:
    """Returns key frames without images; empty if there are none."""
    if not frames:
        return {}
    labelled = [label_frame(scene, at, geometry) for at in frames]
    arrays = {name: np.stack([one[name] for one in labelled]) for name in labelled[0]}
    arrays["scene"] = np.full(len(frames), index, np.int32)
    arrays["frame"] = np.arange(len(frames), dtype=np.int32) + 1000 * index
    return arrays


def _draw(path: Path, frames: Sequence[int], rig: Rig, python: Path) -> np.ndarray:
    wanted, drawn = path.with_suffix(".frames.npy"), path.with_suffix(".images.npy")
    np.save(wanted, np.asarray(frames))
    size = (rig.height, rig.width, rig.fov_degrees, rig.cameras)
    run_simulator(
        [
            str(python),
            _script("metadrive_cameras.py"),
            str(path),
            str(wanted),
            str(drawn),
            *map(str, size),
        ]
    )
    images = np.load(drawn)
    drawn.unlink()
    return images


def _drive(
    python: Path, work: Path, first_seed: int, num_scenes: int, num_states: int, progress: Progress
) -> list[Path]:
    def drive(start: int) -> int:
        size = min(_AT_ONCE, num_scenes - start)
        arguments = map(str, (work, first_seed + start, size, num_states))
        run_simulator([str(python), _script("metadrive_scenes.py"), *arguments])
        return size

    done = 0
    with ThreadPoolExecutor(_PROCESSES) as pool:
        for size in pool.map(drive, range(0, num_scenes, _AT_ONCE)):
            done += size
            progress("driving", done, num_scenes)
    return sorted(work.glob("scene-*.npz"))


def _script(name: str) -> str:
    return str(resources.files("jaxbench.quality") / name)
