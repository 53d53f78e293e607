"""Step times from what the compiled program does. Not yet validated against published step times.

Two signals are computed apart and never mixed in a comparison: `hlo`, our roofline over the priced
  ops, and `compiler`, the vendor's own cycles, which only XLA:TPU writes. The prediction is built
  from both and says
so: an op with the compiler's cycles takes them, any other its roofline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxbench.cost import Cost, OpCost
from jaxbench.errors import ImpossibleError
from jaxbench.network import collective_s
from jaxbench.signals import SIGNAL_ERROR
from jaxbench.target import Chip, Target, chip_table

# HLO's dtype names, as chips.toml names them.
_DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64"}

_ROUNDING = 1e-9

PREDICTOR = "sum-1"
STATUS = "not yet validated"


@dataclass(frozen=True, kw_only=True, slots=True)
class Peaks:
    """What one device can do; products by dtype, the rest elementwise."""

    product_flops: Mapping[str, float]
    vector_flops: float
    hbm_bytes_per_s: float
    launch_s: float
    clock_hz: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predicted seconds of one step, with what they are made of.

    Attributes:
      step_s: The larger of on-chip time and collective time: overlap is taken as perfect.
      low_s, high_s: `step_s` less the signal's error; on-chip plus collective time, plus the error.
      bound: The largest of the terms: `compute`, `memory`, `collective` or `launch`.
      mfu: Model FLOPs / (step_s x peak), between 0 and 1.
      terms: Seconds by what bounds each op; they add up to more than `step_s` where collectives
        hide.
      hlo_s: The roofline signal, of all ops. compiler_s: The compiler's cycles alone, or None.
    """

    step_s: float
    low_s: float
    high_s: float
    bound: str
    mfu: float
    terms: tuple[tuple[str, float], ...]
    hlo_s: float
    compiler_s: float | None
    built_from: str
    predictor: str = PREDICTOR
    status: str = STATUS


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
        hbm_bytes_per_s=chip.hbm_bytes_per_s or math.inf,
        launch_s=chip.launch_s,
        clock_hz=chip.clock_ghz * 1e9 if target.kind == "tpu" and chip.clock_ghz else None,
    )


def _with_narrow(chip: Chip) -> dict[str, float]:
    """float16 runs at the rate of bfloat16 on every chip of the table."""
    peaks = dict(chip.peak_flops)
    return {**peaks, "float16": peaks["bfloat16"]}


def predict_step(
    cost: Cost,
    target: Target,
    *,
    model_flops: float,
    dtype: str,
    cpu_peaks: Mapping[str, float] | None = None,
) -> Prediction:
    """Predicts the time of one step from what the compiled program does.

    t = max(sum over ops of t_op, sum over collectives of wire bytes / bandwidth), with
    t_op = the compiler's cycles / clock where it gives them, else
    max(product flops / peak, elementwise flops / vector peak, HBM bytes / bandwidth) + launch.

    Assumes that ops run one after the other and that collectives hide behind them; the interval's
    upper end assumes that none does. Ignores host input, latency of collectives, and what cost
    leaves unpriced.

    Args:
      cost: What one device does in one step, from `price_module`.
      target: Chip and topology.
      model_flops: FLOPs of the mathematics, per device, for the utilisation.
      dtype: Dtype that the workload names for its products.
      cpu_peaks: From `measure_peaks`; for CPU targets.

    Raises:
      UnknownPeakError: if the chip has no peak for a dtype or network that the program uses.
      ImpossibleError: if the prediction is faster than the chip's peak allows.

    Source: Williams et al., "Roofline", CACM 2009.
    """
    peaks = device_peaks(target, cpu_peaks)
    terms: dict[str, float] = dict.fromkeys(("compute", "memory", "launch"), 0.0)
    chip_s = hlo_s = cycles_s = 0.0
    for op in cost.ops:
        roofline_s, bound = _roofline(op, peaks, target)
        op_s = roofline_s
        if peaks.clock_hz and op.cycles is not None:
            op_s = op.cycles / peaks.clock_hz
            cycles_s += op_s
        terms[bound] += op_s
        chip_s += op_s
        hlo_s += roofline_s
    wire_s = sum(collective_s(size, group, target) for (_, group), size in cost.collective_bytes)
    terms["collective"] = wire_s
    step_s = max(chip_s, wire_s)
    signal = "compiler" if cycles_s else "hlo"
    error = SIGNAL_ERROR[signal]
    peak = max(peaks.product_flops.values()) if target.kind == "cpu" else peaks.product_flops[dtype]
    mfu = model_flops / (step_s * peak) if step_s else 0.0
    if mfu > 1 + _ROUNDING:
        raise ImpossibleError(
            f"A step of {step_s:.3g} s would use {mfu:.0%} of {target.chip}'s peak: a figure in "
            "chips.toml, the trip count of a loop or a rule is wrong. Please report the program."
        )
    return Prediction(
        step_s=step_s,
        low_s=step_s / error,
        high_s=(chip_s + wire_s) * error,
        bound=max(terms, key=lambda name: terms[name]),
        mfu=min(mfu, 1.0),
        terms=tuple(terms.items()),
        hlo_s=max(hlo_s, wire_s),
        compiler_s=max(cycles_s, wire_s) if cycles_s else None,
        built_from="compiler cycles, roofline where there are none"
        if cycles_s
        else "roofline of the priced ops",
    )


def _roofline(op: OpCost, peaks: Peaks, target: Target) -> tuple[float, str]:
    """Returns (seconds over all its executions, what bounds them)."""
    elementwise = sum(flops for _, flops in op.flops) - op.matmul_flops
    products = op.padded_flops - elementwise
    compute = products / _product_peak(peaks, op.product_dtype, target) if products else 0.0
    vector = elementwise / peaks.vector_flops
    memory = op.hbm_bytes / peaks.hbm_bytes_per_s
    launch = peaks.launch_s * op.count
    terms = {"compute": compute, "memory": max(memory, vector), "launch": launch}
    bound = max(terms, key=lambda name: terms[name])
    return max(compute, vector, memory) + launch, bound


def _product_peak(peaks: Peaks, hlo_dtype: str, target: Target) -> float:
    dtype = _DTYPES.get(hlo_dtype, hlo_dtype)
    if dtype not in peaks.product_flops:
        return chip_table()[target.chip].peak(dtype)
    return peaks.product_flops[dtype]
