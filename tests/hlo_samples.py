"""Small real programs, compiled for absent hardware, as serialized HLO for the tests.

One process per target compiles all programs at once; pytest's cache keeps the result, keyed by the
versions of the compilers and by this file, so that the next test run compiles nothing.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
}
TARGETS = ("cpu", "tpu-v5e", "tpu-7x", "gpu-h100")
TPU_TOPOLOGIES = {"tpu-v5e": "v5e:2x2", "tpu-7x": "tpu7x:2x2x1"}
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda12-plugin")
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
# name: (x shape NHWC, kernel HWIO, strides, feature groups, kernel dilation)
CONVOLUTIONS = {
    "conv-plain": ((4, 12, 12, 32), (3, 3, 32, 64), (1, 1), 1, (1, 1)),
    "conv-strided": ((4, 13, 13, 32), (3, 3, 32, 64), (2, 2), 1, (1, 1)),
    "conv-depthwise": ((4, 12, 12, 128), (3, 3, 1, 128), (1, 1), 128, (1, 1)),
    "conv-depthwise-strided": ((4, 13, 13, 128), (5, 5, 1, 128), (2, 2), 128, (1, 1)),
    "conv-grouped": ((4, 12, 12, 64), (3, 3, 16, 64), (1, 1), 4, (1, 1)),
    "conv-dilated": ((4, 12, 12, 32), (3, 3, 32, 64), (1, 1), 1, (2, 2)),
    "conv-stem": ((8, 32, 32, 3), (7, 7, 3, 64), (2, 2), 1, (1, 1)),
    "conv-pointwise": ((4, 12, 12, 32), (1, 1, 32, 64), (2, 2), 1, (1, 1)),
}
SCAN_LAYERS = 12
SCAN_WIDTH = 256
SCAN_BATCH = 128
FSDP = {"m": 256, "k": 256, "n": 512}
Build = Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]]


def _matmul(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    del mesh
    matrix = _array((4096, 4096))
    return (lambda a, b: a @ b), (matrix, matrix)


def _layers(unroll: int) -> Build:
    """Gradient of 12 layers of tanh(h @ w), as a loop or written out."""

    def build(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        del mesh
        import jax
        import jax.numpy as jnp

        def loss(w: Any, x: Any) -> Any:
            h, _ = jax.lax.scan(lambda h, wi: (jnp.tanh(h @ wi), None), x, w, unroll=unroll)
            return (h.astype(jnp.float32) ** 2).mean()

        stacked = _array((SCAN_LAYERS, SCAN_WIDTH, SCAN_WIDTH))
        return jax.grad(loss, argnums=(0, 1)), (stacked, _array((SCAN_BATCH, SCAN_WIDTH)))

    return build


def _nested(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A loop of 3 in a loop of 5, each trip one matmul of 128 cubed."""
    del mesh
    import jax
    import jax.numpy as jnp

    def outer(h: Any, w: Any) -> Any:
        inner = lambda _, h: jnp.tanh(h @ w)  # noqa: E731
        step = lambda h, _: (jax.lax.fori_loop(0, 3, inner, jnp.sin(h)), None)  # noqa: E731
        return jax.lax.scan(step, h, length=5)[0]

    return outer, (_array((128, 128)), _array((128, 128)))


