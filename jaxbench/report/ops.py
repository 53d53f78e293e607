"""A measured step's ops as rows of text: by pass, by module, and the longest one by one."""

from __future__ import annotations

from collections.abc import Sequence

from jaxbench.ops import BETWEEN, OpGroup, OpRow, StepOps
from jaxbench.report.tables import Table, format_number

_KIND = {"compute": "FLOPs", "memory": "bytes", "launch": "launch"}


def ops_tables(found: StepOps, *, depth: int = 2, top: int = 20) -> list[Table]:
    """Returns the tables for the terminal.

    Args:
      depth: Of the modules' scopes.
      top: How many ops are listed one by one.
    """
    return [
        _group_table("Where the step's time goes, by pass", found, found.by_pass()),
        _group_table("By module, forward and backward together", found, found.by_module(depth)),
        _op_table(found, top),
    ]


def _group_table(title: str, found: StepOps, groups: Sequence[OpGroup]) -> Table:
    rows = [
        (
            group.name,
            format_seconds(group.measured_s),
            _percent(group.measured_s, found.step_s),
            format_seconds(group.predicted_s) if group.predicted_s else "-",
            _ratio(group.measured_s, group.predicted_s),
            _rate(group.flops, group.measured_s, "FLOP/s"),
            _rate(group.hbm_bytes, group.measured_s, "B/s"),
        )
        for group in groups
    ]
    header = ("part", "measured", "share", "predicted", "ratio", "FLOP/s", "bytes/s")
    return Table(title=title, header=header, rows=(*rows, _total_row(found, len(header))))


def _total_row(found: StepOps, width: int) -> tuple[str, ...]:
    row = ("all ops and between", format_seconds(found.busy_s + found.between_s))
    share = _percent(found.busy_s + found.between_s, found.step_s)
    return (*row, share, *[""] * (width - 3))


def _op_table(found: StepOps, top: int) -> Table:
    shown = [row for row in found.rows if row.measured_s is not None][:top]
    header = (
        "op", "what", "pass", "module", "runs", "measured", "share", "predicted", "ratio", "FLOP/s",
        "bytes/s", "bound",
    )  # fmt: skip
    return Table(
        title=f"The {len(shown)} longest ops of {len(found.rows)}",
        header=header,
        rows=tuple(_op_row(found, row) for row in shown),
        notes=tuple(_notes(found)),
    )


def _op_row(found: StepOps, row: OpRow) -> tuple[str, ...]:
    measured_s = row.measured_s or 0.0
    is_op = row.name != BETWEEN
    return (
        row.name,
        row.op_class or row.opcode,
        row.op_pass if is_op else "",
        row.scope,
        format_number(row.num_executions) if is_op else "",
        format_seconds(measured_s),
        _percent(measured_s, found.step_s),
        "-" if row.predicted_s is None else format_seconds(row.predicted_s),
        _ratio(measured_s, row.predicted_s),
        _rate(row.flops, measured_s, "FLOP/s"),
        _rate(row.hbm_bytes, measured_s, "B/s"),
        _KIND.get(row.bound, row.bound),
    )


def _notes(found: StepOps) -> list[str]:
    gap_s = found.busy_s + found.between_s - found.step_s
    notes = [
        f"Ops {format_seconds(found.busy_s)} and between them {format_seconds(found.between_s)}: "
        f"{abs(gap_s) / found.step_s:.1%} off the step of {format_seconds(found.step_s)} "
        f"(mean of the middle half of {found.num_steps} steps; {found.num_dropped} before them "
        "left out). Where ops run side by side their time is divided."
    ]
    for label, rows in (
        ("Measured without a cost", found.without_cost),
        ("Priced and never seen", found.not_seen),
    ):
        if rows:
            names = ", ".join(row.name for row in rows[:5])
            more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
            notes.append(f"{label}: {names}{more}.")
    return notes


def format_seconds(seconds: float) -> str:
    """Returns three digits with the unit that fits: `12.3 ms`, `450 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _percent(part_s: float, whole_s: float) -> str:
    return f"{part_s / whole_s:.1%}" if whole_s else "-"


def _ratio(measured_s: float, predicted_s: float | None) -> str:
    return f"{measured_s / predicted_s:.2f}" if measured_s and predicted_s else "-"


def _rate(amount: float, seconds: float, unit: str) -> str:
    if not amount or not seconds:
        return "-"
    rate = amount / seconds
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if rate >= size:
            return f"{rate / size:.3g} {prefix}{unit}"
    return f"{rate:.3g} {unit}"
