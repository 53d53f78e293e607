"""The main job: candidates through compilers, each result recorded as soon as it is there."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.attached import attach
from jaxbench.compiler import versions_for
from jaxbench.discovery import family_modules
from jaxbench.errors import CandidateError, Failure, LayoutError, UsageError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.machine import processor
from jaxbench.measure.session import Timed, time_together
from jaxbench.record import Record, append_record, read_records, record_id
from jaxbench.stats import median_s
from jaxbench.suite import DEFAULT_TARGETS, Part, Suite, load_suite, suite_names
from jaxbench.target import Target, missing_compiler, parse_target
from jaxbench.worker import Job, call_in_worker, run_jobs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one worker may take, how many run side by side, and how long is timed.

    Attributes:
      measure_s: Wall seconds of timing, for each candidate and control of a session.
      budget_s: Of a whole session, in place of that.
      precision: Half the width of a ratio's interval at which a session ends before.
      logdir: Where to keep profiles of what is timed; None makes none.
      calibrated: Correct predictions for this machine by what `calibrate` kept.
    """

    num_workers: int = 2
    limit_s: float = 1800.0
    limit_bytes: int = 12 * 2**30
    measure_s: float = 2.0
    budget_s: float | None = None
    precision: float = 0.005
    logdir: Path | None = None
    calibrated: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One record to be made."""

    described: Mapping[str, Any]
    layout: str
    target: Target
    measured: bool
    versions: Mapping[str, str]
    profiled: bool = False

    @property
    def id(self) -> str:
        """The record's id."""
        how = "profiled" if self.profiled else self.measured
        return record_id(self.described, self.layout, self.target.name, self.versions, how)


def run_named(
    what: Sequence[str],
    *,
    out: Path,
    targets: Sequence[str] | None,
    layout: str | None,
    measure: bool,
    limits: Limits,
    progress: Progress,
    together: bool = False,
) -> list[Record]:
    """Runs suites, files and candidates by name, and returns the records of all that was asked.

    Args:
      what: Names of suites, paths of candidate files, or names or patterns of candidates.
      out: Folder of the records.
      targets: In place of the suites' own, or of the default ones.
      layout: In place of the suites' own, or of `data`.
      measure: Also time steps on attached targets, where a suite does not say so itself.
      together: Time all candidates in one session, the first named as its base; else rivals are.

    Raises:
      UsageError: if something named does not exist or cannot be.
    """
    check_writable(out)
    for target in targets or ():
        parse_target(target)
    files = [name for name in what if name.endswith(".py")]
    for name in files:
        if not Path(name).is_file():
            raise UsageError(
                f"No file {name!r} here. Give the path of a Python file with a tuple CANDIDATES."
            )
    suites = [load_suite(name) for name in what if name in suite_names()]
    names = [name for name in what if name not in files and name not in suite_names()]
    paths = [str(Path(name).resolve()) for name in files]
    own = describe(paths, limits)
    parts = [part for suite in suites for part in suite.parts]
    chosen = tuple(names) or tuple(one["name"] for one in own)
    asked = [*chosen, *(name for part in parts for name in part.candidates)]
    described = [*describe(families_of([*asked, *(one["name"] for one in own)]), limits), *own]
    _refuse_doubles(described)
    if chosen:
        parts.append(Part(candidates=chosen, targets=DEFAULT_TARGETS))
    parts = [
        dataclasses.replace(
            part, targets=tuple(targets or part.targets), layout=layout or part.layout
        )
        for part in parts
    ]
    timed = tuple(name for suite in suites for name in suite.measure)
    requests = plan(
        Suite(name=out.name, about="", parts=tuple(parts), measure=timed),
        described,
        measure=measure,
    )
    requests = [_with_limits(request, limits) for request in requests]
    run(requests, out, limits, progress, together=together)
    ids = {request.id for request in requests}
    return [record for record in read_records(out) if record.id in ids]


def _with_limits(request: Request, limits: Limits) -> Request:
    """What of the limits makes another record of it."""
    request = dataclasses.replace(request, profiled=request.measured and bool(limits.logdir))
    if not limits.calibrated or request.target.kind != "cpu":
        return request
    key = cache.key_of(_calibration())[:12]
    return dataclasses.replace(request, versions={**request.versions, "calibration": key})


