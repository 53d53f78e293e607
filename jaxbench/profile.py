"""The predicted step of a record, written for the tools that people read profiles with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxbench import cache
from jaxbench.compiler import COMPILED_ON, compiled_key, unpack_compiled
from jaxbench.cost import price_module
from jaxbench.errors import UsageError
from jaxbench.hlo import read_module
from jaxbench.predict import simulate_step
from jaxbench.record import Record
from jaxbench.report.perfetto import write_trace
from jaxbench.report.xspace import write_xspace
from jaxbench.target import chip_table, parse_target


def profile_record(record: Record, logdir: Path) -> dict[str, Path]:
    """Simulates the step of a compiled record and writes it for XProf and for Perfetto.

    Returns:
      The files, by `xspace` and `trace`.

    Raises:
      UsageError: for a CPU target, whose steps are timed and not simulated, or if the compiled
        program is not in the cache any more.
      StorageError: if a file cannot be written.
    """
    target = dataclasses.replace(
        parse_target(record.target), attached=COMPILED_ON in record.versions
    )
    if target.kind == "cpu":
        raise UsageError(
            f"{record.target} is no target to simulate: its ops overlap on threads. Name a TPU or "
            "GPU, such as tpu-v5p:2x2x1."
        )
    key = compiled_key(record.program_sha256 or "", target)
    packed = cache.read_entry("compiled", key)
    if packed is None:
        raise UsageError(
            f"The compiled program of {record.candidate} on {record.target} is not in the cache. "
            "Give another --out, and it is compiled again."
        )
    module = read_module(unpack_compiled(packed).hlo)
    cost = price_module(module, mxu=chip_table()[target.chip].mxu)
    timeline = simulate_step(cost, target)
    name = f"{record.candidate}@{record.target}".replace(":", "_").replace("*", "_")
    trace = logdir / f"{name}.trace.json.gz"
    with cache.storage_errors(logdir):
        return {
            "xspace": write_xspace(timeline, name=name, target=target, logdir=logdir),
            "trace": write_trace(timeline, name=name, path=trace),
        }
