"""ResNet: published sizes, stems and loops that compute the same, kernels that replace a norm."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rewrites import forward_macs

from jaxbench.models import resnet

QUICK = {"xla_backend_optimization_level": 0}
SMALL = dataclasses.replace(
    resnet.CPU, stem_channels=8, channels=(16, 16), inner=(8, 8), depths=(1, 3)
)


def abstract(config: resnet.ResNetConfig) -> resnet.ResNet:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: resnet.build(config, nnx.Rngs(params=0)))


def count_params(config: resnet.ResNetConfig) -> int:
    leaves = jax.tree.leaves(nnx.state(abstract(config), nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


# Published: torchvision's tables of weights, num_params and GFLOPS (multiplications); for
# SE-ResNet-50 Hu et al., CVPR 2018, table 2: 3.87 of GFLOPs and 28.1 million by their text's
# 2.5 million more than ResNet-50. Their 3.87 are of the version that strides in the 1x1.
SIZES = [
    ("50", resnet.PAPER_50, 25_557_032, 25_557_032, 4.089e9),
    ("101", resnet.PAPER_101, 44_549_160, 44_549_160, 7.801e9),
    ("se50", resnet.PAPER_SE50, 28_088_024, 28.09e6, None),
    ("next50", resnet.PAPER_NEXT50, 25_028_904, 25_028_904, 4.230e9),
]


@pytest.mark.parametrize(("name", "config", "exact", "published", "macs"), SIZES)
def test_paper_size_has_the_published_parameters_and_macs(
    name: str, config: resnet.ResNetConfig, exact: int, published: float, macs: float | None
) -> None:
    found = count_params(config)
    assert found == exact
    assert found == pytest.approx(published, rel=0.005)
    if macs is not None:
        assert forward_macs(abstract(config), (1, 224, 224, 3)) == pytest.approx(macs, rel=0.005)


def carry_layers(values: dict[str, Any]) -> dict[str, Any]:
    """Stacks what written-out equal blocks hold, as the loop over them holds it."""
    stages = {}
    for index, stage in values["stages"].items():
        if "rest" in stage:
            layers = stage["rest"]["layers"]
            ordered = [layers[position] for position in sorted(layers)]
            stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
            stage = {**stage, "rest": {"layers": stacked}}
        stages[index] = stage
    return {**values, "stages": stages}


def draw_params() -> dict[str, Any]:
    """Random parameters of `SMALL` with its blocks written out."""
    draw = np.random.default_rng(5).standard_normal
    module = abstract(dataclasses.replace(SMALL, layers="unroll"))
    shapes = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree.map(lambda leaf: jnp.float32(0.3 * draw(leaf.shape)), shapes)


def step(config: resnet.ResNetConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Loss, gradient and new running averages, in the loop's form of the parameters."""
    draw = np.random.default_rng(6)
    batch = {
        "images": jnp.float32(draw.standard_normal((4, 32, 32, 3))),
        "labels": jnp.int32(draw.integers(0, config.num_classes, 4)),
    }
    module = abstract(config)
    nnx.update(module, values)
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def loss_of(params: Any, rest: Any) -> Any:
        module = nnx.merge(graphdef, params, jax.tree.map(lambda leaf: leaf, rest))
        return resnet.loss(module, batch), nnx.state(module, nnx.BatchStat)

    run = jax.jit(jax.value_and_grad(loss_of, has_aux=True), compiler_options=QUICK)
    (loss, averages), gradient = run(params, rest)
    parts = {"gradient": nnx.to_pure_dict(gradient), "averages": nnx.to_pure_dict(averages)}
    if config.layers == "unroll":
        parts = {name: carry_layers(part) for name, part in parts.items()}
    return {"loss": loss, **parts}


def test_exact_rewrites_agree_in_loss_gradient_and_running_averages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resnet, "DTYPE", jnp.float32)
    unrolled = draw_params()
    stacked = carry_layers(unrolled)
    want = jax.tree.leaves_with_path(step(SMALL, stacked))
    rewrites = (
        ({"stem": "space_to_depth"}, stacked),
        ({"remat": "full"}, stacked),
        ({"layers": "unroll"}, unrolled),
    )
    for fields, values in rewrites:
        got = jax.tree.leaves_with_path(step(dataclasses.replace(SMALL, **fields), values))
        for (path, found), (other, wanted) in zip(got, want, strict=True):
            assert path == other
            # In float32 only the order of sums differs, some 1e-6 through a dozen norms.
            error = jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)
            assert error < 1e-4, (fields, path)


@pytest.mark.parametrize("folded", [False, True])
def test_stem_one_bright_pixel_gives_the_kernel_backwards(folded: bool) -> None:
    kernel = np.float32(np.random.default_rng(7).standard_normal((7, 7, 3, 2)))
    image = np.zeros((1, 12, 16, 3), np.float32)
    image[0, 5, 6, 1] = 1.0
    if folded:
        out = resnet.convolve_folded(jnp.asarray(image), jnp.asarray(kernel))
    else:
        out = resnet.convolve(jnp.asarray(image), jnp.asarray(kernel), stride=2, padding=(3, 3))
    want = np.zeros((1, 6, 8, 2), np.float32)
    for row, column in np.ndindex(6, 8):
        # An output at (r, c) has its kernel's middle, tap 3, on pixel (2r, 2c).
        tap = (5 - 2 * row + 3, 6 - 2 * column + 3)
        if 0 <= tap[0] < 7 and 0 <= tap[1] < 7:
            want[0, row, column] = kernel[tap[0], tap[1], 1]
    # One product and zeros: exact but for a multiplication's rounding.
    np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-6)


def test_scaled_kernel_has_its_moments_whatever_the_weights_scale_and_offset() -> None:
    kernel = jnp.float32(np.random.default_rng(8).standard_normal((3, 3, 4, 5)))
    scaled = resnet.scale_kernel(kernel, 1.5)
    flat = np.asarray(scaled).reshape(36, 5)
    # Float32 sums over 36 weights err by some 1e-7 of the largest.
    np.testing.assert_allclose(flat.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(flat.std(axis=0), 1.5 / 6, rtol=1e-5)
    np.testing.assert_allclose(resnet.scale_kernel(3 * kernel + 5, 1.5), scaled, atol=1e-5)


def test_block_without_norm_starts_as_its_shortcut() -> None:
    config = dataclasses.replace(SMALL, norm="none")
    with nnx.use_eager_sharding(False):
        block = resnet.Bottleneck(config, 16, stage=1, stride=1, rngs=nnx.Rngs(params=0))
    x = jnp.abs(jax.random.normal(jax.random.key(1), (2, 4, 4, 16)))
    np.testing.assert_array_equal(block(x), x)