def _calibration() -> dict[str, Any]:
    from jaxbench.ops.calibration import find_calibration

    return find_calibration().to_json()


def families_of(patterns: Sequence[str]) -> list[str]:
    """Returns the modules of the shipped families that names or patterns of candidates begin with.

    Reading a family imports it, so only those are read that can hold what is asked for.
    """
    prefixes = {pattern.split("-")[0] for pattern in patterns}
    return [
        module
        for module in family_modules()
        if any(fnmatch.fnmatchcase(module.rpartition(".")[2], prefix) for prefix in prefixes)
    ]


def _refuse_doubles(described: Sequence[Mapping[str, Any]]) -> None:
    seen: dict[str, str] = {}
    for one in described:
        if one["name"] in seen:
            raise CandidateError(
                f"{one['module']} and {seen[one['name']]} both name a candidate {one['name']!r}. "
                f"Rename yours."
            )
        seen[one["name"]] = one["module"]


def check_writable(out: Path) -> None:
    """Raises StorageError now rather than after the first compile."""
    with cache.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def describe(sources: Sequence[str], limits: Limits | None = None) -> list[dict[str, Any]]:
    """Describes the candidates of families or files; each user's file is read in its own worker.

    Raises:
      CandidateError: if a file cannot be used.
    """
    shipped = [source for source in sources if source.startswith("jaxbench.")]
    groups = ([shipped] if shipped else []) + [
        [source] for source in sources if source not in shipped
    ]
    described: list[dict[str, Any]] = []
    limits = limits or Limits()
    for group in groups:
        job = Job(
            name=group[0],
            function="jaxbench.discovery:describe_candidates",
            arguments={"sources": group},
            limit_s=limits.limit_s,
            limit_bytes=limits.limit_bytes,
        )
        ((_, result),) = run_jobs([job], num_workers=1)
        if isinstance(result, Failure):
            text = result.text
            if result.error != "CandidateError":
                text = f"{', '.join(group)} cannot be read: {text}"
            raise CandidateError(text)
        described += result
    return described


def plan(suite: Suite, described: Sequence[Mapping[str, Any]], *, measure: bool) -> list[Request]:
    """Lists what a suite asks for: each of its candidates on each of its targets.

    Raises:
      UsageError: if a name matches no candidate, a target's compiler is missing, or steps shall be
        timed and no target is attached.
    """
    requests = []
    targets = _targets(suite, measure=measure)
    for part in suite.parts:
        layout = parse_layout(part.layout)
        for candidate in part.select(described):
            for name in part.targets:
                target = targets[name]
                requests.append(
                    Request(
                        described=candidate,
                        layout=_resolved(layout, target),
                        target=target,
                        measured=(measure or name in suite.measure) and target.can_run,
                        versions=versions_for(target),
                    )
                )
    return list({request.id: request for request in requests}.values())


def _targets(suite: Suite, *, measure: bool) -> dict[str, Target]:
    """Returns the suite's targets by the names it gives them; those to be timed are attached."""
    targets = {name: parse_target(name) for part in suite.parts for name in part.targets}
    for target in targets.values():
        _require_compiler(target)
    timed = [name for name in targets if measure or name in suite.measure]
    if timed:
        # What a suite times by itself it times where it can; what the user asks for is needed.
        found = attach([targets[name] for name in timed], needed=measure)
        targets.update(zip(timed, found, strict=True))
    return targets


def _require_compiler(target: Target) -> None:
    missing = missing_compiler(target.kind)
    if missing:
        raise UsageError(f"Cannot compile for {target.name}: {missing}.")


def _resolved(layout: Any, target: Target) -> str:
    try:
        return resolve_layout(layout, target.num_devices).name
    except LayoutError as error:
        raise UsageError(str(error)) from error


