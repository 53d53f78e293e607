"""Seconds of one op from the chip's peaks alone: the signal that every chip has."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxbench.cost import OpCost
from jaxbench.target import Chip, Target, chip_table

# HLO's dtype names, as chips.toml names them.
DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f64": "float64",
    "s8": "int8",
    "f8e4m3fn": "float8_e4m3fn",
    "f8e5m2": "float8_e5m2",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """What one device can do; products by dtype, the rest elementwise."""

    product_flops: Mapping[str, float]
    vector_flops: float
    hbm_bytes_per_s: float
    launch_s: float


def device_peaks(target: Target, cpu_peaks: Mapping[str, float] | None) -> Peaks:
    """Returns the peaks of one device of the target; those of a CPU were measured on it."""
    chip = chip_table()[target.chip]
    if target.kind == "cpu":
        if cpu_peaks is None:
            raise ValueError("a CPU target needs the machine's measured peaks")
        share = 1 / target.num_devices  # fake devices share the cores
        products = {name: cpu_peaks[name] * share for name in ("float32", "bfloat16")}
        return Peaks(
            product_flops=products,
            vector_flops=math.inf,
            hbm_bytes_per_s=cpu_peaks["bytes_per_s"] * share,
            launch_s=0.0,
        )
    return Peaks(
        product_flops=_with_narrow(chip),
        vector_flops=chip.vector_flops or math.inf,
        hbm_bytes_per_s=(chip.hbm_bytes_per_s or math.inf) * chip.hbm_efficiency,
        launch_s=chip.launch_s,
    )


@functools.cache
def _with_narrow(chip: Chip) -> Mapping[str, float]:
    """float16 runs at the rate of bfloat16 on every chip of the table."""
    peaks = dict(chip.peak_flops)
    return {**peaks, "float16": peaks["bfloat16"]}


def product_peak(peaks: Peaks, hlo_dtype: str, target: Target) -> float:
    """Returns FLOP/s of products in a dtype of HLO.

    Raises:
      UnknownPeakError: if the chip has none.
    """
    dtype = DTYPES.get(hlo_dtype, hlo_dtype)
    if dtype not in peaks.product_flops:
        return chip_table()[target.chip].peak(dtype)
    return peaks.product_flops[dtype]


def roofline_s(op: OpCost, peaks: Peaks, target: Target) -> tuple[float, str]:
    """Returns seconds of one execution, and what bounds them: `compute`, `memory` or `launch`.

    t = max(padded product FLOPs / peak, elementwise FLOPs / vector peak, HBM bytes / bandwidth)
    + launch. Source: Williams et al., "Roofline", CACM 2009.
    """
    elementwise = sum(flops for _, flops in op.flops) - op.matmul_flops
    products = op.padded_flops - elementwise
    compute = products / product_peak(peaks, op.product_dtype, target) if products else 0.0
    memory = max(op.hbm_bytes / peaks.hbm_bytes_per_s, elementwise / peaks.vector_flops)
    terms = {"compute": compute, "memory": memory, "launch": peaks.launch_s}
    return max(compute, memory) + peaks.launch_s, max(terms, key=lambda name: terms[name])
