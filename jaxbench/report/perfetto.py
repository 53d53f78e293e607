"""The simulated step as a Chrome trace, which Perfetto and chrome://tracing open."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxbench.predict.timeline import STREAMS, Event, Timeline
from jaxbench.report.xspace import MAX_EVENTS, category, starts

_US = 1e6


def write_trace(timeline: Timeline, *, name: str, path: Path) -> Path:
    """Writes one track a stream and one of module scopes; gzipped if the name ends in .gz.

    Beyond 300,000 events only the first iterations of each loop are written.
    """
    executions = sum(event.count for event in timeline.events)
    limit = None if executions <= MAX_EVENTS else MAX_EVENTS // max(1, len(timeline.events))
    tracks = {stream: number for number, stream in enumerate((*STREAMS, "module"), 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"predicted: {name}"}},
        *(
            {"ph": "M", "name": "thread_name", "pid": 1, "tid": number, "args": {"name": stream}}
            for stream, number in tracks.items()
        ),
    ]
    for event in timeline.events:
        events += _slices(event, tracks[event.stream], tracks["module"], limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).encode()
    path.write_bytes(gzip.compress(text, 6) if path.suffix == ".gz" else text)
    return path


def _slices(event: Event, track: int, modules: int, limit: int | None) -> Iterator[dict[str, Any]]:
    op = event.op
    figures = {
        "category": category(op),
        "scope": op.scope,
        "flops": sum(count for _, count in op.flops),
        "hbm_bytes": op.hbm_bytes,
        "collective_bytes": op.collective_bytes,
    }
    for start_s in starts(event, limit):
        slice_of = {"ph": "X", "pid": 1, "ts": start_s * _US, "dur": event.duration_s * _US}
        yield {**slice_of, "tid": track, "name": op.name, "args": figures}
        if event.stream == "compute" and op.scope:
            yield {**slice_of, "tid": modules, "name": op.scope}
