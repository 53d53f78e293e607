"""Pictures of key frames: a PNG that a reader reads back, with what was drawn where it was."""

import struct
import zlib

import numpy as np

from jaxbench.quality.shards import packaged_folder, read_data
from jaxbench.report.picture import encode_png, frame_picture


def decode(raw: bytes) -> np.ndarray:
    """Reads a PNG without filters."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, size = 8, b"", (0, 0)
    while at < len(raw):
        (length,) = struct.unpack(">I", raw[at : at + 4])
        kind, body = raw[at + 4 : at + 8], raw[at + 8 : at + 8 + length]
        assert struct.unpack(">I", raw[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        if kind == b"IHDR":
            width, height, depth, colours = struct.unpack(">IIBB", body[:10])
            assert (depth, colours) == (8, 2)
            size = (height, width)
        data += body if kind == b"IDAT" else b""
        at += 12 + length
    rows = np.frombuffer(zlib.decompress(data), np.uint8).reshape(size[0], 1 + 3 * size[1])
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(*size, 3)


def test_encode_png_is_read_back() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
    np.testing.assert_array_equal(decode(encode_png(picture)), picture)


def test_frame_picture_shows_cameras_and_map() -> None:
    data = read_data(packaged_folder())
    picture = decode(frame_picture(data.test, 0, extent_m=data.about["extent_m"]))
    ahead = data.test["images"][0, 0]
    # The camera ahead is in the middle of the upper row, twice as large.
    np.testing.assert_array_equal(picture[:96:2, 256:512:2], ahead)
    ground = picture[:192, 768 + 6 :]
    assert ground.shape == (192, 192, 3)
    # The ego vehicle is green, in the middle; its way leads up from there.
    assert ground[95, 95].tolist() == [90, 220, 120]
    yellow = np.argwhere((ground == (250, 220, 90)).all(axis=-1))
    if len(yellow):
        assert yellow[:, 0].mean() < 96
