"""ScenarioNet scenes become arrays that labels are made of; without a simulator it says so."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxbench.errors import DataError
from jaxbench.quality import simulator
from jaxbench.quality.build import Rig, build_data, freeze
from jaxbench.quality.labels import Geometry, label_frame
from jaxbench.quality.readers import read_scenarionet, scene_of
from jaxbench.quality.shards import read_data


def scenario() -> dict[str, Any]:
    """Two cars on one lane, as a ScenarioDescription has them; the ego is not the first."""
    num = 60

    def track(kind: str, offset: float) -> dict[str, Any]:
        place = np.zeros((num, 3))
        place[:, 0] = offset + np.arange(num)
        return {
            "type": kind,
            "state": {
                "position": place,
                "heading": np.zeros(num),
                "velocity": np.tile([10.0, 0.0], (num, 1)),
                "length": np.full((num, 1), 4.5),
                "width": np.full((num, 1), 1.9),
                "height": np.full((num, 1), 1.6),
                "valid": np.ones(num),
            },
        }

    line = np.stack([np.arange(-40.0, 140, 2), np.zeros(90), np.zeros(90)], axis=1)
    return {
        "metadata": {"sdc_id": "ego", "ts": np.arange(num) * 0.1},
        "tracks": {
            "other": track("VEHICLE", 12.0),
            "walker": track("PEDESTRIAN", 3.0),
            "ego": track("VEHICLE", 0.0),
        },
        "map_features": {
            "lane": {"type": "LANE_SURFACE_STREET", "polyline": line},
            "line": {"type": "ROAD_LINE_SOLID_SINGLE_WHITE", "polyline": line},
        },
    }


def test_scene_of_a_scenario_has_the_ego_first_and_vehicles_after() -> None:
    scene = scene_of(scenario())
    assert scene["tracks"].shape == (60, 2, 8)
    assert scene["tracks"][5, 0] == pytest.approx([5, 0, 0, 10, 0, 4.5, 1.9, 1.6])
    assert scene["tracks"][5, 1, 0] == 17
    assert float(scene["dt"]) == pytest.approx(0.1)
    assert scene["lane_sizes"].tolist() == [90]
    labels = label_frame(scene, 15, Geometry())
    assert labels["vehicles"][44].any()  # 12 m ahead
    assert labels["drivable"][:, 32].all()


def test_read_scenarionet_folder_and_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no scenario"):
        list(read_scenarionet(tmp_path))
    (tmp_path / "sd_one.pkl").write_bytes(pickle.dumps(scenario()))
    (tmp_path / "dataset_summary.pkl").write_bytes(pickle.dumps({}))
    ((name, scene),) = read_scenarionet(tmp_path)
    assert name == "sd_one"
    assert scene["valid"].all()
    (tmp_path / "sd_two.pkl").write_bytes(pickle.dumps({"tracks": {}}))
    with pytest.raises(DataError, match="sd_two.pkl is no ScenarioDescription: KeyError"):
        list(read_scenarionet(tmp_path))


def test_freeze_keeps_whole_scenes_apart(tmp_path: Path) -> None:
    scenes = [{"scene": np.full(3, at, np.int32)} for at in range(24)]
    digest = freeze(tmp_path, scenes, Rig(), Geometry(), source="made up for tests")
    data = read_data(tmp_path)
    assert data.digest == digest
    assert set(data.train["scene"]) == set(range(18))
    assert set(data.test["scene"]) == set(range(18, 24))
    assert data.about["cameras"] == 6
    with pytest.raises(DataError, match="holds a data set already, and data is frozen"):
        build_data(tmp_path, num_scenes=2, progress=lambda *_: None)


def test_build_data_without_a_simulator_says_how_far_one_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(simulator.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match=r"needs uv .* the small data set that ships .* is there"):
        build_data(tmp_path / "data", num_scenes=2, progress=lambda *_: None)
    monkeypatch.setattr(simulator.shutil, "which", lambda name: "/bin/false")
    with pytest.raises(DataError, match="ended with exit code 1: no word. Without it"):
        build_data(tmp_path / "data", num_scenes=2, progress=lambda *_: None)
