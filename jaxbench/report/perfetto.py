"""The simulated step as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench.predict.timeline import STREAMS, Timeline
from jaxbench.report.executions import (
    MAX_EVENTS,
    Executions,
    category,
    expand,
    iteration_limit,
    split_scope,
)

_PS_PER_US = 1e6
_FAST = 1  # gzip's level: traces repeat themselves, and the highest gains little


def write_trace(timeline: Timeline, *, name: str, path: Path) -> Path:
    """Writes one track a stream and one of module scopes; gzipped if the name ends in .gz.

    Above 300,000 events the iterations of loops are merged, which keeps all totals, and names say
    so.
    """
    limit = iteration_limit(timeline, MAX_EVENTS)
    executions = expand(timeline, limit)
    title = name if limit is None else f"{name} (loops merged to {limit} iterations)"
    tracks = {stream: number for number, stream in enumerate((*STREAMS, "module"), 1)}
    named = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"predicted: {title}"}}]
    named += [
        {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": track}}
        for track, number in tracks.items()
    ]
    rows = [json.dumps(row) for row in named]
    for one in executions:
        rows += _slices(one, tracks[one.event.stream])
    rows += _scopes(executions, tracks["module"])
    text = '{"displayTimeUnit": "ms", "traceEvents": [\n' + ",\n".join(rows) + "\n]}"
    data = text.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, _FAST) if path.suffix == ".gz" else data)
    return path


def _slices(one: Executions, track: int) -> Iterator[str]:
    op = one.event.op
    figures: dict[str, Any] = {
        "category": category(op),
        "scope": op.scope,
        "flops": sum(count for _, count in op.flops) * one.merged,
        "hbm_bytes": op.hbm_bytes * one.merged,
        "collective_bytes": op.collective_bytes * one.merged,
    }
    rest = f'"name": {json.dumps(one.title)}, "args": {json.dumps(figures)}'
    for start, end in zip(one.starts_ps.tolist(), one.ends_ps.tolist(), strict=True):
        yield _slice(start, end, track, rest)


def _slice(start_ps: int, end_ps: int, track: int, rest: str) -> str:
    ts, dur = start_ps / _PS_PER_US, (end_ps - start_ps) / _PS_PER_US
    return f'{{"ph": "X", "pid": 1, "tid": {track}, "ts": {ts:.6f}, "dur": {dur:.6f}, {rest}}}'


def _scopes(executions: Sequence[Executions], track: int) -> Iterator[str]:
    """Nested slices of the scopes on the core; one lasts as long as ops in it follow."""
    compute = [one for one in executions if one.event.stream == "compute"]
    if not compute:
        return
    parts = [split_scope(one.event.op.scope) for one in compute]
    starts = np.concatenate([one.starts_ps for one in compute])
    ends = np.concatenate([one.ends_ps for one in compute])
    owners = np.repeat(np.arange(len(compute)), [len(one.starts_ps) for one in compute])
    order = np.argsort(starts, kind="stable")
    opened: list[tuple[str, int]] = []
    last_end, last_owner = 0, -1
    for start, end, owner in zip(
        starts[order].tolist(), ends[order].tolist(), owners[order].tolist(), strict=True
    ):
        if last_owner < 0 or parts[owner] != parts[last_owner]:
            yield from _close(opened, _common(opened, parts[owner]), last_end, track)
            opened += [(part, start) for part in parts[owner][len(opened) :]]
        last_end, last_owner = end, owner
    yield from _close(opened, 0, last_end, track)


def _common(opened: list[tuple[str, int]], parts: list[str]) -> int:
    """How many scopes from the outside stay open."""
    depth = 0
    while depth < min(len(opened), len(parts)) and opened[depth][0] == parts[depth]:
        depth += 1
    return depth


def _close(opened: list[tuple[str, int]], depth: int, end: int, track: int) -> Iterator[str]:
    """Ends the scopes beyond `depth`, innermost first."""
    while len(opened) > depth:
        name, start = opened.pop()
        yield _slice(start, end, track, f'"name": {json.dumps(name)}')
