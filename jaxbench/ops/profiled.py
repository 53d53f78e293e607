"""One candidate's step on the attached device, op by op. Runs inside a worker of its own."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.compiler import compiled_key, unpack_compiled
from jaxbench.cost import price_module
from jaxbench.errors import MeasureError
from jaxbench.evaluate import evaluate, open_stepper
from jaxbench.hlo import read_module
from jaxbench.ops import StepOps, join_ops, list_ops
from jaxbench.predict import predict_ops
from jaxbench.target import Target, chip_table, parse_target
from jaxbench.trace import read_trace, record_trace

_WARM_STEPS, _TRIAL_STEPS = 2, 3
_MIN_STEPS, _MAX_STEPS = 4, 200


def measure_ops(
    *,
    described: Mapping[str, Any],
    layout: str,
    target: str,
    logdir: str,
    options: tuple[tuple[str, Any], ...] = (),
    attached: bool = False,
    cpu_peaks: Mapping[str, float] | None = None,
    seconds: float = 1.5,
) -> dict[str, Any]:
    """Compiles, profiles about `seconds` of steps and joins them with their cost.

    Args:
      described: From `discovery.describe_candidates`.
      layout, target, options, attached: As for `evaluate`; the target can run here.
      logdir: Where the raw trace stays, for XProf.
      cpu_peaks: From `measure_peaks`, needed on CPU targets.
      seconds: Of profiled steps.

    Returns:
      JSON-ready: the record's `values`, `ops` (of `StepOps`), `trace`, `plain_step_s` (each step
      before and after, without the profiler) and `profiled_step_s`.

    Raises:
      MeasureError: with the stage that failed.
    """
    asked = {
        "described": described,
        "layout": layout,
        "target": target,
        "options": options,
        "attached": attached,
    }
    values = evaluate(**asked, cpu_peaks=cpu_peaks, keep=True)
    if "failure" in values:
        raise MeasureError(f"{values['failure']['stage']}: {values['failure']['text']}")
    stepper = open_stepper(**asked)
    trace, times = _profile(stepper, Path(logdir), seconds)
    ops = price_trace(
        trace,
        program_sha256=values["program_sha256"],
        target=dataclasses.replace(parse_target(target), options=options, attached=attached),
        cpu_peaks=cpu_peaks,
    )
    return {"values": values, "ops": ops.to_json(), "trace": str(trace), **times}


def price_trace(
    trace: Path, *, program_sha256: str, target: Target, cpu_peaks: Mapping[str, float] | None
) -> StepOps:
    """Joins a trace with the cost of the program that it is of, which the cache holds.

    Raises:
      MeasureError: if the trace or the program is not there.
    """
    packed = cache.read_entry("compiled", compiled_key(program_sha256, target))
    if packed is None:
        raise MeasureError(
            f"The compiled program {program_sha256[:12]} is not in the cache. Measure it again."
        )
    module = read_module(unpack_compiled(packed).hlo)
    cost = price_module(module, mxu=chip_table()[target.chip].mxu)
    listed = list_ops(predict_ops(cost, target, cpu_peaks=cpu_peaks), module)
    return join_ops(read_trace(trace, module=module.name), listed)


def _profile(stepper: Any, logdir: Path, seconds: float) -> tuple[Path, dict[str, Any]]:
    """(trace, step times without and with the profiler)."""
    stepper.chain(steps=_WARM_STEPS)
    trial = stepper.chain(steps=_TRIAL_STEPS)
    num_steps = math.ceil(seconds / (trial.seconds / trial.steps))
    num_steps = min(_MAX_STEPS, max(_MIN_STEPS, num_steps))
    chains = []

    def run(steps: int) -> None:
        chains.append(stepper.chain(steps=steps))

    run(num_steps)
    trace = record_trace(run, num_steps, logdir)
    run(num_steps)
    before, profiled, after = (chain.seconds / chain.steps for chain in chains)
    return trace, {"plain_step_s": [before, after], "profiled_step_s": profiled}