def _odd_loop(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A loop from 20 down to above 3 in steps of 4: five trips."""
    del mesh
    import jax
    import jax.numpy as jnp

    def count(h: Any, w: Any) -> Any:
        body = lambda c: (c[0] - 4, jnp.tanh(c[1] @ w))  # noqa: E731
        return jax.lax.while_loop(lambda c: c[0] > 3, body, (20, h))[1]

    return count, (_array((128, 128)), _array((128, 128)))


def _open_loop(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A loop whose number of trips depends on the data."""
    del mesh
    import jax
    import jax.numpy as jnp

    def run(h: Any, w: Any) -> Any:
        body = lambda h: jnp.tanh(h @ w)  # noqa: E731
        return jax.lax.while_loop(lambda h: h.astype(jnp.float32).sum() < 3.0, body, h)

    return run, (_array((128, 128)), _array((128, 128)))


def _fsdp(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """x @ w with the batch of x and the rows of w on the same two-way axis; w is gathered."""
    import jax
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    pair = Mesh(mesh.devices[:2, :1], mesh.axis_names)

    def gathered(x: Any, w: Any) -> Any:
        return x @ jax.lax.with_sharding_constraint(w, NamedSharding(pair, P()))

    x = _array((FSDP["m"], FSDP["k"]), mesh=pair, spec=P("data"))
    w = _array((FSDP["k"], FSDP["n"]), mesh=pair, spec=P("data"))
    return gathered, (x, w)


def _fsdp_step(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A gradient step over 4 scanned layers, weights sharded two ways, tensor parallel two ways."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec as P

    def step(w: Any, v: Any, x: Any) -> Any:
        def loss(w: Any, v: Any) -> Any:
            layer = lambda h, wv: (h + jnp.tanh(h @ wv[0]) @ wv[1], None)  # noqa: E731
            h, _ = jax.lax.scan(layer, x, (w, v))
            return (h.astype(jnp.float32) ** 2).mean()

        dw, dv = jax.grad(loss, argnums=(0, 1))(w, v)
        return w - 0.1 * dw.astype(w.dtype), v - 0.1 * dv.astype(v.dtype)

    w = _array((4, 512, 1024), mesh=mesh, spec=P(None, "data", "model"))
    v = _array((4, 1024, 512), mesh=mesh, spec=P(None, "model", "data"))
    return step, (w, v, _array((256, 512), mesh=mesh, spec=P("data")))


def _stack(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """64 trips, each of which writes one 128 x 256 slice of a 64 x 128 x 256 float32 buffer."""
    del mesh
    import jax
    import jax.numpy as jnp

    def run(h: Any) -> Any:
        def body(h: Any, _: None) -> tuple[Any, Any]:
            h = jnp.sin(h) * 1.5
            return h, h

        return jax.lax.scan(body, h, length=64)[1]

    return run, (_array((128, 256), dtype="float32"),)


def _convolution(name: str) -> Build:
    """Value and both gradients of one convolution with SAME padding."""
    shape, kernel, strides, groups, dilation = CONVOLUTIONS[name]

    def build(mesh: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        del mesh
        import jax

        def conv(x: Any, w: Any) -> Any:
            return jax.lax.conv_general_dilated(
                x,
                w,
                strides,
                "SAME",
                rhs_dilation=dilation,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                feature_group_count=groups,
            )

        def all_three(x: Any, w: Any, g: Any) -> Any:
            y, pull = jax.vjp(conv, x, w)
            return y, pull(g)

        out = jax.eval_shape(conv, _array(shape), _array(kernel))
        return all_three, (_array(shape), _array(kernel), _array(out.shape))

    return build


PROGRAMS: dict[str, Build] = {
    "matmul": _matmul,
    "scanned": _layers(1),
    "unrolled": _layers(SCAN_LAYERS),
    "nested": _nested,
    "odd-loop": _odd_loop,
    "open-loop": _open_loop,
    "fsdp": _fsdp,
    "fsdp-step": _fsdp_step,
    "stack": _stack,
} | {name: _convolution(name) for name in CONVOLUTIONS}


def _array(
    shape: tuple[int, ...], *, dtype: str = "bfloat16", mesh: Any = None, spec: Any = None
) -> Any:
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    sharding = None if mesh is None else NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=sharding)


def _devices(target: str) -> list[Any]:
    """At least four devices, of hardware that is not there."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()
    if target in TPU_TOPOLOGIES:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=TPU_TOPOLOGIES[target]
        ).devices
    return topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=H100, topology="1x1x4"
    ).devices


def _compile_all(target: str, folder: pathlib.Path) -> None:
    """Compiles every program for `target` and writes one file for each."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = _devices(target)
    platform = {"tpu": "tpu", "gpu": "cuda", "cpu": "cpu"}[target.split("-")[0]]
    options = {"xla_gpu_autotune_level": "0"} if platform == "cuda" else None
    for name, build in PROGRAMS.items():
        wide = Mesh(np.array(devices[:4]).reshape(2, 2), ("data", "model"))
        single = NamedSharding(Mesh(np.array(devices[:1]), ("one",)), PartitionSpec())
        function, arguments = build(wide)
        if all(argument.sharding is None for argument in arguments):
            arguments = tuple(
                jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=single) for a in arguments
            )
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
        executable: Any = lowered.compile(compiler_options=options).runtime_executable()
        module = executable.hlo_modules()[0]
        (folder / f"{name}.txt").write_text(module.to_string())
        (folder / f"{name}.pb").write_bytes(module.as_serialized_hlo_module_proto())


def _key() -> str:
    """Digest of what decides the HLO: the compilers' versions and this file."""
    versions = [f"{name}={importlib.metadata.version(name)}" for name in COMPILERS]
    source = pathlib.Path(__file__).read_bytes()
    return hashlib.sha256("\n".join(versions).encode() + source).hexdigest()[:16]


def _compiled(target: str, folder: pathlib.Path) -> dict[str, bytes]:
    """All programs for one target, from `folder` if they are complete there."""
    missing = [name for name in PROGRAMS if not (folder / f"{name}.pb").exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, __file__, target, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"compiling for {target} failed:\n{done.stderr[-4000:]}"
    return {name: (folder / f"{name}.pb").read_bytes() for name in PROGRAMS}


@pytest.fixture(scope="session", params=TARGETS)
def hlo(request: pytest.FixtureRequest) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(target, {program: serialized HloModuleProto}) for each target in turn."""
    cache = request.config.cache
    assert cache is not None
    folder = pathlib.Path(cache.mkdir(f"jaxbench-hlo-{_key()}")) / request.param
    return request.param, _compiled(request.param, folder)


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    _compile_all(sys.argv[1], pathlib.Path(sys.argv[2]))
