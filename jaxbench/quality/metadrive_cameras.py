"""Draws what six cameras of the ego vehicle see, with Panda3D's software rasteriser.

Runs in the environment of `metadrive_scenes.py`, in another process than that: two ShowBases do not
go into one. `python metadrive_cameras.py SCENE.npz FRAMES.npy OUT.npy HEIGHT WIDTH FOV CAMERAS`
with the states to draw; writes uint8 [K, N, HEIGHT, WIDTH, 3].
"""

import sys
from pathlib import Path

import numpy as np

_CAMERA_M = 1.6  # above the ground
_SKY = (0.62, 0.76, 0.92)
_GRASS = (0.36, 0.50, 0.28)
_ROAD = (0.34, 0.34, 0.36)
_LINE = (0.92, 0.92, 0.86)
_PAINTS = (
    (0.80, 0.15, 0.12),
    (0.15, 0.25, 0.70),
    (0.90, 0.90, 0.92),
    (0.10, 0.10, 0.12),
    (0.85, 0.65, 0.10),
    (0.20, 0.55, 0.45),
)
_SHADES = (1.0, 0.82, 0.82, 0.66, 0.66)  # top, two sides, front, back


def main(scene_file, frames_file, out_file, *, height, width, fov, cameras):
    scene, frames = np.load(scene_file), np.load(frames_file)
    stage = _Stage(height, width, fov)
    stage.lay_roads(scene)
    images = np.zeros((len(frames), cameras, height, width, 3), np.uint8)
    for row, at in enumerate(frames):
        stage.park(scene["tracks"][at], scene["valid"][at])
        x, y, heading = scene["tracks"][at, 0, :3]
        for camera in range(cameras):
            yaw = heading + 2 * np.pi * camera / cameras
            images[row, camera] = stage.shoot(x, y, yaw)
    np.save(out_file, images)


class _Stage:
    def __init__(self, height, width, fov):
        from panda3d.core import loadPrcFileData

        settings = f"load-display p3tinydisplay\nwindow-type offscreen\nwin-size {width} {height}"
        loadPrcFileData("", settings + "\naudio-library-name null\nframebuffer-hardware false")
        from direct.showbase.ShowBase import ShowBase

        self._base = ShowBase(windowType="offscreen")
        self._base.setBackgroundColor(*_SKY)
        self._base.camLens.setFov(
            fov, 2 * np.degrees(np.arctan(np.tan(np.radians(fov) / 2) * height / width))
        )
        self._base.camLens.setNearFar(0.3, 300.0)
        self._size = (height, width)
        self._cars = None

    def lay_roads(self, scene):
        mesh = _Mesh()
        reach = 400.0
        centre = scene["tracks"][:, 0, :2].mean(axis=0)
        corners = [(-reach, -reach), (reach, -reach), (reach, reach), (-reach, reach)]
        mesh.add([(centre[0] + a, centre[1] + b, -0.05) for a, b in corners], _GRASS)
        ends = np.cumsum(scene["lane_sizes"])
        lines = []
        for end, size, width in zip(ends, scene["lane_sizes"], scene["lane_widths"], strict=True):
            points = scene["lane_points"][end - size : end]
            left, right = _sides(points, width / 2)
            mesh.strip(left, right, 0.0, _ROAD)
            lines.append((points, width))
        for points, width in lines:  # after the road, and a little above it
            for side in (-1, 1):
                outer, inner = (
                    _sides(points, side * width / 2)[0],
                    _sides(points, side * (width / 2 - 0.15))[0],
                )
                mesh.strip(outer, inner, 0.03, _LINE)
        mesh.attach(self._base.render)

    def park(self, tracks, valid):
        if self._cars is not None:
            self._cars.removeNode()
        mesh = _Mesh()
        for track in range(1, len(tracks)):
            if valid[track]:
                mesh.box(tracks[track], _PAINTS[track % len(_PAINTS)])
        self._cars = mesh.attach(self._base.render)

    def shoot(self, x, y, yaw):
        self._base.camera.setPos(float(x), float(y), _CAMERA_M)
        self._base.camera.setHpr(float(np.degrees(yaw)) - 90.0, 0, 0)  # Panda3D looks along +y
        self._base.graphicsEngine.renderFrame()
        shot = self._base.win.getScreenshot()
        raw = np.frombuffer(shot.getRamImageAs("RGB"), np.uint8)
        return raw.reshape(*self._size, 3)[::-1]


def _sides(points, half):
    """The polyline moved to its left and to its right."""
    along = np.gradient(points, axis=0)
    along = along / np.maximum(np.linalg.norm(along, axis=1, keepdims=True), 1e-6)
    normal = np.stack([-along[:, 1], along[:, 0]], axis=1)
    return points + half * normal, points - half * normal


class _Mesh:
    """Flat-coloured quads, seen from both sides."""

    def __init__(self):
        self._quads = []

    def add(self, corners, colour):
        self._quads.append((corners, colour))

    def strip(self, left, right, height, colour):
        for a, b, c, d in zip(left[:-1], right[:-1], right[1:], left[1:], strict=True):
            self.add([(p[0], p[1], height) for p in (a, b, c, d)], colour)

    def box(self, state, colour):
        x, y, heading, _, _, length, width, height = (float(value) for value in state)
        cos, sin = np.cos(heading), np.sin(heading)
        flat = [
            (x + cos * a - sin * b, y + sin * a + cos * b)
            for a, b in (
                (length / 2, width / 2),
                (length / 2, -width / 2),
                (-length / 2, -width / 2),
                (-length / 2, width / 2),
            )
        ]
        low, high = 0.25, max(height, 0.6)
        faces = [
            [(*corner, high) for corner in flat],
            *(
                [(*flat[a], low), (*flat[b], low), (*flat[b], high), (*flat[a], high)]
                for a, b in ((1, 2), (3, 0), (0, 1), (2, 3))
            ),
        ]
        for face, shade in zip(faces, _SHADES, strict=True):
            self.add(face, tuple(shade * part for part in colour))

    def attach(self, parent):
        from panda3d.core import (
            Geom,
            GeomNode,
            GeomTriangles,
            GeomVertexData,
            GeomVertexFormat,
            GeomVertexWriter,
        )

        data = GeomVertexData("quads", GeomVertexFormat.getV3c4(), Geom.UHStatic)
        places, colours = (GeomVertexWriter(data, name) for name in ("vertex", "color"))
        triangles = GeomTriangles(Geom.UHStatic)
        for index, (corners, colour) in enumerate(self._quads):
            for corner in corners:
                places.addData3(*(float(value) for value in corner))
                colours.addData4(*colour, 1.0)
            first = 4 * index
            triangles.addVertices(first, first + 1, first + 2)
            triangles.addVertices(first, first + 2, first + 3)
        geometry = Geom(data)
        geometry.addPrimitive(triangles)
        node = GeomNode("quads")
        node.addGeom(geometry)
        path = parent.attachNewNode(node)
        path.setTwoSided(True)
        return path


if __name__ == "__main__":
    main(
        *(Path(argument) for argument in sys.argv[1:4]),
        height=int(sys.argv[4]),
        width=int(sys.argv[5]),
        fov=float(sys.argv[6]),
        cameras=int(sys.argv[7]),
    )
