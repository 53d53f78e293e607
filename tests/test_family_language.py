"""Language decoders: published sizes and FLOPs, exact rewrites, attention worked out by hand."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jaxbench.layout import Layout
from jaxbench.models import language
from jaxbench.models.blocks.attention import attend
from jaxbench.program import build_program

CANDIDATES = {candidate.name: candidate for candidate in language.CANDIDATES}
BASE = CANDIDATES["language-cpu-base"]
QUICK = {"xla_backend_optimization_level": 0}
Arrays = dict[str, Any]


# --- Sizes ---


def abstract(config: language.LanguageConfig) -> tuple[Any, Any]:
    """Graph and shapes of the parameters."""
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: language.Language(config, nnx.Rngs(params=0)))
    return nnx.split(module)


@functools.cache
def num_params(name: str) -> int:
    _, state = abstract(CANDIDATES[name].config)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    ("name", "exact", "published"),
    [
        # Model cards of meta-llama on Hugging Face: 6.74, 8.03, 69.0 and 70.6 billion.
        ("paper-llama2_7b", 6_738_415_616, 6.74e9),
        ("paper-llama3_8b", 8_030_261_248, 8.03e9),
        ("fleet-llama2_70b", 68_976_648_192, 69.0e9),
        ("fleet-llama3_70b", 70_553_706_496, 70.6e9),
        # Gemma, 2024, table 2: embeddings and the rest.
        ("paper-gemma_2b", 2_506_434_560, 524_550_144 + 1_981_884_416),
        # GPT-3, 2020, table D.1: 174,600 million; 47 rows of 12,288 are filling.
        ("fleet-gpt3_175b", 174_604_259_328 + 47 * 12_288, 174.6e9),
        # MaxText's logs of the runs whose step times it publishes.
        ("paper-relu_16b", 16_274_084_864, 16.3e9),
        ("fleet-relu_22b", 21_944_899_584, 21.9e9),
        ("fleet-relu_32b", 32_548_153_344, 32.5e9),
    ],
)
def test_num_params_are_the_published_ones(name: str, exact: int, published: float) -> None:
    found = num_params(f"language-{name}")
    assert found == exact
    assert found == pytest.approx(published, rel=5e-3)


@pytest.mark.parametrize("name", [c.name for c in language.CANDIDATES if c.validity == "T1"])
def test_t1_variant_has_the_parameters_of_its_base(name: str) -> None:
    assert num_params(name) == pytest.approx(num_params(CANDIDATES[name].base), rel=0.03)


@pytest.mark.parametrize(
    ("name", "batch", "tflops"), [("paper-relu_16b", 6, 1279.0), ("fleet-relu_32b", 4, 1652.6)]
)
def test_step_flops_are_those_that_published_mfu_counts(
    name: str, batch: int, tflops: float
) -> None:
    # TFLOP a chip and step in MaxText's logs: 6 x parameters x tokens, and attention not halved.
    candidate = CANDIDATES[f"language-{name}"]
    workload = dataclasses.replace(candidate.workload, global_batch=batch)
    program = build_program(
        dataclasses.replace(candidate, workload=workload),
        Layout(axes=(("data", 1),)),
        AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,)),
        "tpu",
    )
    assert program.mathematics.flops / 1e12 == pytest.approx(tflops, rel=1e-3)


# --- Exact rewrites ---


def values(config: language.LanguageConfig) -> Arrays:
    """Random parameters by path: no norm is one, no bias is zero."""
    draw = np.random.default_rng(0).standard_normal
    _, state = abstract(config)
    return {
        "/".join(map(str, path)): (draw(leaf.shape) * 0.15 + (leaf.ndim == 1)).astype(np.float32)
        for path, leaf in nnx.to_flat_state(state)
    }


START = values(BASE.config)
TOKENS = np.random.default_rng(1).integers(0, BASE.config.vocab_size, (2, 33)).astype(np.int32)


def carry(arrays: Arrays, config: language.LanguageConfig) -> Arrays:
    """The same values where a rewrite keeps its parameters in another way."""
    if config.layers == "unroll":
        stacked = {path for path in arrays if path.startswith("stack/layers/")}
        layers = {
            path.replace("stack/layers/", f"stack/layers/{layer}/"): arrays[path][layer]
            for path in stacked
            for layer in range(config.num_layers)
        }
        arrays = {path: arrays[path] for path in arrays if path not in stacked} | layers
    filling = config.table_rows - BASE.config.vocab_size
    # Ones: were they not masked, they would count.
    table = jnp.pad(arrays["table"], ((0, filling), (0, 0)), constant_values=1)
    output = jnp.pad(arrays["output"], ((0, 0), (0, filling)), constant_values=1)
    return {**arrays, "table": table, "output": output}


def put(arrays: Arrays, config: language.LanguageConfig) -> language.Language:
    """The network with these values."""
    graph, state = abstract(config)
    paths = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]
    leaves, tree = jax.tree.flatten(state)
    assert set(paths) == set(arrays)
    assert [arrays[path].shape for path in paths] == [leaf.shape for leaf in leaves]
    return nnx.merge(graph, jax.tree.unflatten(tree, [arrays[path] for path in paths]))


@functools.cache
def value_and_gradient(name: str) -> tuple[jax.Array, Arrays]:
    """Loss in float32 and its gradient by the base's parameters."""
    config = CANDIDATES[name].config

    def loss(arrays: Arrays) -> jax.Array:
        return language.loss(put(carry(arrays, config), config), {"tokens": jnp.array(TOKENS)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "DTYPE", jnp.float32)
        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(START)


@pytest.mark.parametrize(
    "name", [c.name for c in language.CANDIDATES if c.base == BASE.name and c.validity == "T0"]
)
def test_exact_rewrite_has_value_and_gradient_of_the_base(name: str) -> None:
    (value, gradient), (wanted, slope) = value_and_gradient(name), value_and_gradient(BASE.name)
    assert float(value) == pytest.approx(float(wanted), rel=1e-5)
    for path in slope:
        # Only the order of sums differs; entries near zero are held to the parameter's largest.
        scale = float(jnp.max(jnp.abs(slope[path])))
        np.testing.assert_allclose(
            gradient[path], slope[path], rtol=1e-4, atol=1e-4 * scale, err_msg=path
        )


def test_rows_that_stand_for_no_token_get_no_gradient() -> None:
    config = CANDIDATES["language-cpu-vocab256"].config

    def loss(arrays: Arrays) -> jax.Array:
        return language.loss(put(arrays, config), {"tokens": jnp.array(TOKENS)})

    gradient = jax.jit(jax.grad(loss), compiler_options=QUICK)(carry(START, config))
    assert config.table_rows == 768
    assert not np.any(gradient["table"][701:])
    assert not np.any(gradient["output"][:, 701:])
    assert np.all(np.any(np.asarray(gradient["output"][:, :701]), axis=0))


# --- Attention ---


def heads(*sizes: tuple[int, int, int, int]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), len(sizes))
    return tuple(jax.random.normal(key, size) for key, size in zip(keys, sizes, strict=True))


