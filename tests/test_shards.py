"""Frozen data: what is written is read, and what is not the same bytes is refused by its digest."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxbench.errors import DataError
from jaxbench.quality.shards import MANIFEST, read_data, write_data

ABOUT = {"source": "made up for tests", "extent_m": 32.0}


def arrays(first: int, size: int) -> dict[str, np.ndarray]:
    return {
        "scene": np.full(size, first, np.int32),
        "images": np.random.default_rng(first).integers(0, 255, (size, 2, 4, 6, 3), np.uint8),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shards = {"train-000": arrays(0, 5), "train-001": arrays(1, 3), "test-000": arrays(2, 4)}
    write_data(tmp_path / "data", shards, ABOUT, test=("test-000",))
    return tmp_path / "data"


def test_read_data_gives_what_was_written(folder: Path) -> None:
    data = read_data(folder)
    assert data.about == ABOUT
    assert data.train["scene"].tolist() == [0] * 5 + [1] * 3
    np.testing.assert_array_equal(data.test["images"], arrays(2, 4)["images"])


def test_digest_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    digest = read_data(folder).digest
    shards = {"train-000": arrays(0, 5), "train-001": arrays(1, 3), "test-000": arrays(3, 4)}
    assert write_data(tmp_path / "other", shards, ABOUT, test=("test-000",)) != digest
    assert read_data(folder).digest == digest


def test_read_data_damaged_shard_is_named_with_both_digests(folder: Path) -> None:
    path = folder / "train-001.npz"
    wanted = json.loads((folder / MANIFEST).read_text())["files"][path.name]["sha256"]
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=f"train-001.npz is damaged: .*{wanted} in manifest.json"):
        read_data(folder)


def test_read_data_missing_shard_and_missing_folder_say_what_to_do(folder: Path) -> None:
    (folder / "test-000.npz").unlink()
    with pytest.raises(DataError, match="test-000.npz is missing; its digest is"):
        read_data(folder)
    with pytest.raises(DataError, match="`jaxbench quality build-data .*nowhere` makes one"):
        read_data(folder / "nowhere")


def test_read_data_of_another_version_is_refused(folder: Path) -> None:
    path = folder / MANIFEST
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(DataError, match="is of version 99; this jaxbench reads 1"):
        read_data(folder)
