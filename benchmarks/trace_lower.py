"""Times tracing and lowering the step of every base at published size. Run by hand.

    python benchmarks/trace_lower.py [NAME...]

Each in a worker of its own, as `run` does, on an abstract mesh of 16 TPU chips, one after the
other. Prints one line a candidate: wall seconds and the process's CPU seconds, which other work on
the machine changes less; then how many stay under the goal.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from jaxbench.discovery import describe_candidates, family_modules
from jaxbench.errors import Failure
from jaxbench.worker import Job, run_jobs

GOAL_S = 3.0
NUM_DEVICES = 16


def trace(*, module: str, name: str) -> dict[str, Any]:
    """Traces and lowers in a worker."""
    from jax.sharding import AbstractMesh, AxisType

    from jaxbench.discovery import load_candidate
    from jaxbench.layout import Layout
    from jaxbench.program import build_program

    candidate = load_candidate(module, name)
    layout = Layout(axes=(("data", NUM_DEVICES),))
    mesh = AbstractMesh((NUM_DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    cpu = time.process_time()
    program = build_program(candidate, layout, mesh, "tpu")
    return {
        "trace_s": program.trace_s,
        "lower_s": program.lower_s,
        "cpu_s": time.process_time() - cpu,
    }


def main() -> None:
    wanted = sys.argv[1:]
    described = [
        one
        for one in describe_candidates(family_modules())
        if (one["name"] in wanted if wanted else one["size"] == "paper" and not one["replaces"])
    ]
    jobs = [
        Job(
            name=one["name"],
            function="trace_lower:trace",
            arguments={"module": one["module"], "name": one["name"]},
        )
        for one in described
    ]
    wall, cpu = [], []
    for job, result in run_jobs(jobs, num_workers=1):
        if isinstance(result, Failure):
            sys.exit(f"{job.name}: {result.text}")
        wall.append(result["trace_s"] + result["lower_s"])
        cpu.append(result["cpu_s"])
        print(f"{job.name:40} wall {wall[-1]:6.2f} s, CPU {cpu[-1]:6.2f} s", flush=True)
    for kind, values in (("wall", wall), ("CPU", cpu)):
        within = sum(value <= GOAL_S for value in values)
        print(f"{kind}: {within} of {len(values)} within {GOAL_S:g} s, at most {max(values):.2f} s")


if __name__ == "__main__":
    main()
