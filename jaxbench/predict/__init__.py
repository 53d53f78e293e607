"""Step times from what the compiled program does, on a simulated device.

Two signals are computed apart and never mixed in a comparison: `hlo`, our roofline over the priced
ops, and `compiler`, the vendor's own cycles, which only XLA:TPU writes. The prediction is built
from both and says so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from jaxbench.cost import Cost, Loop, OpCost, Step
from jaxbench.errors import ImpossibleError
from jaxbench.network import collective_s, host_copy_s, place_group
from jaxbench.predict import gpu, tpu
from jaxbench.predict.interval import error_factor, kind_of
from jaxbench.predict.roofline import Peaks, device_peaks, roofline_s
from jaxbench.predict.schedule import simulate
from jaxbench.predict.timeline import Timeline
from jaxbench.target import Target, chip_table

_ROUNDING = 1e-9

PREDICTOR = "timeline-1"

Rate = Callable[[OpCost], tuple[float, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """Predicted seconds of one step, with what they are made of.

    Attributes:
      step_s: The end of the simulated step.
      low_s, high_s: `step_s` divided and multiplied by the factor within which nine of ten
        published steps on such chips lie.
      bound: The largest of the terms.
      mfu: Model FLOPs / (step_s x peak), between 0 and 1.
      terms: Seconds of compute that are bound by `compute`, `memory` or `launch`, and those in
        which compute waits for a `collective`, for a `dma` copy on the chip or for the `host`; they
        add up to `step_s`.
      hlo_s: The roofline signal: the same schedule with every op at its roofline. compiler_s: The
        same with the compiler's cycles alone, or None where it writes none.
      kind: What most of its work is: `products`, `convolutions` or `kernels`.
      status: On what the interval rests.
    """

    step_s: float
    low_s: float
    high_s: float
    bound: str
    mfu: float
    terms: tuple[tuple[str, float], ...]
    hlo_s: float
    compiler_s: float | None
    kind: str
    built_from: str
    status: str
    predictor: str = PREDICTOR


def simulate_step(
    cost: Cost, target: Target, *, cpu_peaks: Mapping[str, float] | None = None
) -> Timeline:
    """Simulates one step: every op at its predicted rate, in the compiler's order.

    Args:
      cost: What one device does in one step, from `price_module`.
      target: Chip and topology.
      cpu_peaks: From `measure_peaks`; for CPU targets.

    Raises:
      UnknownPeakError: if the chip has no figure for a dtype or network that the program uses.
    """
    rate = _rate(target, device_peaks(target, cpu_peaks))
    return simulate(cost.steps, lambda op: _op_s(op, target, rate))


def predict_ops(
    cost: Cost, target: Target, *, cpu_peaks: Mapping[str, float] | None = None
) -> list[tuple[OpCost, float, str]]:
    """Predicts each op of a step alone.

    Args:
      cost: What one device does in one step, from `price_module`.
      target: Chip and topology.
      cpu_peaks: From `measure_peaks`; for CPU targets.

    Returns:
      (op, seconds of one execution, what bounds them) in the order of `cost.ops`, which hold the
      totals of all executions; bounds are the names of `Prediction.terms`.

    Raises:
      UnknownPeakError: if the chip has no figure for a dtype or network that the program uses.
    """
    rate = _rate(target, device_peaks(target, cpu_peaks))
    found = []
    for total, one in zip(cost.ops, _each_op(cost.steps), strict=True):
        bound = one.stream if one.stream in ("collective", "host") else rate(one)[1]
        found.append((total, _op_s(one, target, rate), bound))
    return found


def _each_op(steps: Iterable[Step]) -> Iterator[OpCost]:
    """One execution of each op, in the order of `Cost.ops`."""
    for step in steps:
        if isinstance(step, OpCost):
            yield step
        elif isinstance(step, Loop):
            yield from _each_op(step.steps)


def predict_step(
    cost: Cost,
    target: Target,
    *,
    model_flops: float,
    dtype: str,
    cpu_peaks: Mapping[str, float] | None = None,
) -> Prediction:
    """Predicts the time of one step from what the compiled program does.

    t = end of the simulated schedule. On a TPU an op takes the compiler's cycles, where there are
    any, on a GPU what a model of kernels fitted to measured ones says, else its roofline.
    Collectives take what their algorithm takes on the links that their groups cross.

    Ignores host input and what cost leaves unpriced.

    Args:
      cost: What one device does in one step, from `price_module`.
      target: Chip and topology.
      model_flops: FLOPs of the mathematics, per device, for the utilisation.
      dtype: Dtype that the workload names for its products.
      cpu_peaks: From `measure_peaks`; for CPU targets.

    Raises:
      UnknownPeakError: if the chip has no peak for a dtype or network that the program uses.
      ImpossibleError: if the prediction is faster than the chip's peak allows.
    """
    peaks = device_peaks(target, cpu_peaks)
    rate = _rate(target, peaks)
    timeline = simulate(cost.steps, lambda op: _op_s(op, target, rate))
    hlo = simulate(
        cost.steps, lambda op: _op_s(op, target, lambda one: roofline_s(one, peaks, target))
    )
    step_s = timeline.step_s
    terms = _terms(timeline, rate)
    kind = kind_of(cost)
    error, status = error_factor(target.chip, kind)
    has_cycles = any(op.cycles is not None for op in cost.ops)
    return Prediction(
        step_s=step_s,
        low_s=step_s / error,
        high_s=step_s * error,
        bound=max(terms, key=lambda name: terms[name]),
        mfu=_utilisation(model_flops, step_s, dtype, peaks, target),
        terms=tuple(terms.items()),
        hlo_s=hlo.step_s,
        compiler_s=_cycles_s(cost, target) if has_cycles else None,
        kind=kind,
        status=status,
        built_from=_BUILT_FROM["tpu" if has_cycles else target.kind],
    )


_BUILT_FROM = {
    "tpu": "schedule with the compiler's cycles, roofline where there are none",
    "gpu": "schedule with kernels fitted to measured ones",
    "cpu": "roofline of the priced ops",
}


def _rate(target: Target, peaks: Peaks) -> Rate:
    """Returns the function that prices what runs on the core."""
    chip = chip_table()[target.chip]
    if target.kind == "tpu":
        return lambda op: tpu.op_s(op, peaks, target, chip)
    if target.kind == "gpu":
        return lambda op: gpu.op_s(op, chip)
    return lambda op: roofline_s(op, peaks, target)


def _op_s(op: OpCost, target: Target, rate: Rate) -> float:
    """Seconds of one execution, wherever it runs."""
    if op.collective:
        group = place_group(op.groups, op.pairs, target)
        sent_s = collective_s(op.collective, op.buffer_bytes, group, target)
        # A product in the same fusion runs while its pieces are sent.
        return max(sent_s, rate(op)[0]) if op.matmul_flops else sent_s
    if op.stream == "host":
        return host_copy_s(op.host_bytes, target)
    return rate(op)[0]


def _cycles_s(cost: Cost, target: Target) -> float:
    """The schedule with the compiler's cycles alone; what has none takes no time on the core."""
    clock_hz = (chip_table()[target.chip].clock_ghz or 0.0) * 1e9

    def rate(op: OpCost) -> tuple[float, str]:
        return (op.cycles or 0) / clock_hz, ""

    return simulate(cost.steps, lambda op: _op_s(op, target, rate)).step_s


def _terms(timeline: Timeline, rate: Rate) -> dict[str, float]:
    terms: defaultdict[str, float] = defaultdict(float)
    terms.update(dict.fromkeys(("compute", "memory", "launch"), 0.0))
    for event in timeline.events:
        if event.stream == "compute":
            terms[rate(event.op)[1]] += event.total_s
    for stream, seconds in timeline.exposed_s:
        terms[stream] += seconds
    return dict(terms)


def _utilisation(
    model_flops: float, step_s: float, dtype: str, peaks: Peaks, target: Target
) -> float:
    peak = max(peaks.product_flops.values()) if target.kind == "cpu" else peaks.product_flops[dtype]
    mfu = model_flops / (step_s * peak) if step_s else 0.0
    if mfu > 1 + _ROUNDING:
        raise ImpossibleError(
            f"A step of {step_s:.3g} s would use {mfu:.0%} of {target.chip}'s peak: a figure in "
            "chips.toml, the trip count of a loop or a rule is wrong. Please report the program."
        )
    return min(mfu, 1.0)
