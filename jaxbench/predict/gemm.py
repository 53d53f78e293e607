"""Kernels on GPUs: library matrix products by tiles and waves, the rest by bandwidth.

Autotuned kernels are the reality: an ahead-of-time compile can time none and writes default tiles.
So a product is priced from its sizes, with the best tile of a menu. Constants are in gpu.toml.
"""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxbench.errors import UnknownPeakError
from jaxbench.target import Chip

# Rows and columns of a tile, as the kernels of cuBLAS and CUTLASS have them.
_TILES = (
    (64, 64),
    (64, 128),
    (128, 64),
    (64, 256),
    (256, 64),
    (128, 128),
    (128, 192),
    (192, 128),
    (128, 256),
    (256, 128),
)
_ITEM_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
# Into how many parts a kernel may cut k where its tiles leave cores idle.
_PARTS = (2, 4, 8, 16, 32, 64, 128)
# The tensor cores run both at one rate (vendor's datasheets of all five chips).
_SAME_RATE = {"float16": "bfloat16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Constants of library products on one chip in one dtype, fitted to measured ones.

    Attributes:
      start_s: Seconds of a kernel that multiplies nothing.
      rate: Share of its part of the peak that a core reaches within a tile.
      core_bytes_per_s: Operands that one core gets from the L2 cache; cores that share a tile's
        operands get more.
      tile_depth: Depth, in steps of k, that filling and emptying each wave's tiles costs.
      first_depth: The same, once a kernel.
      ceiling: Share of the peak that power and clock leave to the whole chip.
      bandwidth: Share of the memory's bandwidth that operands and result reach.
      overlap: How much of the shorter of computing and moving shows beside the longer.
      clustered_cores: Cores that whole clusters of 16 fill, where tiles are shared in clusters; 0
        where all cores take tiles.
    """

    start_s: float
    rate: float
    core_bytes_per_s: float
    tile_depth: float
    first_depth: float
    ceiling: float
    bandwidth: float
    overlap: float
    clustered_cores: int = 0


def product_s(m: int, n: int, k: int, *, batch: int = 1, dtype: str, chip: Chip) -> float:
    """Returns the seconds of a (batched) product [m, k] x [k, n] in an autotuned library kernel.

    Alone: what a step's power, gaps and collectives take is not in it.

    Args:
      dtype: NumPy name of the operands' dtype; float32 runs as TF32.

    Raises:
      UnknownPeakError: if the chip has no peak for the dtype or is none of gpu.toml's.
    """
    dtype = _SAME_RATE.get(dtype, dtype)
    chip.peak(dtype)  # an unknown dtype is refused before its constants are looked for
    return fitted_s(m, n, k, batch=batch, fit=_fit_of(chip.name, dtype), chip=chip, dtype=dtype)


def fitted_s(m: int, n: int, k: int, *, batch: int, fit: Fit, chip: Chip, dtype: str) -> float:
    """Returns the seconds of a product with given constants.

    t = start + max(c, b) + overlap * min(c, b), with b = bytes / (bandwidth * memory's) and c the
    least over the menu of tiles of

      max(step * (waves * (k + tile_depth) + first_depth), tiles' FLOPs / (ceiling * peak)),
      step = max(2 * rows * columns / (rate * peak / cores),
                 (rows + columns) * item / core_bytes_per_s).

    Waves are whole. Fewer tiles than cores may be cut along k, which writes the parts' sums and
    reads them in a second kernel. The bytes are those of each operand read and the result written
    once: that tiles read operands again is served by the L2 cache.
    """
    item = _ITEM_BYTES.get(dtype, 1)
    peak, cores = chip.peak(dtype), max(1, chip.num_cores)
    bandwidth = fit.bandwidth * (chip.hbm_bytes_per_s or math.inf)
    memory = batch * item * (m * k + k * n + m * n) / bandwidth
    compute = min(_tiled_s(m, n, k, batch, tile, fit, item, peak, cores) for tile in _TILES)
    if compute > fit.start_s:  # else a second kernel takes longer
        sums_s = 2 * 4 * batch * m * n / bandwidth
        cut = (
            _tiled_s(m, n, math.ceil(k / parts), batch * parts, tile, fit, item, peak, cores)
            + fit.start_s
            + parts * sums_s
            for tile in _TILES
            if _num_tiles(m, n, batch, tile) < cores
            for parts in _PARTS
        )
        compute = min((compute, *cut))
    return fit.start_s + max(compute, memory) + fit.overlap * min(compute, memory)


def _num_tiles(m: int, n: int, batch: int, tile: tuple[int, int]) -> int:
    return batch * math.ceil(m / tile[0]) * math.ceil(n / tile[1])


def _tiled_s(
    m: int,
    n: int,
    k: int,
    batch: int,
    tile: tuple[int, int],
    fit: Fit,
    item: int,
    peak: float,
    cores: int,
) -> float:
    """Seconds of all waves of one kind of tile: each step of k multiplies or waits for operands."""
    rows, columns = tile
    tiles = _num_tiles(m, n, batch, tile)
    multiply = 2 * rows * columns * cores / (fit.rate * peak)
    load = (rows + columns) * item / fit.core_bytes_per_s
    depth = _waves(tiles, cores, fit.clustered_cores) * (k + fit.tile_depth) + fit.first_depth
    # What a tile has beyond the edge is multiplied too, and takes power.
    return max(depth * max(multiply, load), 2 * tiles * rows * columns * k / (fit.ceiling * peak))


def _waves(tiles: int, cores: int, clustered: int) -> int:
    """Waves of tiles over the cores in whole clusters, or over all at the price of one wave."""
    spread = math.ceil(tiles / cores)
    return min(math.ceil(tiles / clustered), spread + 1) if clustered else spread


def kernel_s(hbm_bytes: float, *, vector_flops: float = 0.0, chip: Chip) -> float:
    """Returns the seconds of a kernel that is no product.

    t = max(bytes / (bandwidth * efficiency), FLOPs / vector peak) + launch. So the bandwidth
    reached falls with size, as bytes / (bytes + half) with half = launch * bandwidth: small kernels
    do not fill the memory's pipeline. That what the L2 cache still holds is read faster is not in
    it.
    """
    bandwidth = (chip.hbm_bytes_per_s or math.inf) * chip.hbm_efficiency
    return (
        max(hbm_bytes / bandwidth, vector_flops / (chip.vector_flops or math.inf)) + chip.launch_s
    )


@functools.cache
def _fit_of(chip: str, dtype: str) -> Fit:
    fits = _fits()
    if chip not in fits:
        raise UnknownPeakError(
            f"No constants of library products on chip {chip!r} (known: {', '.join(fits)}). "
            "Add them to gpu.toml with their source; benchmarks/fit_gemm.py fits them."
        )
    # A dtype that nobody has fitted runs on the same tensor cores.
    return Fit(**fits[chip].get(dtype, fits[chip]["bfloat16"]))


@functools.cache
def _fits() -> dict[str, dict[str, dict[str, Any]]]:
    text = resources.files("jaxbench.predict").joinpath("gpu.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