def run(
    requests: Sequence[Request],
    out: Path,
    limits: Limits,
    progress: Progress,
    *,
    together: bool = False,
) -> tuple[int, int]:
    """Makes the records that are missing in `out`, target by target.

    Returns:
      (records made now, records that were there).

    Raises:
      StorageError: if a record cannot be written; what was written before stays.
    """
    known = {record.id: record for record in read_records(out) if not record.is_lost}
    missing = [request for request in requests if request.id not in known]
    already = len(requests) - len(missing)
    if not missing:
        return 0, already
    on_cpu = next((request.target for request in missing if request.target.kind == "cpu"), None)
    peaks = cpu_peaks(on_cpu) if on_cpu else None
    order = {request.target.name: index for index, request in reversed(list(enumerate(requests)))}
    missing.sort(key=lambda request: order[request.target.name])
    num_jobs = len(missing) + sum(request.measured for request in missing)
    done, priced = 0, {}
    for request, result in _run(missing, _evaluate_job, peaks, limits):
        done += 1
        if request.measured and not _failed(result):
            priced[request.id] = result
        else:
            append_record(out, _record(request, result))
        progress(_title(request), done, num_jobs)
    to_time = [request for request in missing if request.id in priced]
    timed_before = [one for one in requests if one.id in known and known[one.id].measurement]
    for group in _sessions(to_time, together=together):
        base = _base_again(group, timed_before, together=together)
        _time(group, base, priced, out, limits, lambda what, at=done: progress(what, at, num_jobs))
        done += len(group)
        progress("timed", done, num_jobs)
    return len(missing), already


def _sessions(requests: Sequence[Request], *, together: bool) -> list[list[Request]]:
    """Groups requests that are timed against each other, each group's base first."""
    groups: dict[tuple[str, ...], list[Request]] = {}
    for request in requests:
        rivals = "" if together else request.described["base"]
        groups.setdefault((request.target.name, request.layout, rivals), []).append(request)
    if not together:
        for group in groups.values():
            group.sort(key=lambda one: one.described["name"] != one.described["base"])
    return list(groups.values())


def _base_again(
    group: Sequence[Request], timed_before: Sequence[Request], *, together: bool
) -> Request | None:
    """Returns the base of a group that was timed on another day, if it was."""
    base = timed_before[0].described["name"] if together and timed_before else ""
    return next(
        (
            request
            for request in timed_before
            if request.described["name"] == (base or group[0].described["base"])
            and (request.target, request.layout) == (group[0].target, group[0].layout)
        ),
        None,
    )


def _time(
    group: Sequence[Request],
    base: Request | None,
    priced: Mapping[str, dict[str, Any]],
    out: Path,
    limits: Limits,
    progress: Callable[[str], None],
) -> None:
    """Times one session and records it, also if Ctrl-C ends it.

    Args:
      base: Timed with the group once more, as times of two sessions tell little; its record stays
        as it is, and what it took now stands in the records of the others.

    Raises:
      KeyboardInterrupt: after the records of a session that it ended.
    """
    everyone = [base, *group] if base else list(group)
    names = " and ".join(request.described["name"] for request in group)
    budget_s = limits.budget_s or limits.measure_s * (len(everyone) + 2)
    started = time.monotonic()
    timed, interrupted = time_together(
        [_stepper_job(request, limits) for request in everyone],
        budget_s=budget_s,
        precision=limits.precision,
        progress=lambda spent_s: progress(f"timing {names}: {spent_s:.0f} of {budget_s:.0f} s"),
    )
    share_s = (time.monotonic() - started) / len(group)
    if base:
        again, *timed = timed
        timed = [_with_base(given, base, again) for given in timed]
    if limits.logdir and not interrupted:
        timed = _profiled(group, timed, limits, limits.logdir, progress)
    for request, given in zip(group, timed, strict=True):
        if interrupted and not (given.measurement or given.failure):
            continue
        append_record(out, _record(request, _measured(request, priced[request.id], given, share_s)))
    if interrupted:
        raise KeyboardInterrupt


def _with_base(given: Timed, base: Request, again: Timed) -> Timed:
    """Adds to a measurement what its base took in the same rounds."""
    if not (given.measurement and again.measurement):
        return given
    base_again = {"id": base.id, "chains": again.measurement["chains"]}
    return dataclasses.replace(given, measurement={**given.measurement, "base_again": base_again})


def _profiled(
    group: Sequence[Request],
    timed: Sequence[Timed],
    limits: Limits,
    logdir: Path,
    progress: Callable[[str], None],
) -> list[Timed]:
    """Adds to each measurement the profile of some more steps, op by op; or how that failed."""
    found = []
    for request, given in zip(group, timed, strict=True):
        if given.measurement:
            name = request.described["name"]
            progress(f"profiling {name}")
            job = profile_job(request, limits, cpu_peaks(request.target), logdir=logdir)
            ((_, result),) = run_jobs([job], num_workers=1)
            ops = {"failure": result.to_json()} if isinstance(result, Failure) else result
            ops.pop("values", None)
            given = dataclasses.replace(given, measurement={**given.measurement, "ops": ops})
        found.append(given)
    return found


