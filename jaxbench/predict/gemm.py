"""Kernels on GPUs: library matrix products by tiles and waves, the rest by bandwidth.

Autotuned kernels are the reality: an ahead-of-time compile can time none and writes default tiles.
So a product is priced from its sizes, with the best tile of a menu.
"""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources

from jaxbench.target import Chip

# Rows and columns of a tile, as cuBLAS's and CUTLASS's kernels have them.
_TILES = ((64, 64), (128, 64), (64, 128), (128, 128), (128, 256), (256, 128))
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants of a chip and dtype, fitted to measured products.

    Attributes:
      start_s: Seconds of a kernel that does nothing.
      rate: Share of the peak that full waves of tiles reach.
      bandwidth: Share of the memory's bandwidth that operands and result reach.
      depth_start: Depth that filling and emptying a tile's pipeline costs.
      overlap: How much of the shorter of computing and moving shows beside the longer.
    """

    start_s: float
    rate: float
    bandwidth: float
    depth_start: float
    overlap: float


def product_s(m: int, n: int, k: int, *, batch: int = 1, dtype: str, chip: Chip) -> float:
    """Returns the seconds of a (batched) product [m, k] x [k, n] in an autotuned library kernel.

    Args:
      dtype: NumPy name of the operands' dtype; float32 runs as TF32.

    Raises:
      UnknownPeakError: if the chip has no peak for the dtype.
    """
    return fitted_s(m, n, k, batch=batch, fit=_fit_of(chip.name, dtype), chip=chip, dtype=dtype)


def fitted_s(m: int, n: int, k: int, *, batch: int, fit: Fit, chip: Chip, dtype: str) -> float:
    """Returns the seconds of a product with given constants.

    t = start + max(c, b) + overlap * min(c, b), with b = bytes / bandwidth and
    c = waves * tile FLOPs / (rate * peak / SMs), the least over the menu of tiles; a tile takes
    (k + depth_start) / k of its FLOPs, and the last wave is paid whole only as far as tiles are
    left: half of what it lacks is hidden by kernels that split or stream their work.
    """
    item = _ITEM_BYTES.get(dtype, 1)
    moved = batch * item * (m * k + k * n + m * n)
    memory = moved / (fit.bandwidth * (chip.hbm_bytes_per_s or math.inf))
    per_core = fit.rate * chip.peak(dtype) / max(1, chip.num_cores)
    compute = min(_tiles_s(m, n, k, batch, tile, per_core, fit, chip) for tile in _TILES)
    longer, shorter = max(compute, memory), min(compute, memory)
    return fit.start_s + longer + fit.overlap * shorter


# A narrower tile reads its operands more often from shared memory: share of the full rate.
_TILE_RATE = {8192: 0.83, 16384: 0.95, 32768: 1.0, 4096: 0.65}


def _tiles_s(
    m: int, n: int, k: int, batch: int, tile: tuple[int, int], per_core: float, fit: Fit, chip: Chip
) -> float:
    rows, columns = tile
    count = batch * math.ceil(m / rows) * math.ceil(n / columns)
    waves = count / max(1, chip.num_cores)
    paid = (waves + max(1.0, math.ceil(waves))) / 2
    flops = 2 * rows * columns * (k + fit.depth_start)
    return paid * flops / (per_core * _TILE_RATE[rows * columns])


def kernel_s(hbm_bytes: float, *, vector_flops: float = 0.0, chip: Chip) -> float:
    """Returns the seconds of a kernel that is no product.

    t = max(bytes / (bandwidth * efficiency), FLOPs / vector peak) + launch. Small kernels do not
    fill the memory's pipeline: the launch stands for what they lack.
    """
    bandwidth = (chip.hbm_bytes_per_s or math.inf) * chip.hbm_efficiency
    return (
        max(hbm_bytes / bandwidth, vector_flops / (chip.vector_flops or math.inf)) + chip.launch_s
    )


# Chips without measured products take the shares of another.
_LIKE = {"gpu-a100": "gpu-h100", "gpu-h200": "gpu-h100", "gpu-gb200": "gpu-b200"}


@functools.cache
def _fit_of(chip: str, dtype: str) -> Fit:
    fits = _fits()[_LIKE.get(chip, chip)]
    return Fit(**fits.get(dtype, fits["bfloat16"]))


@functools.cache
def _fits() -> dict[str, dict[str, dict[str, float]]]:
    text = resources.files("jaxbench.predict").joinpath("gemm.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
