"""Seconds of one op on a TPU: the compiler's own cycles where it gives them."""

from __future__ import annotations

from jaxbench.cost import OpCost
from jaxbench.predict.roofline import Peaks, product_peak, roofline_s
from jaxbench.target import Chip, Target


def op_s(op: OpCost, peaks: Peaks, target: Target, chip: Chip) -> tuple[float, str]:
    """Returns seconds of one execution on the core, and what bounds them.

    t = cycles / clock * scale where XLA:TPU wrote an estimate, the scale fitted to published steps
    of the chip; flash attention's kernels, for which it has
    none, run at a share of the peak that was fitted; all else takes its roofline.
    """
    seconds, bound = roofline_s(op, peaks, target)
    if op.cycles is not None and chip.clock_ghz:
        return op.cycles / (chip.clock_ghz * 1e9) * chip.cycle_scale, bound
    if op.target == "tpu_custom_call" and op.matmul_flops:
        peak = product_peak(peaks, op.product_dtype, target)
        return op.padded_flops / (peak * chip.kernel_efficiency), "compute"
    return seconds, bound
