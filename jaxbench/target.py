"""Targets: a chip and a topology, parsed from names such as `tpu-v5e:4x4`. Imports no JAX."""

from __future__ import annotations

import functools
import importlib.metadata
import math
import platform
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from jaxbench.errors import UnknownPeakError, UsageError

_NAME = re.compile(r"(?P<chip>[a-z0-9-]+)(:(?P<dims>\d+(x\d+)*)(\*(?P<slices>\d+))?)?")
_COMPILER = {"cpu": "jaxlib", "tpu": "libtpu", "gpu": "jax-cuda12-plugin"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chip:
    """One row of chips.toml. Numbers are of one JAX device; see the file for units and sources."""

    name: str
    kind: Literal["cpu", "tpu", "gpu"]
    peak_flops: tuple[tuple[str, float], ...] = ()
    hbm_bytes: float | None = None
    hbm_bytes_per_s: float | None = None
    hbm_efficiency: float = 1.0
    kernel_efficiency: float = 0.5
    sustained: float = 1.0
    clock_ghz: float | None = None
    cycle_scale: float = 1.0
    devices_per_chip: int = 1
    topology_name: str = ""
    topology_dims: int = 1
    max_topology: tuple[int, ...] = ()
    host_bounds: tuple[int, ...] = ()
    mxu: int = 1
    link_bytes_per_s: float | None = None
    num_links: int = 1
    link_efficiency: float = 1.0
    all_reduce_efficiency: float = 1.0
    core_link_bytes_per_s: float | None = None
    collective_s: float = 0.0
    network_bytes_per_s: float | None = None
    network_efficiency: float = 1.0
    network_latency_s: float = 20e-6
    host_bytes_per_s: float | None = None
    description: str = ""
    compute_capability: tuple[int, int] = (0, 0)
    vector_flops: float | None = None
    num_cores: int = 0
    fpus_per_core: int = 0
    l2_bytes: int = 0
    shared_bytes_per_core: int = 0
    shared_bytes_optin: int = 0
    gpus_per_host: int = 1
    launch_s: float = 0.0

    def peak(self, dtype: str) -> float:
        """Returns dense FLOP/s of one device for products in `dtype`."""
        peaks = dict(self.peak_flops)
        if dtype not in peaks:
            known = ", ".join(peaks) or "none"
            raise UnknownPeakError(
                f"No peak for dtype {dtype} on chip {self.name!r} (known: {known}). "
                "Add it to chips.toml with its source."
            )
        return peaks[dtype]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """A chip and how many of them stand how.

    Attributes:
      chip: Name in chips.toml.
      topology: Chips along each axis of the torus (TPU), (hosts, GPUs a host), or (devices,) on the
        CPU.
      num_slices: Slices joined by the data-centre network (TPU).
      options: Compiler options beyond those that jaxbench gives for every such chip.
      attached: Whether it is the accelerator of this machine, which compiles for itself and runs.
    """

    chip: str
    topology: tuple[int, ...]
    num_slices: int = 1
    options: tuple[tuple[str, Any], ...] = ()
    attached: bool = False

    @property
    def name(self) -> str:
        """Canonical name, which parses to the same target."""
        if self.num_chips == 1:
            return self.chip
        dims = self.topology[1:] if self.kind == "gpu" and self.topology[0] == 1 else self.topology
        slices = f"*{self.num_slices}" if self.num_slices > 1 else ""
        return f"{self.chip}:{'x'.join(map(str, dims))}{slices}"

    @property
    def kind(self) -> Literal["cpu", "tpu", "gpu"]:
        """Which of the three compilers it takes."""
        return chip_table()[self.chip].kind

    @property
    def can_run(self) -> bool:
        """Whether steps can be timed on it here."""
        return self.attached or self.kind == "cpu"

    @property
    def num_chips(self) -> int:
        """Chips in all slices."""
        return math.prod(self.topology) * self.num_slices

    @property
    def num_devices(self) -> int:
        """JAX devices in all slices."""
        return self.num_chips * chip_table()[self.chip].devices_per_chip


@functools.cache
def chip_table() -> dict[str, Chip]:
    """Reads chips.toml."""
    text = resources.files("jaxbench").joinpath("chips.toml").read_text(encoding="utf-8")
    return {name: _chip(name, row) for name, row in tomllib.loads(text).items()}


def _chip(name: str, row: dict) -> Chip:
    frozen: dict[str, Any] = {
        key: tuple(value.items())
        if isinstance(value, dict)
        else tuple(value)
        if isinstance(value, list)
        else value
        for key, value in row.items()
    }
    return Chip(name=name, **frozen)


def parse_target(text: str) -> Target:
    """Parses `chip[:topology][*slices]`; a bare chip is one chip.

    Raises:
      UsageError: if the chip is unknown or no such topology is built.
    """
    match = _NAME.fullmatch(text.strip())
    chips = chip_table()
    chip = chips.get(match["chip"]) if match else None
    if match is None or chip is None:
        raise UsageError(
            f"Unknown target {text!r}. Chips: {', '.join(chips)}. "
            "Write chip:topology, such as tpu-v5e:4x4, tpu-v6e:16x16*2, gpu-h100:8, gpu-h100:4x8 "
            "or cpu:8."
        )
    dims = tuple(int(dim) for dim in (match["dims"] or "").split("x") if dim)
    num_slices = int(match["slices"] or 1)
    if any(dim < 1 for dim in (*dims, num_slices)):
        raise UsageError(f"Target {text!r} has a zero in its topology: each axis needs at least 1.")
    check = {"tpu": _tpu_topology, "gpu": _gpu_topology, "cpu": _cpu_topology}[chip.kind]
    return Target(
        chip=chip.name, topology=check(text, chip, dims, num_slices), num_slices=num_slices
    )


def _tpu_topology(text: str, chip: Chip, dims: tuple[int, ...], num_slices: int) -> tuple[int, ...]:
    one = (1,) * chip.topology_dims
    if dims in ((), one, (1,)) and num_slices == 1:
        return one
    shape = "x".join("ABC"[: chip.topology_dims])
    limits = "x".join(map(str, chip.max_topology))
    if len(dims) != chip.topology_dims:
        raise UsageError(
            f"Target {text!r} has {len(dims)} axes, but {chip.name} has {shape}, at most {limits}."
        )
    if any(dim > limit for dim, limit in zip(sorted(dims), sorted(chip.max_topology), strict=True)):
        raise UsageError(f"Target {text!r} is larger than the largest {chip.name} slice, {limits}.")
    if any(dim % bound for dim, bound in zip(dims, chip.host_bounds, strict=True)):
        hosts = "x".join(map(str, chip.host_bounds))
        raise UsageError(
            f"Target {text!r} is not made of whole hosts: each holds {hosts} chips, so each axis "
            f"is a multiple of "
            f"that. Or write {chip.name} for one chip."
        )
    return dims


def _gpu_topology(text: str, chip: Chip, dims: tuple[int, ...], num_slices: int) -> tuple[int, ...]:
    if num_slices > 1 or len(dims) > 2:
        raise UsageError(
            f"Target {text!r} is no GPU topology. Write {chip.name}:GPUS or {chip.name}:HOSTSxGPUS."
        )
    hosts, gpus = (1, *dims)[-2:] if dims else (1, 1)
    if gpus > chip.gpus_per_host:
        raise UsageError(
            f"Target {text!r} puts {gpus} GPUs into one host, which holds at most "
            f"{chip.gpus_per_host}. "
            f"Write {chip.name}:HOSTSx{chip.gpus_per_host}."
        )
    return hosts, gpus


def _cpu_topology(text: str, chip: Chip, dims: tuple[int, ...], num_slices: int) -> tuple[int, ...]:
    if num_slices > 1 or len(dims) > 1:
        raise UsageError(f"Target {text!r} is no CPU topology. Write cpu or cpu:DEVICES.")
    return dims or (1,)


def missing_compiler(kind: str) -> str | None:
    """Returns why targets of this kind cannot be compiled for here and how to get them, or None."""
    package = _COMPILER[kind]
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        pass
    else:
        return None
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        here = f"{platform.system()} {platform.machine()}"
        return f"{package} exists for Linux x86-64 only, this is {here}"
    return f"{package} is not installed; get it with: pip install 'jaxbench[{kind}]'"
