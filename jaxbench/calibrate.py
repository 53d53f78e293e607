"""Calibrating for the attached device: steps profiled op by op, laws fitted, errors held out.

A profile is one JSON line in `DIR/ops.jsonl`, appended as soon as it is there; started again, only
what is missing is profiled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxbench.discovery import family_modules
from jaxbench.errors import Failure, UsageError
from jaxbench.lines import append_line, read_lines
from jaxbench.machine import describe_environment
from jaxbench.ops import StepOps
from jaxbench.ops.calibration import (
    Calibration,
    HeldOut,
    Sample,
    fit_calibration,
    held_out,
    keep_calibration,
)
from jaxbench.run import Limits, Request, cpu_peaks, describe, families_of, profile_job
from jaxbench.suite import Part
from jaxbench.target import parse_target
from jaxbench.worker import run_jobs

FILE_NAME = "ops.jsonl"
_LEAST = 4  # candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRun:
    """What a calibration rests on and how good it is.

    Attributes:
      samples: The profiled steps.
      errors: On the half of them that a fit on the other half did not see.
      failures: (candidate, what failed).
    """

    calibration: Calibration
    samples: tuple[Sample, ...]
    errors: HeldOut
    failures: tuple[tuple[str, str], ...]

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values, without the ops."""
        return {
            "calibration": self.calibration.to_json(),
            "held_out": asdict(self.errors),
            "steps": {sample.name: sample.ops.step_s for sample in self.samples},
            "failures": dict(self.failures),
        }


def calibrate(
    what: Sequence[str], *, out: Path, limits: Limits, progress: Callable[[str, int, int], None]
) -> CalibrationRun:
    """Profiles candidates on the attached CPU, fits its calibration and keeps it in the cache.

    Args:
      what: Names or patterns of candidates and paths of files; the bases of size `cpu` if empty.
      out: Folder of the profiles; the raw ones lie below `trace`.

    Raises:
      UsageError: if fewer than four steps could be profiled.
    """
    chosen = _choose(what, limits)
    known = _read(out)
    missing = [one for one in chosen if one["name"] not in known]
    target = parse_target("cpu")
    requests = [
        Request(described=one, layout="data=1", target=target, measured=True, versions={})
        for one in missing
    ]
    peaks = cpu_peaks(target)
    jobs = [profile_job(request, limits, peaks, logdir=out / "trace") for request in requests]
    failures = []
    for number, (job, result) in enumerate(run_jobs(jobs, num_workers=1), start=1):
        name = requests[jobs.index(job)].described["name"]
        if isinstance(result, Failure):
            failures.append((name, result.text))
        else:
            append_line(out / FILE_NAME, {"candidate": name, **result})
        progress(f"profiling {name}", number, len(jobs))
    known = _read(out)
    names = [one["name"] for one in chosen if one["name"] in known]
    if len(names) < _LEAST:
        reason = failures[0][1] if failures else "too few were named"
        raise UsageError(
            f"{len(names)} steps profiled, {_LEAST} are needed to fit and to hold out: {reason}. "
            "Name more candidates, or none for the bases of size cpu."
        )
    samples = tuple(Sample(name=name, ops=StepOps.from_json(known[name]["ops"])) for name in names)
    calibration = fit_calibration(samples, fingerprint=describe_environment("cpu")["fingerprint"])
    keep_calibration(calibration)
    return CalibrationRun(
        calibration=calibration,
        samples=samples,
        errors=held_out(samples),
        failures=tuple(failures),
    )


def _choose(what: Sequence[str], limits: Limits) -> list[Mapping[str, Any]]:
    files = [str(Path(name).resolve()) for name in what if name.endswith(".py")]
    names = tuple(name for name in what if not name.endswith(".py"))
    if not what:
        described = describe(family_modules(), limits)
        return [one for one in described if one["size"] == "cpu" and one["base"] == one["name"]]
    own = describe(files, limits)
    described = [*describe(families_of(names), limits), *own] if names else own
    asked = names or tuple(one["name"] for one in own)
    return Part(candidates=asked, targets=("cpu",)).select(described)


def _read(out: Path) -> dict[str, dict[str, Any]]:
    return {values["candidate"]: values for values in read_lines(out / FILE_NAME)}
