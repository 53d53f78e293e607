"""Compiling ahead of time for devices that are not there. Runs inside worker processes only.

What is verified about each compiler stands beside the line that needs it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxbench.cache import key_of
from jaxbench.errors import Failure, JaxbenchError
from jaxbench.hlo.digest import digest_module
from jaxbench.layout import Layout
from jaxbench.machine import processor
from jaxbench.target import Chip, Target, chip_table

# Set before JAX is imported. libtpu's lock file stops a second process, its metadata query waits
# for a server that only Google's machines have, and the CUDA plug-in checks for libraries that
# compiling does not need. One BLAS thread: what NumPy starts at import must not survive a fork.
# Processes that are timed against each other share a GPU's memory, so none may take it all.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
    "OPENBLAS_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# An absent GPU can time nothing, so autotuning is off and products take their default tiles.
_OPTIONS: dict[str, dict[str, str]] = {"gpu": {"xla_gpu_autotune_level": "0"}}
# XLA:CPU makes the same optimised HLO with these, in half the time: LLVM's own passes are left out.
QUICK_CODE: dict[str, Any] = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}
# For some products that it fused for Triton, XLA:GPU of JAX 0.12 has no tiling to take untimed, and
# gives up. Without Triton all products go to cuBLAS.
_NO_TILING = "No supported config found"
_WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}
COMPILED_ON = "compiled on"  # among a record's versions, where the compiler had the device
_PLATFORM = {"cpu": "cpu", "tpu": "tpu", "gpu": "cuda"}
_PACKAGES = ("jax", "jaxlib", "flax", "optax")
_COMPILER_PACKAGES = {
    "cpu": (),
    "tpu": ("libtpu",),
    "gpu": ("jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12"),
}


class DoesNotFitError(JaxbenchError):
    """A program needs more memory than the device has, by the compiler's word or figures."""

    def __init__(self, needed_bytes: int, available_bytes: int):
        super().__init__(
            f"Needs {needed_bytes} bytes of device memory, {available_bytes} are there. "
            "Use more devices, a smaller batch or more rematerialisation."
        )
        self.needed_bytes = needed_bytes
        self.available_bytes = available_bytes

    def to_failure(self) -> Failure:
        """Returns the finding for the record."""
        return Failure(
            stage="fit",
            error="DoesNotFit",
            text=str(self),
            needed_bytes=self.needed_bytes,
            available_bytes=self.available_bytes,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Memory:
    """Device memory of one program on one device, in bytes, from the compiler."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    temp_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Arguments, results and temporaries; a donated buffer is both, and counted once."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What one compiler made of one program for one target.

    Attributes:
      program_sha256: Digest of the StableHLO.
      hlo: Optimised HLO of one device as a serialised HloModuleProto.
      compile_s: Wall seconds of the compiler.
      extra_options: Compiler options beyond the target's own, without which it would not compile.
    """

    program_sha256: str
    target: str
    hlo: bytes
    memory: Memory
    compile_s: float
    extra_options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hlo_sha256(self) -> str:
        """Digest of the optimised HLO, without where it was written."""
        return digest_module(self.hlo)

    def pack(self) -> bytes:
        """Returns the bytes that `unpack_compiled` reads."""
        memory = {name: getattr(self.memory, name) for name in self.memory.__dataclass_fields__}
        values = [self.program_sha256, self.target, memory, self.compile_s]
        values += [dict(self.extra_options)] if self.extra_options else []
        head = json.dumps(values).encode()
        return struct.pack("<I", len(head)) + head + self.hlo


def unpack_compiled(payload: bytes) -> Compiled:
    """Reads what `Compiled.pack` wrote."""
    (length,) = struct.unpack_from("<I", payload)
    program_sha256, target, memory, compile_s, *rest = json.loads(payload[4 : 4 + length])
    return Compiled(
        program_sha256=program_sha256,
        target=target,
        hlo=payload[4 + length :],
        memory=Memory(**memory),
        compile_s=compile_s,
        extra_options=rest[0] if rest else {},
    )


def platform_of(target: Target) -> str:
    """Returns the platform name that JAX lowers for."""
    return _PLATFORM[target.kind]


def versions_for(target: Target) -> dict[str, str]:
    """Returns the versions of everything that decides what the compiler makes."""
    packages = (*_PACKAGES, *_COMPILER_PACKAGES[target.kind])
    found = {package: importlib.metadata.version(package) for package in packages}
    asked = ", ".join(f"{name}={value}" for name, value in target.options)
    more = {"options": asked} if asked else {}
    if target.attached:
        more[COMPILED_ON] = "the attached device"
    return {"python": platform.python_version(), **found, **more}


def compiled_key(program_sha256: str, target: Target) -> str:
    """Returns the cache key of a compiled program: program, target, options and versions."""
    versions = versions_for(target)
    del versions["python"]  # the compilers do not see it
    # XLA:CPU generates code for the processor that it runs on.
    machine = (platform.machine(), processor()) if target.kind == "cpu" else ()
    return key_of(program_sha256, target.name, _own_options(target), versions, machine)


def make_mesh(target: Target, layout: Layout) -> Any:
    """Makes the mesh of a resolved layout over the target's compile-only or CPU devices."""
    import jax
    from jax.experimental import mesh_utils

    devices = devices_of(target)
    names, sizes = zip(*layout.axes, strict=True)
    if target.num_slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            *_split_slices(sizes, target.num_slices),
            devices=devices,
            allow_split_physical_axes=True,
        )
    elif target.kind == "tpu" and target.num_chips > 1:
        grid = mesh_utils.create_device_mesh(sizes, devices=devices, allow_split_physical_axes=True)
    else:
        import numpy as np

        grid = np.array(devices).reshape(sizes)
    return jax.sharding.Mesh(grid, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))


