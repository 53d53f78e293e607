"""What the real compilers refuse, and what is done about it."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import SingleDeviceSharding

from jaxbench.compiler import (
    Compiled,
    Memory,
    compile_program,
    devices_of,
    platform_of,
    unpack_compiled,
)
from jaxbench.target import parse_target

COMPILED = Compiled(
    program_sha256="program",
    target="gpu-h100",
    hlo=b"\0hlo",
    memory=Memory(argument_bytes=1, output_bytes=2, alias_bytes=3, temp_bytes=4),
    compile_s=5.0,
)


def lower_attention_output(target: str, num_tokens: int) -> Any:
    """Values weighted by attention and projected, which XLA:GPU fuses with their transpose."""
    sharding = SingleDeviceSharding(devices_of(parse_target(target))[0])

    def attend(weights: Any, values: Any, kernel: Any) -> Any:
        heads = jnp.einsum("BKGTS,BSKH->BTKGH", weights, values)
        return jnp.einsum("BTNH,NHD->BTD", heads.reshape(values.shape), kernel)

    shapes = (4, 16, 1, num_tokens, num_tokens), (4, num_tokens, 16, 128), (16, 128, 2048)
    arguments = [jax.ShapeDtypeStruct(s, jnp.bfloat16, sharding=sharding) for s in shapes]
    return jax.jit(attend).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("num_tokens", [610, 4880])
def test_product_without_a_default_tiling_is_compiled_all_the_same(num_tokens: int) -> None:
    target = parse_target("gpu-h100")
    compiled, _ = compile_program(lower_attention_output("gpu-h100", num_tokens), "p", target)
    assert compiled.hlo
    # Without extra options Triton takes products, with them it takes none.
    assert (b"__triton_nested_gemm_fusion" in compiled.hlo) == (not compiled.extra_options)


class Refusing:
    """A program that no compiler takes."""

    def __init__(self) -> None:
        self.times = 0

    def compile(self, compiler_options: Any) -> Any:
        self.times += 1
        raise RuntimeError("INTERNAL: something else")


def test_another_refusal_is_handed_on_at_once() -> None:
    program = Refusing()
    with pytest.raises(RuntimeError, match="something else"):
        compile_program(program, "p", parse_target("gpu-h100"))
    assert program.times == 1


@pytest.mark.parametrize("extra", [{}, {"xla_gpu_enable_triton_gemm": False}])
def test_compiled_program_survives_its_bytes(extra: dict[str, Any]) -> None:
    compiled = dataclasses.replace(COMPILED, extra_options=extra)
    assert unpack_compiled(compiled.pack()) == compiled


def compile_source(target: str, source: str, file: str, *, quick_code: bool = False) -> Compiled:
    """Compiles the function `f` of a source text that is said to stand in `file`."""
    space: dict[str, Any] = {}
    exec(compile(source, file, "exec"), {"jax": jax, "jnp": jnp}, space)
    # The process has 8 CPU devices already.
    devices = jax.devices("cpu") if target == "cpu" else devices_of(parse_target(target))
    sharding = SingleDeviceSharding(devices[0])
    shape = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=sharding)
    traced = jax.jit(space["f"]).trace(shape, shape)
    lowered = traced.lower(lowering_platforms=(platform_of(parse_target(target)),))
    return compile_program(lowered, "p", parse_target(target), quick_code=quick_code)[0]


@pytest.mark.parametrize("target", ["cpu", "gpu-h100", "tpu-v5e"])
def test_digest_tells_programs_apart_and_not_where_they_were_written(target: str) -> None:
    plain = "def f(x, w):\n return jnp.tanh(x @ w).sum()\n"
    scoped = "\n\ndef f(x, w):\n with jax.named_scope('mlp'):\n  return jnp.tanh(x @ w).sum()\n"
    first = compile_source(target, plain, "/home/one/net.py")
    other = compile_source(target, plain.replace("tanh", "sin"), "/home/one/net.py")
    again = compile_source(target, scoped, "/home/another/checkout/net.py")
    assert first.hlo != again.hlo
    assert first.hlo_sha256 == again.hlo_sha256
    assert first.hlo_sha256 != other.hlo_sha256


@pytest.mark.parametrize("target", ["cpu", "gpu-h100"])
def test_quick_code_is_of_the_same_hlo_and_memory(target: str) -> None:
    source = (
        "def f(x, w):\n"
        " y = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w), x)\n"
        " return jnp.sort(y, axis=0), jax.nn.softmax(y)[jnp.argsort(y[0])].sum(1)\n"
    )
    full = compile_source(target, source, "net.py")
    quick = compile_source(target, source, "net.py", quick_code=True)
    assert (quick.hlo_sha256, quick.memory) == (full.hlo_sha256, full.memory)


@pytest.mark.parametrize("target", ["cpu", "gpu-h100"])
def test_jax_own_cache_is_neither_written_nor_read(target: str, tmp_path: Path) -> None:
    """A user may have set `JAX_COMPILATION_CACHE_DIR`; what trains networks sets it, too."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks once in a process whether the cache is on
    try:
        jax.jit(lambda x: x + 1)(jnp.ones(3))
        after_another = len(list(tmp_path.iterdir()))
        first, second = (
            compile_source(target, "def f(x, w):\n return (x @ w).sum()\n", "net.py")
            for _ in range(2)
        )
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    assert first.hlo_sha256 == second.hlo_sha256
    assert after_another > 0
    assert len(list(tmp_path.iterdir())) == after_another
