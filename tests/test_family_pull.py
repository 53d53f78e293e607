"""Pulled volumes: exact rewrites agree; what a point takes from its cameras, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rewrites import check_rewrites, count_parameters, find

from jaxbench.models import pull
from jaxbench.models.blocks.camera import gather_pillars, see_pillars


def test_rewrite_agrees_in_loss_and_gradient() -> None:
    check_rewrites(pull, find("pull-cpu-base"), [find("pull-cpu-product")])


def test_paper_backbone_is_resnet101_without_its_last_stage() -> None:
    # As in torchvision: 44,549,160, less 2,049,000 of the classifier and 14,964,736 of layer4.
    assert count_parameters(find("pull-paper-base"), "camera.backbone") == 27_535_424


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_pulls_agree_in_value_and_gradient(interpolation: pull.Interpolation) -> None:
    sight = pull.see_volume(pull._CPU, edge=8, shape=(3, 4, 8))
    assert sight.inside.any()
    assert not sight.inside.all()
    features = jax.random.normal(jax.random.key(0), (2, 3, 4, 8, 5))
    results = []
    for take in pull.PULLS.values():
        out, back = jax.vjp(lambda x, f=take: f(x, sight, interpolation), features)
        results.append((out, *back(jnp.cos(out))))
    for got, want in zip(*results, strict=True):
        # Sums of four neighbours; of some tens of points in the gradient.
        np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("sampling", pull.PULLS)
def test_pulled_points_read_their_own_projection(sampling: str) -> None:
    # Features that tell their column; at the cameras' height all points are in the middle row.
    sight = see_pillars(
        edge=8,
        extent_m=8.0,
        heights_m=(1.6,),
        num_cameras=2,
        num_rows=3,
        num_columns=16,
        fov_degrees=90,
    )
    features = jnp.broadcast_to(
        jnp.arange(16, dtype=jnp.float32)[None, None, None, :, None], (1, 2, 3, 16, 1)
    )
    found = pull.PULLS[sampling](features, sight, "bilinear")
    volume = gather_pillars(found.reshape(1, -1, 1), sight).reshape(8, 8)
    # 5 m ahead, 1 m to the left: a fifth of the half image left of its middle at 7.5.
    assert float(volume[6, 4]) == pytest.approx(7.5 - 8 / 5, abs=1e-4)
    # Behind: the same point of the rear camera is 1 m to the left when it is on the right.
    assert float(volume[1, 3]) == pytest.approx(7.5 - 8 / 5, abs=1e-4)
    # Beside the vehicle no camera of the two looks.
    assert float(volume[4, 7]) == 0.0
