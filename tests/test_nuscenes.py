"""Folders laid out as nuScenes become frozen key frames, with images turned to the wanted rig."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxbench.errors import DataError
from jaxbench.quality.build import convert_nuscenes
from jaxbench.quality.nuscenes import lane_line, read_nuscenes
from jaxbench.quality.rig_images import Camera, Rig, rig_images, rig_rays
from jaxbench.quality.shards import read_data

COLOURS = ((200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0))
AHEAD = np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # a camera that looks along the ego's x


def quaternion_of(yaw: float) -> list[float]:
    """Of a camera that looks so far to the left of ahead: the product of both rotations."""
    w, z = math.cos(yaw / 2), math.sin(yaw / 2)
    a, b, c, d = 0.5, -0.5, 0.5, -0.5  # of AHEAD
    return [w * a - z * d, w * b - z * c, w * c + z * b, w * d + z * a]


def write_folder(root: Path, *, num_samples: int = 16) -> None:
    """One car drives along x at 5 m/s, another 10 m ahead; four cameras of 100 degrees."""
    tables: dict[str, list[dict[str, Any]]] = {
        "scene": [{"token": "s", "name": "scene-1", "log_token": "l", "first_sample_token": "p0"}],
        "log": [{"token": "l", "location": "town"}],
        "category": [
            {"token": "car", "name": "vehicle.car"},
            {"token": "man", "name": "human.pedestrian.adult"},
        ],
        "instance": [
            {"token": "i", "category_token": "car"},
            {"token": "m", "category_token": "man"},
        ],
        "sensor": [],
        "calibrated_sensor": [],
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
        "sample_annotation": [],
    }
    focal = 80 / math.tan(math.radians(50))
    for camera, colour in enumerate(COLOURS):
        tables["sensor"].append({"token": f"c{camera}", "channel": f"CAM_{camera}"})
        tables["calibrated_sensor"].append(
            {
                "token": f"k{camera}",
                "sensor_token": f"c{camera}",
                "rotation": quaternion_of(math.pi / 2 * camera),
                "camera_intrinsic": [[focal, 0, 80], [0, focal, 45], [0, 0, 1]],
            }
        )
        path = root / f"samples/CAM_{camera}/a.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (160, 90), colour).save(path)
    for at in range(num_samples):
        follows = f"p{at + 1}" if at + 1 < num_samples else ""
        tables["sample"].append({"token": f"p{at}", "timestamp": at * 500_000, "next": follows})
        tables["ego_pose"].append(
            {"token": f"e{at}", "translation": [2.5 * at, 0, 0], "rotation": [1, 0, 0, 0]}
        )
        for name, x in (("i", 10.0), ("m", 5.0)):
            tables["sample_annotation"].append(
                {
                    "token": f"{name}{at}",
                    "sample_token": f"p{at}",
                    "instance_token": name,
                    "translation": [2.5 * at + x, 0, 0],
                    "rotation": [1, 0, 0, 0],
                    "size": [2.0, 4.0, 1.5],
                }
            )
        for camera in range(4):
            tables["sample_data"].append(
                {
                    "token": f"d{at}{camera}",
                    "sample_token": f"p{at}",
                    "calibrated_sensor_token": f"k{camera}",
                    "ego_pose_token": f"e{at}",
                    "is_key_frame": True,
                    "filename": f"samples/CAM_{camera}/a.png",
                }
            )
    folder = root / "v1.0-mini"
    folder.mkdir()
    for name, rows in tables.items():
        (folder / f"{name}.json").write_text(json.dumps(rows))
    straight = {
        "start_pose": [-50, 0, 0],
        "shape": "LSL",
        "radius": 999.0,
        "segment_length": [0, 200, 0],
    }
    (root / "maps/expansion").mkdir(parents=True)
    (root / "maps/expansion/town.json").write_text(
        json.dumps(
            {
                "lane": [{"token": "a"}],
                "lane_connector": [],
                "arcline_path_3": {"a": [straight]},
            }
        )
    )


def test_read_nuscenes_gives_vehicles_in_motion_and_the_cameras(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (drive,) = read_nuscenes(tmp_path)
    assert drive.name == "scene-1"
    assert drive.frames[:3] == (0, 5, 10)
    tracks = drive.scene["tracks"]
    assert tracks.shape == (76, 2, 8)  # the pedestrian is no vehicle
    assert tracks[7, 0, :5] == pytest.approx([3.5, 0, 0, 5, 0], abs=1e-4)
    assert tracks[7, 1] == pytest.approx([13.5, 0, 0, 5, 0, 4, 2, 1.5], abs=1e-4)
    assert len(drive.cameras[0]) == 4
    assert drive.cameras[0][0].rotation == pytest.approx(AHEAD, abs=1e-6)


def test_convert_nuscenes_labels_and_draws_every_key_sample(tmp_path: Path) -> None:
    write_folder(tmp_path / "one")
    drive = tmp_path / "one"
    scenes = json.loads((drive / "v1.0-mini/scene.json").read_text())
    again = {**scenes[0], "token": "t", "name": "scene-2"}
    (drive / "v1.0-mini/scene.json").write_text(json.dumps([*scenes, again]))
    digest = convert_nuscenes(tmp_path / "data", drive, progress=lambda *_: None)
    data = read_data(tmp_path / "data")
    assert data.digest == digest
    # A whole past of 0.8 s and a whole future of 4 s: samples from 1.0 to 3.5 s.
    assert len(data.train["scene"]) == 6
    assert data.train["images"].shape == (6, 6, 48, 128, 3)
    assert tuple(data.train["images"][0, 0, 24, 64]) == COLOURS[0]
    # The third camera of six looks 120 degrees to the left, nearest to the one at 90.
    assert tuple(data.train["images"][0, 2, 24, 100]) == COLOURS[1]
    assert data.train["vehicles"][0, 42, 32] == 1
    assert data.train["drivable"][0, :, 32].all()
    with pytest.raises(DataError, match="holds a data set already"):
        convert_nuscenes(tmp_path / "data", drive, progress=lambda *_: None)


def test_rig_images_finds_a_point_where_it_is(tmp_path: Path) -> None:
    rig = Rig(cameras=4, height=40, width=80, fov_degrees=90)
    wanted = rig_rays(rig)[0, 10, 60]  # to the right of straight ahead, and up
    assert wanted[1] < 0 < wanted[2]
    intrinsic = np.array([[60.0, 0, 50], [0, 60, 30], [0, 0, 1]])
    u, v = 50 - 60 * wanted[1], 30 - 60 * wanted[2]
    picture = np.zeros((60, 100, 3), np.uint8)
    picture[int(v), int(u)] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    camera = Camera(image=tmp_path / "a.png", rotation=AHEAD, intrinsic=intrinsic)
    seen = rig_images([camera], rig)
    assert tuple(seen[0, 10, 60]) == (255, 255, 255)
    assert not seen[1:].any()  # nobody looks there
    with pytest.raises(DataError, match=r"none.png is no image that can be read"):
        rig_images([Camera(image=tmp_path / "none.png", rotation=AHEAD, intrinsic=intrinsic)], rig)


def test_lane_line_of_a_quarter_circle_ends_where_it_must() -> None:
    quarter = {
        "start_pose": [0, 0, 0],
        "shape": "LSR",
        "radius": 10.0,
        "segment_length": [math.pi * 5, 20.0, 0],
    }
    points = lane_line([quarter])
    turn = points[np.linalg.norm(points - [10, 10], axis=1) < 1e-6]
    assert len(turn) == 1
    assert points[-1] == pytest.approx([10, 30])


def test_folder_that_is_none_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no v1.0-\* folder"):
        list(read_nuscenes(tmp_path))
    write_folder(tmp_path)
    (tmp_path / "maps/expansion/town.json").unlink()
    with pytest.raises(DataError, match=r"town.json is missing: the road is drawn from it"):
        list(read_nuscenes(tmp_path))
    (tmp_path / "v1.0-mini/sample.json").write_text('[{"token": "p0"}]')
    with pytest.raises(DataError, match="is not as nuScenes publishes it: KeyError"):
        list(read_nuscenes(tmp_path))