def _split_slices(sizes: tuple[int, ...], num_slices: int) -> tuple[list[int], list[int]]:
    """Returns mesh sizes inside and across slices; the first axis that divides goes across."""
    for index, size in enumerate(sizes):
        if size % num_slices == 0:
            across = [num_slices if i == index else 1 for i in range(len(sizes))]
            return [size // n for size, n in zip(sizes, across, strict=True)], across
    raise JaxbenchError(
        f"No mesh axis of sizes {sizes} divides over {num_slices} slices. Give one axis a multiple "
        f"of {num_slices}."
    )


def devices_of(target: Target) -> list[Any]:
    """Returns the target's compile-only or attached devices, or the CPU split into as many."""
    import jax
    from jax.experimental import topologies

    chip = chip_table()[target.chip]
    if target.kind == "cpu":
        jax.config.update("jax_num_cpu_devices", target.num_devices)
        return jax.devices("cpu")
    if target.attached:
        return jax.devices(platform_of(target))[: target.num_devices]
    if target.kind == "tpu":
        # One chip is taken out of one host: the smallest topology that libtpu builds for every
        # chip.
        dims = chip.host_bounds if target.num_chips == 1 else target.topology
        name = f"{chip.topology_name}:{'x'.join(map(str, dims))}"
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=name, **_tpu_options(target, chip, dims)
        )
    else:
        hosts, gpus = target.topology
        description = topologies.get_topology_desc(
            platform="cuda",
            topology_name=chip.name,
            target_config=gpu_target_config(chip),
            topology=f"1x{hosts}x{gpus}",
        )
    return description.devices[: target.num_devices]


def _tpu_options(target: Target, chip: Chip, dims: tuple[int, ...]) -> dict[str, Any]:
    options: dict[str, Any] = {"num_slices": target.num_slices} if target.num_slices > 1 else {}
    if chip.name == "tpu-v4":
        # Without these a v4 chip is two devices. A torus axis closes only over whole cubes of four.
        options = {
            "chip_config_name": "megacore",
            "chips_per_host_bounds": chip.host_bounds,
            "num_slices": target.num_slices,
            "wrap": tuple(dim % 4 == 0 for dim in dims),
        }
    return options


