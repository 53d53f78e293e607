"""Images of any camera rig as those of the rig that networks here expect: evenly spaced, level.

Each pixel of a wanted camera looks along a ray of the ego vehicle's frame, and is what the real
camera saw along it whose optical axis is nearest. Where the cameras stand is left out of account:
that bends what is nearer than some metres, and leaves what is far. A ray that no camera sees is
black.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxbench.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Rig:
    """The wanted cameras: evenly spaced around, level, the first looking ahead."""

    cameras: int = 6
    height: int = 48
    width: int = 128
    fov_degrees: int = 70


@dataclass(frozen=True, kw_only=True, slots=True)
class Camera:
    """One image of a real camera.

    Attributes:
      image: JPEG, PNG or whatever Pillow reads.
      rotation: [3, 3], from the camera's frame (x right, y down, z ahead) to the ego vehicle's (x
        ahead, y left, z up).
      intrinsic: [3, 3], in pixels of the image.
    """

    image: Path
    rotation: np.ndarray
    intrinsic: np.ndarray


def rig_rays(rig: Rig) -> np.ndarray:
    """Returns the direction of each pixel, [N, I, J, 3], in the ego vehicle's frame."""
    reach = math.tan(math.radians(rig.fov_degrees) / 2)
    left = (1 - (2 * np.arange(rig.width) + 1) / rig.width) * reach
    up = (1 - (2 * np.arange(rig.height) + 1) / rig.height) * reach * rig.height / rig.width
    yaw = 2 * np.pi * np.arange(rig.cameras)[:, None, None] / rig.cameras
    shape = (rig.cameras, rig.height, rig.width)
    x = np.cos(yaw) - np.sin(yaw) * left
    y = np.sin(yaw) + np.cos(yaw) * left
    return np.stack(np.broadcast_arrays(x, y, np.broadcast_to(up[:, None], shape)), axis=-1)


def rig_images(cameras: Sequence[Camera], rig: Rig) -> np.ndarray:
    """Returns what the wanted rig would see, uint8 [N, I, J, 3].

    Raises:
      DataError: if an image cannot be read.
    """
    rays = rig_rays(rig)
    rays = rays / np.linalg.norm(rays, axis=-1, keepdims=True)
    seen = np.zeros((*rays.shape[:-1], 3), np.uint8)
    best = np.zeros(rays.shape[:-1])  # cosine of the angle to the optical axis
    focal = rig.width / 2 / math.tan(math.radians(rig.fov_degrees) / 2)
    for camera in cameras:
        own = rays @ camera.rotation  # row vectors: the transpose turns them back
        image, scale = _read_image(camera, focal)
        height, width, _ = image.shape
        depth = np.maximum(own[..., 2], 1e-6)
        place = own @ camera.intrinsic.T / depth[..., None] * scale
        column, row = np.floor(place[..., 0]), np.floor(place[..., 1])
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        taken = inside & (own[..., 2] > best)
        seen[taken] = image[row[taken].astype(int), column[taken].astype(int)]
        best = np.where(taken, own[..., 2], best)
    return seen


def _read_image(camera: Camera, focal: float) -> tuple[np.ndarray, float]:
    """Returns an image, made smaller where it is finer than wanted, and by how much."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "Reading camera images needs Pillow. Install it: uv sync --extra rig, or pip install "
            "'jaxbench[rig]'."
        ) from error
    try:
        with Image.open(camera.image) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        raise DataError(f"{camera.image} is no image that can be read: {error}.") from error
    shrink = max(1, int(camera.intrinsic[0, 0] / focal))
    size = (max(1, image.width // shrink), max(1, image.height // shrink))
    return np.asarray(image.resize(size, Image.Resampling.BOX)), size[0] / image.width
