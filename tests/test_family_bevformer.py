"""Map queries: exact rewrites agree; what pillars and samples are, worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import check_rewrites, count_parameters, find

from jaxbench.models import bevformer
from jaxbench.models.blocks import camera, deformable


def test_rewrites_agree_in_loss_and_gradient() -> None:
    changes = ("product", "remat")
    check_rewrites(
        bevformer,
        find("bevformer-cpu-base"),
        [find(f"bevformer-cpu-{change}") for change in changes],
    )


@pytest.mark.parametrize(("scale", "backbone"), [("tiny", 23_508_032), ("base", 42_500_160)])
def test_paper_backbones_are_resnets(scale: str, backbone: int) -> None:
    # As in torchvision, 25,557,032 and 44,549,160, less 2,049,000 of the classifier.
    candidate = find(f"bevformer-paper-{scale}")
    assert count_parameters(candidate, "encoder.camera.backbone") == backbone


@pytest.mark.parametrize("sampling", ["gather", "product"])
def test_samples_interpolate_and_are_zero_outside(sampling: str) -> None:
    values = jnp.asarray([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).reshape(1, 1, 6, 1)
    points = jnp.asarray([[1.0, 0.0], [0.5, 0.25], [-0.75, 1.0], [9.0, 0.0]])
    weights = jnp.ones((1, 1, 4, 1))
    sample = deformable.SAMPLERS[sampling]
    found = sample(values, (2, 3), points.reshape(1, 1, 4, 1, 2), weights)
    # Rows 1 2 3 and 4 5 6: the second pixel; 1.5 and 4.5 at 3 to 1; a quarter of 4; nothing.
    assert found.reshape(-1).tolist() == [2.0, 2.25, 1.0, 0.0]


def test_samplers_agree_in_value_and_gradient() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    values = jax.random.normal(keys[0], (2, 3, 20, 5))
    points = 4 * jax.random.normal(keys[1], (2, 3, 7, 4, 2)) + 2
    weights = jax.random.uniform(keys[2], (2, 3, 7, 4))
    results = []
    for sample in deformable.SAMPLERS.values():
        out, pull = jax.vjp(lambda v, p, w, f=sample: f(v, (4, 5), p, w), values, points, weights)
        results.append((out, *pull(jnp.cos(out))))
    for got, want in zip(*results, strict=True):
        # Sums of some 16 products in float32.
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


def see(**changes: int) -> camera.Sight:
    given = {"edge": 4, "num_cameras": 4, "num_rows": 9, "num_columns": 9, "fov_degrees": 80}
    return camera.see_pillars(extent_m=8.0, heights_m=(1.6,), **{**given, **changes})


def test_see_pillars_four_cameras_share_the_map() -> None:
    sight = see()
    # Pillars stand at -6, -2, 2, 6 m; those on the diagonals are between two cameras' views.
    assert sight.pillars[0].tolist() == [3 * 4 + 1, 3 * 4 + 2]
    # Two metres to the left in 6 m, from the middle pixel 4; half the image is tan(40 degrees).
    left = sight.pillars[0].tolist().index(3 * 4 + 2)
    assert sight.column[0, left, 0] == pytest.approx(
        4 - 4.5 * (2 / 6) / math.tan(math.radians(40)), abs=1e-4
    )
    # At the cameras' height every point is in the middle row.
    np.testing.assert_allclose(sight.row, 4.0, atol=1e-4)
    diagonal = [0, 3, 5, 6, 9, 10, 12, 15]
    assert (sight.places[diagonal] == sight.pillars.size).all()


def test_gather_pillars_gives_every_pillar_what_its_cameras_found() -> None:
    sight = see(fov_degrees=120)
    found = jnp.asarray(sight.pillars, jnp.float32).reshape(1, -1, 1)
    total = camera.gather_pillars(found, sight)[0, :, 0]
    seen = np.count_nonzero(sight.places < sight.pillars.size, axis=1)
    # Every camera gives the number of the pillar that it stands for.
    assert total.tolist() == (np.arange(16) * seen).tolist()
    np.testing.assert_array_equal(sight.counts, np.maximum(1, seen))
    assert seen.max() == 2
