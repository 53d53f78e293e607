"""How large candidates are: parameters, and FLOPs of one sample's forward pass.

Nothing is compiled. Sizes follow from a candidate's code and configuration alone, so they are kept
in the cache.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxbench import cache
from jaxbench.errors import Failure
from jaxbench.run import Progress
from jaxbench.worker import Job, run_jobs

_JOB_SIZE = 8  # candidates a job: few enough that progress moves, enough to import a family once


def size_candidates(
    described: Sequence[Mapping[str, Any]], progress: Progress, *, num_workers: int = 2
) -> list[dict[str, Any]]:
    """Adds `num_params` and `forward_flops` (of one sample) to descriptions of candidates.

    Where a candidate cannot be traced both are None.
    """
    sizes = {one["name"]: _recall(one) for one in described}
    missing = [one for one in described if sizes[one["name"]] is None]
    jobs = [_job(group) for group in _groups(missing)]
    done = len(described) - len(missing)
    for job, result in run_jobs(jobs, num_workers=num_workers):
        names = job.arguments["names"]
        done += len(names)
        if not isinstance(result, Failure):
            sizes.update(result)
        progress(f"{names[0]} and others of its family", done, len(described))
    for one in missing:
        _keep(one, sizes[one["name"]])
    unknown = {"num_params": None, "forward_flops": None}
    return [{**one, **(sizes[one["name"]] or unknown)} for one in described]


def count_sizes(*, source: str, names: list[str]) -> dict[str, dict[str, int]]:
    """Counts in a worker; see `program.count_forward`."""
    from jaxbench.discovery import load_candidate
    from jaxbench.program import count_forward

    return {name: count_forward(load_candidate(source, name)) for name in names}


def _groups(described: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    by_source: dict[str, list[Mapping[str, Any]]] = {}
    for one in described:
        by_source.setdefault(one["module"], []).append(one)
    return [
        group[start : start + _JOB_SIZE]
        for group in by_source.values()
        for start in range(0, len(group), _JOB_SIZE)
    ]


def _job(group: Sequence[Mapping[str, Any]]) -> Job:
    names = [one["name"] for one in group]
    return Job(
        name=names[0],
        function="jaxbench.sizes:count_sizes",
        arguments={"source": group[0]["module"], "names": names},
    )


def _key(one: Mapping[str, Any]) -> str:
    versions = [importlib.metadata.version(package) for package in ("jax", "flax")]
    return cache.key_of(one["name"], one["config"], one["workload"], one["source_sha256"], versions)


def _recall(one: Mapping[str, Any]) -> dict[str, int] | None:
    known = cache.read_entry("sizes", _key(one))
    return None if known is None else json.loads(known)


def _keep(one: Mapping[str, Any], size: Mapping[str, int] | None) -> None:
    if size is not None:
        cache.write_entry("sizes", _key(one), json.dumps(size).encode())
