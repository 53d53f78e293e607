"""RegNetY: published shapes and sizes from a few numbers; rivals at equal FLOPs."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import forward_macs

from jaxbench.models import regnet

QUICK = {"xla_backend_optimization_level": 0}
MF400 = dataclasses.replace(
    regnet.PAPER_1600MF, depth=16, initial_width=48, slope=27.89, multiplier=2.09, group_width=8
)
GF3 = dataclasses.replace(
    regnet.PAPER_1600MF, depth=21, initial_width=80, slope=42.63, multiplier=2.66, group_width=24
)
BY_NAME = {candidate.name: candidate for candidate in regnet.CANDIDATES}


def abstract(config: regnet.RegNetConfig) -> regnet.RegNet:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: regnet.build(config, nnx.Rngs(params=0)))


def macs_of(config: regnet.RegNetConfig, edge: int = 224) -> int:
    return forward_macs(abstract(config), (1, edge, edge, 3))


# Widths and depths: Radosavovic et al., CVPR 2020, appendix, the figures of the top RegNetY models
# (8GF's and 32GF's as torchvision rounds them). Parameters and GFLOPS (multiplications):
# torchvision's tables of weights.
SIZES = [
    (MF400, (48, 104, 208, 440), (1, 3, 6, 6), 4_344_144, 0.402e9),
    (regnet.PAPER_1600MF, (48, 120, 336, 888), (2, 6, 17, 2), 11_202_430, 1.612e9),
    (GF3, (72, 216, 576, 1512), (2, 5, 13, 1), 19_436_338, 3.176e9),
    (regnet.PAPER_8GF, (224, 448, 896, 2016), (2, 4, 10, 1), 39_381_472, 8.473e9),
    (regnet.PAPER_16GF, (224, 448, 1232, 3024), (2, 4, 11, 1), 83_590_140, 15.912e9),
    (regnet.FLEET_32GF, (232, 696, 1392, 3712), (2, 5, 12, 1), 145_046_770, 32.28e9),
]


@pytest.mark.parametrize(("config", "widths", "depths", "params", "macs"), SIZES)
def test_published_numbers_give_the_published_shape_parameters_and_macs(
    config: regnet.RegNetConfig,
    widths: tuple[int, ...],
    depths: tuple[int, ...],
    params: int,
    macs: float,
) -> None:
    assert regnet.stage_shapes(config) == tuple(zip(widths, depths, strict=True))
    leaves = jax.tree.leaves(nnx.state(abstract(config), nnx.Param))
    assert sum(math.prod(leaf.shape) for leaf in leaves) == params
    assert macs_of(config) == pytest.approx(macs, rel=0.005)


RIVALS = [
    # T1: equal FLOPs to 3 %.
    *((f"{base}-group2x", base, 0.03) for base in ("regnet-paper-1600mf", "regnet-paper-8gf")),
    ("regnet-paper-16gf-group2x", "regnet-paper-16gf", 0.03),
    # T2: a dense convolution's channels are multiples of 8, which leaves up to 4 %.
    *((f"{base}-dense", base, 0.04) for base in ("regnet-paper-1600mf", "regnet-paper-8gf")),
    ("regnet-paper-16gf-dense", "regnet-paper-16gf", 0.04),
    ("regnet-fleet-32gf-dense", "regnet-fleet-32gf", 0.04),
]


@pytest.mark.parametrize(("name", "base", "margin"), RIVALS)
def test_rival_at_equal_flops_has_the_bases(name: str, base: str, margin: float) -> None:
    plain = [dataclasses.replace(BY_NAME[given].config, remat="none") for given in (name, base)]
    found, wanted = (macs_of(config) for config in plain)
    assert found == pytest.approx(wanted, rel=margin)
    shapes = [regnet.stage_shapes(config) for config in plain]
    assert [depth for _, depth in shapes[0]] == [depth for _, depth in shapes[1]]


def test_cpu_rival_with_wider_groups_has_the_bases_flops() -> None:
    found, wanted = (
        macs_of(BY_NAME[name].config, edge=32) for name in ("regnet-cpu-group2x", "regnet-cpu-base")
    )
    assert found == pytest.approx(wanted, rel=0.03)


@pytest.mark.parametrize(
    ("width", "group_width", "inner"),
    [
        (64, 64, 64),  # one group is dense already: 9 f^2 + 2 f = 11 at f = 1
        (432, 16, 176),  # 9 f^2 + 2 f = 2 + 1/3 at f = (sqrt(22) - 1) / 9 = 0.4100; 177 -> 176
    ],
)
def test_dense_width_solved_by_hand(width: int, group_width: int, inner: int) -> None:
    assert regnet.dense_width(width, group_width) == inner


def test_parameters_are_split_only_where_32_devices_divide() -> None:
    split = set()
    for _, parameter in nnx.to_flat_state(nnx.state(abstract(regnet.PAPER_16GF), nnx.Param)):
        axes = parameter.get_metadata()["out_sharding"]
        pairs = zip(axes, parameter.shape, strict=True)
        split |= {(axis, size) for axis, size in pairs if axis in ("conv_out", "embed")}
    # Of the widths 32, 224, 448, 1232 and 3024, the last two are no multiples of 32.
    assert split == {("conv_out", 32), *((a, s) for a in ("conv_out", "embed") for s in (224, 448))}


def run(config: regnet.RegNetConfig, images: Any, labels: Any) -> dict[str, Any]:
    """Loss and gradient at parameters of one seed."""
    draw = np.random.default_rng(10).standard_normal
    graphdef, params, rest = nnx.split(abstract(config), nnx.Param, ...)
    params = jax.tree.map(lambda leaf: jnp.float32(0.3 * draw(leaf.shape)), params)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def loss_of(params: Any) -> Any:
        module = nnx.merge(graphdef, params, jax.tree.map(lambda leaf: leaf, rest))
        return regnet.loss(module, {"images": images, "labels": labels})

    value_and_grad = jax.jit(jax.value_and_grad(loss_of), compiler_options=QUICK)
    loss, gradient = value_and_grad(params)
    return {"loss": loss, "gradient": nnx.to_pure_dict(gradient)}


def test_cameras_and_remat_change_neither_loss_nor_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(regnet, "DTYPE", jnp.float32)
    draw = np.random.default_rng(9)
    images = jnp.float32(draw.standard_normal((8, 32, 32, 3)))
    labels = jnp.int32(draw.integers(0, 10, 8))
    want = jax.tree.leaves_with_path(run(regnet.CPU, images, labels))
    remat = dataclasses.replace(regnet.CPU, remat="full")
    others = (
        run(remat, images, labels),
        run(regnet.CPU, images.reshape(2, 4, 32, 32, 3), labels.reshape(2, 4)),
    )
    for other in others:
        for (path, found), (_, wanted) in zip(jax.tree.leaves_with_path(other), want, strict=True):
            # In float32 only the order of sums differs, some 1e-6 through a dozen norms.
            error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
            assert error < 1e-4, path