def profile_job(request: Request, limits: Limits, peaks: Any, *, logdir: Path) -> Job:
    """Returns the job that profiles a request's step on the attached device, op by op."""
    folder = logdir / request.described["name"]
    arguments = {**_arguments(request, peaks), "logdir": str(folder)}
    return _job(request, "jaxbench.ops.profiled:measure_ops", arguments, limits)


def _measured(
    request: Request, result: dict[str, Any], timed: Timed, share_s: float
) -> dict[str, Any]:
    """Adds what was timed to what was priced."""
    timings = dict(result["timings"])
    timings["measure_s"] = timings.get("measure_s", 0.0) + share_s
    timings["worker_s"] = timings.get("worker_s", 0.0) + share_s
    result = {**result, "timings": timings, "measurement": timed.measurement}
    if timed.failure:
        result["failure"] = timed.failure.to_json()
    elif timed.measurement:
        step_s = median_s(timed.measurement["samples_s"])
        result["samples_per_s"] = request.described["workload"]["global_batch"] / step_s
        result["samples_per_s_from"] = "measurement"
    return result


def _run(
    requests: Sequence[Request],
    job_of: Callable[[Request, Any, Limits], Job],
    peaks: Any,
    limits: Limits,
) -> Iterator[tuple[Request, Any]]:
    jobs = [job_of(request, peaks, limits) for request in requests]
    of_job = {id(job): request for job, request in zip(jobs, requests, strict=True)}
    for job, result in run_jobs(jobs, num_workers=limits.num_workers):
        yield of_job[id(job)], result


def _failed(result: Any) -> bool:
    return isinstance(result, Failure) or "failure" in result


def _title(request: Request) -> str:
    return f"{request.described['name']} on {request.target.name}"


def _evaluate_job(request: Request, peaks: Any, limits: Limits) -> Job:
    arguments = {**_arguments(request, peaks), "keep": request.measured}
    if "calibration" in request.versions:
        arguments["calibration"] = _calibration()
    job = _job(request, "jaxbench.evaluate:evaluate", arguments, limits)
    # An attached accelerator's compiler times kernels on it.
    return dataclasses.replace(job, alone=request.target.attached)


def _stepper_job(request: Request, limits: Limits) -> Job:
    arguments = _arguments(request, None)
    del arguments["cpu_peaks"]
    name = request.described["name"]
    job = _job(request, "jaxbench.evaluate:open_stepper", arguments, limits)
    return dataclasses.replace(job, name=name)


def _arguments(request: Request, peaks: Any) -> dict[str, Any]:
    return {
        "described": dict(request.described),
        "layout": request.layout,
        "target": request.target.name,
        "options": request.target.options,
        "attached": request.target.attached,
        "cpu_peaks": peaks,
    }


def _job(request: Request, function: str, arguments: dict[str, Any], limits: Limits) -> Job:
    return Job(
        name=_title(request),
        function=function,
        arguments=arguments,
        limit_s=limits.limit_s,
        limit_bytes=limits.limit_bytes,
    )


def cpu_peaks(target: Target) -> dict[str, float]:
    """Returns this machine's measured peaks, from the cache if it has been asked before."""
    key = cache.key_of(
        platform.machine(), processor(), os.cpu_count(), versions_for(target)["jaxlib"]
    )
    known = cache.read_entry("peaks", key)
    if known is None:
        peaks = call_in_worker("jaxbench.measure.peaks:measure_peaks")
        cache.write_entry("peaks", key, json.dumps(peaks).encode())
        return peaks
    return json.loads(known)


def _record(request: Request, result: Any) -> Record:
    described = request.described
    if isinstance(result, Failure):
        result = {"failure": result.to_json()}
    result.pop("mathematics", None)
    return Record(
        id=request.id,
        candidate=described["name"],
        **{
            key: described[key]
            for key in ("family", "size", "base", "replaces", "validity", "source")
        },
        source_sha256=described["source_sha256"],
        config=described["config"],
        workload=described["workload"],
        layout=request.layout,
        target=request.target.name,
        num_devices=request.target.num_devices,
        versions=request.versions,
        **result,
    )
