"""The main job: candidates through compilers, each result appended to the records as soon as it is there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.compiler import versions_for
from jaxbench.errors import CandidateError, Failure, JaxbenchError, LayoutError, UsageError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.record import Record, append_record, read_records, record_id
from jaxbench.suite import Suite
from jaxbench.target import Target, missing_compiler, parse_target
from jaxbench.worker import Job, call_in_worker, run_jobs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one worker may take, and how many run side by side."""

    num_workers: int = 2
    limit_s: float = 1800.0
    limit_bytes: int = 12 * 2**30
    measure_s: float = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One record to be made."""

    described: Mapping[str, Any]
    layout: str
    target: Target
    measured: bool
    versions: Mapping[str, str]

    @property
    def id(self) -> str:
        """The record's id."""
        return record_id(self.described, self.layout, self.target.name, self.versions, self.measured)


def describe(sources: Sequence[str]) -> list[dict[str, Any]]:
    """Describes the candidates of families or files; each of the user's files is read in its own worker.

    Raises:
      CandidateError: if a file cannot be used.
    """
    shipped = [source for source in sources if source.startswith("jaxbench.")]
    groups = ([shipped] if shipped else []) + [[source] for source in sources if source not in shipped]
    described: list[dict[str, Any]] = []
    for group in groups:
        try:
            described += call_in_worker("jaxbench.discovery:describe_candidates", sources=group)
        except JaxbenchError as error:
            raise CandidateError(str(error)) from error
    return described


def plan(suite: Suite, described: Sequence[Mapping[str, Any]], *, measure: bool) -> list[Request]:
    """Lists what a suite asks for: each of its candidates on each of its targets.

    Raises:
      UsageError: if a name matches no candidate, or a target's compiler is missing.
    """
    requests = []
    for part in suite.parts:
        layout = parse_layout(part.layout)
        for candidate in part.select(described):
            for name in part.targets:
                target = parse_target(name)
                _require_compiler(target)
                requests.append(
                    Request(
                        described=candidate,
                        layout=_resolved(layout, target),
                        target=target,
                        measured=(measure or name in suite.measure) and target.kind == "cpu",
                        versions=versions_for(target),
                    )
                )
    return list({request.id: request for request in requests}.values())


def _require_compiler(target: Target) -> None:
    missing = missing_compiler(target.kind)
    if missing:
        raise UsageError(f"Cannot compile for {target.name}: {missing}.")


def _resolved(layout: Any, target: Target) -> str:
    try:
        return resolve_layout(layout, target.num_devices).name
    except LayoutError as error:
        raise UsageError(str(error)) from error


def run(requests: Sequence[Request], out: Path, limits: Limits, progress: Progress) -> tuple[int, int]:
    """Makes the records that are missing in `out`, most expensive compilers first.

    Returns:
      (records made now, records that were there).

    Raises:
      StorageError: if a record cannot be written; what was written before stays.
    """
    known = {record.id for record in read_records(out)}
    missing = [request for request in requests if request.id not in known]
    append_nothing = len(requests) - len(missing)
    if not missing:
        return 0, append_nothing
    peaks = _cpu_peaks(missing)
    jobs = {job.name: (job, request) for job, request in _jobs(missing, peaks, limits)}
    done = 0
    for job, result in _run(jobs.values(), limits):
        request = jobs[job.name][1]
        append_record(out, _record(request, result))
        done += 1
        progress(job.name, done, len(missing))
    return done, append_nothing


def _run(jobs: Iterable[tuple[Job, Request]], limits: Limits) -> Iterator[tuple[Job, Any]]:
    yield from run_jobs([job for job, _ in jobs], num_workers=limits.num_workers)


def _jobs(requests: Sequence[Request], peaks: Any, limits: Limits) -> Iterator[tuple[Job, Request]]:
    order = {"tpu": 0, "gpu": 1, "cpu": 2}
    for request in sorted(requests, key=lambda request: order[request.target.kind]):
        name = f"{request.described['name']} on {request.target.name}" + (", timed" if request.measured else "")
        arguments = {
            "described": dict(request.described),
            "layout": request.layout,
            "target": request.target.name,
            "cpu_peaks": peaks,
            "measure_s": limits.measure_s if request.measured else None,
        }
        yield (
            Job(
                name=f"{name} [{request.id}]",
                function="jaxbench.evaluate:evaluate",
                arguments=arguments,
                limit_s=limits.limit_s,
                limit_bytes=limits.limit_bytes,
                alone=request.measured,
            ),
            request,
        )


def _cpu_peaks(requests: Sequence[Request]) -> dict[str, float] | None:
    """Returns this machine's measured peaks, from the cache if it has been asked before."""
    if not any(request.target.kind == "cpu" for request in requests):
        return None
    key = cache.key_of(platform.machine(), _processor(), os.cpu_count(), requests[0].versions["jaxlib"])
    known = cache.read_entry("peaks", key)
    if known is None:
        peaks = call_in_worker("jaxbench.measure:measure_peaks")
        cache.write_entry("peaks", key, json.dumps(peaks).encode())
        return peaks
    return json.loads(known)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def _record(request: Request, result: Any) -> Record:
    described = request.described
    if isinstance(result, Failure):
        result = {"failure": result.to_json()}
    result.pop("mathematics", None)
    return Record(
        id=request.id,
        candidate=described["name"],
        **{key: described[key] for key in ("family", "size", "base", "replaces", "validity", "source")},
        source_sha256=described["source_sha256"],
        config=described["config"],
        workload=described["workload"],
        layout=request.layout,
        target=request.target.name,
        num_devices=request.target.num_devices,
        versions=request.versions,
        **result,
    )