def gpu_target_config(chip: Chip) -> str:
    """Writes the text proto by which XLA knows a GPU that is not there."""
    major, minor = chip.compute_capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {chip.shared_bytes_per_core}
  shared_memory_per_block_optin: {chip.shared_bytes_optin}
  core_count: {chip.num_cores} fpus_per_core: {chip.fpus_per_core}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.hbm_bytes_per_s:.0f} l2_cache_size: {chip.l2_bytes} clock_rate_ghz:
    {chip.clock_ghz}
  device_memory_size: {chip.hbm_bytes:.0f} cuda_compute_capability {{ major: {major} minor: {minor}
    }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{chip.description}"
"""


def compile_program(
    lowered: Any, program_sha256: str, target: Target, *, quick_code: bool = False
) -> tuple[Compiled, Any]:
    """Compiles a lowered step with the target's real compiler.

    Args:
      quick_code: Whether a CPU's machine code may be slow, as it is only its HLO that is wanted.

    Returns:
      The value to keep, and JAX's executable (which runs only where the target is attached).

    Raises:
      DoesNotFitError: if the compiler refuses the program for want of device memory.
    """
    start = time.perf_counter()
    options = _options(target)
    if quick_code and target.kind == "cpu":
        options = {**(options or {}), **QUICK_CODE}
    try:
        executable, extra_options = _compile(lowered, options)
    except Exception as error:
        needed = _memory_refusal(str(error))
        if needed is None:
            raise
        raise DoesNotFitError(*needed) from error
    compile_s = time.perf_counter() - start
    stats = executable.memory_analysis()
    compiled = Compiled(
        program_sha256=program_sha256,
        target=target.name,
        hlo=executable.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto(),
        memory=Memory(
            argument_bytes=stats.argument_size_in_bytes,
            output_bytes=stats.output_size_in_bytes,
            alias_bytes=stats.alias_size_in_bytes,
            temp_bytes=stats.temp_size_in_bytes,
        ),
        compile_s=compile_s,
        extra_options=extra_options,
    )
    return compiled, executable


def _own_options(target: Target) -> dict[str, str]:
    return {} if target.attached else _OPTIONS.get(target.kind, {})


def _options(target: Target) -> dict[str, Any] | None:
    return {**_own_options(target), **dict(target.options)} or None


def use_attached(kind: str) -> None:
    """Lets this process run on the machine's accelerator; call before JAX starts a backend."""
    import jax

    jax.config.update("jax_platforms", f"{_PLATFORM[kind]},cpu")


def _compile(lowered: Any, options: Mapping[str, Any] | None) -> tuple[Any, Mapping[str, Any]]:
    """Returns the executable, and what it needed beyond `options`."""
    with _no_persistent_cache():
        try:
            return lowered.compile(compiler_options=options), {}
        except Exception as error:
            if _NO_TILING not in str(error):
                raise
        options = {**(options or {}), **_WITHOUT_TRITON}
        return lowered.compile(compiler_options=options), _WITHOUT_TRITON


@contextlib.contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Keeps JAX's own cache of executables out, which `JAX_COMPILATION_CACHE_DIR` turns on.

    A program for a GPU that is not there is written to it and cannot be read back (JAX 0.10 to
    0.12), and the compile time of a record would be that of reading a file.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache

    if not jax.config.jax_compilation_cache_dir:
        yield
        return
    was_on = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", was_on)
        compilation_cache.reset_cache()


def check_fit(compiled: Compiled, target: Target) -> None:
    """Raises DoesNotFitError if the program's peak exceeds the device's memory."""
    available = chip_table()[target.chip].hbm_bytes
    if available is not None and compiled.memory.peak_bytes > available:
        raise DoesNotFitError(compiled.memory.peak_bytes, int(available))


# How XLA:TPU says that a program does not fit: libtpu 0.0.50, then 0.0.42.
_REFUSALS = (
    r"HLO temporaries \((?P<needed>[\d.]+[KMGT]?)\) exceeds available HBM "
    r"\((?P<there>[\d.]+[KMGT]?)\)",
    r"Used (?P<needed>[\d.]+[KMGT]?) of (?P<there>[\d.]+[KMGT]?) hbm",
)


def _memory_refusal(text: str) -> tuple[int, int] | None:
    """Reads (bytes needed, bytes available) out of the compiler's refusal, or None."""
    for pattern in _REFUSALS:
        if match := re.search(pattern, text):
            return _parse_bytes(match["needed"]), _parse_bytes(match["there"])
    return None


def _parse_bytes(text: str) -> int:
    unit = text[-1] if text[-1] in "KMGT" else ""
    return round(float(text.removesuffix(unit)) * 1024 ** " KMGT".index(unit or " "))


def apply_environment() -> None:
    """Sets the compilers' environment; call before the first import of JAX in a process."""
    os.environ.update(ENVIRONMENT)
