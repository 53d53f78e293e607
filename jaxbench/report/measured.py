"""What a session of timing found, as tables: steps, ratios, controls, doubts."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxbench.compare import Comparison, Controls, compare_to_first, read_controls
from jaxbench.ops import StepOps
from jaxbench.record import Record
from jaxbench.report.ops import ops_tables
from jaxbench.report.tables import Table
from jaxbench.stats import Interval, median_s


def measured_tables(records: Sequence[Record], comparisons: Sequence[Comparison]) -> list[Table]:
    """Returns the tables of `measure`."""
    timed = [record for record in records if record.measurement]
    tables = [_step_table(timed)]
    if comparisons:
        tables.append(_ratio_table(comparisons))
    if timed:
        tables.append(_control_table(timed))
    tables += _doubt_tables(timed)
    for record in timed:
        tables += _profile_tables(record)
    return tables


def session_tables(records: Sequence[Record]) -> list[Table]:
    """Returns the tables of every session in a folder of records, each base first."""
    tables = []
    for group in sessions_of(records):
        tables += measured_tables(group, compare_to_first(group))
    return tables


def sessions_of(records: Sequence[Record]) -> list[list[Record]]:
    """Returns what was timed, by session, each base first."""
    sessions: dict[str, list[Record]] = {}
    for record in records:
        name = (record.measurement or {}).get("session")
        if name:
            sessions.setdefault(name, []).append(record)
    return [
        sorted(group, key=lambda record: record.candidate != (record.measurement or {})["base"])
        for group in sessions.values()
    ]


def _profile_tables(record: Record) -> list[Table]:
    """Where a profiled step's time went."""
    profiled = (record.measurement or {}).get("ops")
    if not profiled:
        return []
    if "failure" in profiled:
        text = profiled["failure"]["text"]
        return [Table(title=f"{record.candidate} was not profiled", header=(text,), rows=())]
    found = StepOps.from_json(profiled["ops"])
    return [
        dataclasses.replace(table, title=f"{record.candidate}: {table.title}")
        for table in ops_tables(found, depth=3, top=12)
    ]


def _step_table(records: Sequence[Record]) -> Table:
    rows = []
    for record in records:
        measured = record.measurement or {}
        longs = [row for row in measured["chains"] if row[1] > 1]
        prediction = (record.prediction or {}).get("step_s")
        rows.append(
            (
                record.candidate,
                _milliseconds(median_s(measured["samples_s"])) if longs else "-",
                _milliseconds(prediction),
                _milliseconds(measured["first_step_s"]),
                _milliseconds(median_s([row[3] / row[1] for row in longs]) if longs else None),
                f"{(record.compiled or {})['compile_s']:.1f}",
                f"{measured['memory']['resident_bytes'] / 2**20:,.0f}",
                str(len(longs)),
            )
        )
    notes = [_session_note(records[0].measurement or {})] if records else []
    return Table(
        title="Steps, timed on this machine",
        header=(
            "candidate",
            "step ms",
            "predicted ms",
            "first step ms",
            "host dispatch ms",
            "compile s",
            "process MiB",
            "chains",
        ),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _session_note(measured: Mapping[str, Any]) -> str:
    environment, energy = measured["environment"], measured["energy"]
    spent = ", ".join(f"{name} {joules:.3g} J" for name, joules in energy["joules"].items())
    return (
        f"{environment['device']} on {environment['processor']}, {environment['cores']} cores. "
        f"{measured['timed_s']:.0f} of {measured['wall_s']:.0f} s in timed chains, ended: "
        f"{measured['ended']}. Energy: {spent or 'absent (' + energy['missing'] + ')'}."
    )


def _ratio_table(comparisons: Sequence[Comparison]) -> Table:
    rows = []
    for comparison in comparisons:
        ratio = comparison.ratio("measured")
        winner = comparison.winner
        rows.append(
            (
                comparison.second,
                "-" if ratio is None else f"{ratio.ratio:.4f}",
                "-" if ratio is None else f"{ratio.low:.4f} to {ratio.high:.4f}",
                f"{winner} is faster" if winner else f"{comparison.verdict}: {comparison.reason}",
            )
        )
    return Table(
        title=f"Step time over that of {comparisons[0].first}",
        header=("candidate", "ratio", "95 % interval", "verdict"),
        rows=tuple(rows),
    )


def _control_table(records: Sequence[Record]) -> Table:
    measured = records[0].measurement or {}
    controls = read_controls(measured["controls"])
    return Table(
        title="Controls: what the session found where the answer is known",
        header=("control", "right answer", "found", "99 % interval", ""),
        rows=(
            _control_row(f"{measured['base']} against itself", controls.same, 1.0),
            _control_row(
                f"planted {controls.planted_share:.0%}", controls.planted, _planted(controls)
            ),
        ),
    )


def _planted(controls: Controls) -> float:
    return 1 + controls.planted_share


def _control_row(name: str, found: Interval, right: float) -> tuple[str, ...]:
    verdict = "failed" if found.excludes(right) else "passed"
    interval = f"{found.low:.4f} to {found.high:.4f}"
    return name, f"{right:.4f}", f"{found.value:.4f}", interval, verdict


def _doubt_tables(records: Sequence[Record]) -> list[Table]:
    """One row for each doubt, however many candidates share it."""
    shared: dict[tuple[str, str, str], list[str]] = {}
    for record in records:
        for doubt in (record.measurement or {})["doubts"]:
            key = (doubt["kind"], doubt["cause"], doubt["remedy"])
            shared.setdefault(key, []).append(record.candidate)
    if not shared:
        return []
    rows = tuple(
        (kind, ", ".join(names), cause, remedy) for (kind, cause, remedy), names in shared.items()
    )
    return [Table(title="Doubts", header=("doubt", "about", "number", "remedy"), rows=rows)]


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.4g}"
