"""Key frames as pictures: what the cameras see, and the map that networks are asked for."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

_SCALE = 2  # of camera images
_MAP_SCALE = 3
_GROUND, _ROAD, _VEHICLE = (16, 18, 22), (110, 112, 118), (226, 84, 64)
_EGO, _WAY, _OTHERS = (90, 220, 120), (250, 220, 90), (120, 170, 250)


def frame_picture(arrays: Mapping[str, np.ndarray], index: int, *, extent_m: float) -> bytes:
    """Returns a PNG of one key frame: cameras left, ahead, right over those behind, then the map.

    On the map ahead is up; the road is grey, other vehicles red and their ways blue, the ego
    vehicle green and its way yellow.
    """
    images = arrays["images"][index]
    num = len(images)
    ahead = [images[at] for at in (1 % num, 0, num - 1)]
    behind = [images[at % num] for at in (2, 3, 4)]
    cameras = np.concatenate([np.concatenate(ahead, 1), np.concatenate(behind, 1)], 0)
    cameras = cameras.repeat(_SCALE, 0).repeat(_SCALE, 1)
    ground = _map_picture(arrays, index, extent_m)
    height = max(len(cameras), len(ground))
    gap = np.full((height, 6, 3), 255, np.uint8)
    return encode_png(np.concatenate([_padded(cameras, height), gap, _padded(ground, height)], 1))


def _map_picture(arrays: Mapping[str, np.ndarray], index: int, extent_m: float) -> np.ndarray:
    drivable, vehicles = arrays["drivable"][index], arrays["vehicles"][index]
    picture = np.empty((*drivable.shape, 3), np.uint8)
    picture[:] = _GROUND
    picture[drivable == 1] = _ROAD
    picture[vehicles == 1] = _VEHICLE
    picture = picture.repeat(_MAP_SCALE, 0).repeat(_MAP_SCALE, 1)
    known = arrays["futures"][index]
    _dot(picture, known[..., :2][known[..., 2] == 1], extent_m, _OTHERS)
    _dot(picture, arrays["way"][index, :, :2], extent_m, _WAY)
    _dot(picture, np.zeros((1, 2)), extent_m, _EGO, size=3)
    return picture[::-1, ::-1]  # ahead is up, left is left


def _dot(
    picture: np.ndarray,
    points: np.ndarray,
    extent_m: float,
    colour: tuple[int, int, int],
    *,
    size: int = 1,
) -> None:
    edge = len(picture)
    for x, y in points.reshape(-1, 2):
        row, column = (int((place + extent_m) * edge / (2 * extent_m)) for place in (x, y))
        if 0 <= row < edge and 0 <= column < edge:
            rows, columns = (slice(max(0, at - size), at + size + 1) for at in (row, column))
            picture[rows, columns] = colour


def _padded(picture: np.ndarray, height: int) -> np.ndarray:
    missing = height - len(picture)
    return np.pad(picture, ((0, missing), (0, 0), (0, 0)), constant_values=255)


def encode_png(picture: np.ndarray) -> bytes:
    """Returns uint8 [I, J, 3] as PNG, without filters. Source: W3C, "PNG", third edition, 2025."""
    height, width, _ = picture.shape
    raw = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(picture))

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw, 9))
        + chunk(b"IEND", b"")
    )
