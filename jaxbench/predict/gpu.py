"""Seconds of one op on a GPU: library products by tiles and waves, the rest by bandwidth."""

from __future__ import annotations

from jaxbench.cost import OpCost
from jaxbench.predict.gemm import kernel_s, product_s
from jaxbench.predict.roofline import DTYPES
from jaxbench.target import Chip


def op_s(op: OpCost, chip: Chip) -> tuple[float, str]:
    """Returns seconds of one execution on the main stream, and what bounds them.

    A product takes what an autotuned kernel of its sizes takes, whatever tiles the compiler, which
    could time none, has written. What is fused to it overlaps. Within a step kernels keep only the
    chip's `sustained` share of their speed alone: power, gaps, and what NCCL takes of the cores.
    """
    seconds, bound = _alone(op, chip)
    return seconds / chip.sustained, bound


def _alone(op: OpCost, chip: Chip) -> tuple[float, str]:
    elementwise = sum(flops for _, flops in op.flops) - op.matmul_flops
    memory = kernel_s(op.hbm_bytes, vector_flops=elementwise, chip=chip)
    if not op.matmul_flops:
        return memory, "launch" if memory < 2 * chip.launch_s else "memory"
    batch, rows, columns, depth = op.sizes
    if op.target.startswith("__cudnn$fmha"):
        return _attention_s(op, chip), "compute"
    dtype = DTYPES.get(op.product_dtype, op.product_dtype)
    one = product_s(rows, columns, depth, batch=batch, dtype=dtype, chip=chip)
    # A fusion of several products: the largest is priced, the others take as much a FLOP.
    compute = one * max(1.0, op.matmul_flops / (2 * batch * rows * columns * depth))
    return max(compute, memory), "compute" if compute >= memory else "memory"


def _attention_s(op: OpCost, chip: Chip) -> float:
    """cuDNN's attention at a share of the peak, less where heads are narrow or going back.

    Fitted to published forward times of cuDNN on H100 (heads of 64 and 128, 512 to 16384 tokens).
    Source: Shah et al., "FlashAttention-3", 2024, figures 5 and 6; backward passes run at four
    fifths of the forward ones.
    """
    depth = op.sizes[-1]
    share = chip.kernel_efficiency * min(1.0, (depth / _FULL_HEAD) ** _NARROWING)
    share *= _BACKWARD if "Backward" in op.target else 1.0
    peak = chip.peak(DTYPES.get(op.product_dtype, op.product_dtype))
    return op.matmul_flops / (peak * share) + chip.launch_s


_FULL_HEAD, _NARROWING, _BACKWARD = 128, 0.58, 0.8