def test_kernel_on_filled_tiles_is_causal_attention() -> None:
    # 130 tokens fill two tiles of 128; two query heads a key head; values narrower than keys.
    query, key, value = heads((1, 130, 4, 24), (1, 130, 2, 24), (1, 130, 2, 16))
    cotangent = heads((1, 130, 4, 16))[0]

    def gradient(attention: Callable) -> tuple[jax.Array, Any]:
        def total(*inputs: jax.Array) -> jax.Array:
            return jnp.sum(attention(*inputs) * cotangent)

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2)))(query, key, value)

    with pltpu.force_tpu_interpret_mode():
        found = gradient(language._flash_on_tpu)
    wanted = gradient(functools.partial(attend, causal=True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), found, wanted)


def test_flash_is_a_kernel_on_tpus_also_sharded_and_einsums_elsewhere() -> None:
    layout = Layout(axes=(("fsdp", 8),))
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    query, key = (
        jax.ShapeDtypeStruct((8, 64, num, 16), jnp.bfloat16, sharding=sharding) for num in (8, 4)
    )

    def total(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(language.flash(*inputs).astype(jnp.float32))

    with nnx.logical_axis_rules(layout.rules()), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2))).trace(query, key, key)
    on_tpu, on_gpu = (traced.lower(lowering_platforms=(name,)) for name in ("tpu", "cuda"))
    # Forward, and backward for the queries and for keys and values, each on one sample.
    assert on_tpu.as_text().count("@tpu_custom_call") == 3
    assert "tensor<1x8x128x128xbf16>" in on_tpu.as_text()
    assert "@tpu_custom_call" not in on_gpu.as_text()


@pytest.mark.parametrize("change", ["base", "latent", "chunked"])
def test_later_tokens_do_not_change_what_was_read_before(change: str) -> None:
    config = CANDIDATES[f"language-cpu-{change}"].config
    arrays = values(config)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def read(arrays: Arrays, tokens: jax.Array) -> jax.Array:
        return put(arrays, config).read(tokens)

    tokens = TOKENS[:, :32].copy()
    one = np.asarray(read(arrays, tokens))
    tokens[:, 20] = (tokens[:, 20] + 1) % config.vocab_size
    other = np.asarray(read(arrays, tokens))
    np.testing.assert_array_equal(one[:, :20], other[:, :20])
    assert np.all(np.any(one[:, 20:] != other[:, 20:], axis=-1))


def test_latent_attention_by_hand() -> None:
    D, N, H, T, R, P = 8, 2, 4, 3, 16, 2
    config = dataclasses.replace(
        BASE.config, embed_dim=D, num_heads=N, num_kv_heads=N, head_dim=H, theta=100.0
    )
    with nnx.use_eager_sharding(False):
        module = language.LatentAttention(config, nnx.Rngs(params=0))
    x = heads((1, T, 1, D))[0][:, :, 0]
    query, compress, key, value, out = (
        np.asarray(parameter[...], np.float64)
        for parameter in (module.query, module.compress, module.key, module.value, module.out)
    )

    def turn(pair: np.ndarray, position: int) -> np.ndarray:
        # Two rotary numbers are one pair, turned by the position in radians.
        c, s = math.cos(position), math.sin(position)
        return np.array([pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s])

    rows = np.asarray(x[0], np.float64)
    latents = rows @ compress[:, :R]
    latents /= np.sqrt(np.mean(latents**2, axis=-1, keepdims=True) + 1e-5)
    turned = [turn(rows[t] @ compress[:, R:], t) for t in range(T)]
    wanted = np.zeros((T, D))
    for t, n in np.ndindex(T, N):
        asked = rows[t] @ query[:, n]
        plain, rotary = asked[:H], turn(asked[H:], t)
        scores = [plain @ (latents[s] @ key[:, n]) + rotary @ turned[s] for s in range(t + 1)]
        weights = np.exp(np.array(scores) / math.sqrt(H + P))
        mixed = sum(w * (latents[s] @ value[:, n]) for s, w in enumerate(weights / weights.sum()))
        wanted[t] += mixed @ out[n]
    np.testing.assert_allclose(module(x)[0], wanted, rtol=1e-4, atol=1e-5)
