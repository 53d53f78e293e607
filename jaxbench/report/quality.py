"""Verdicts on a driving task, as tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxbench.quality.protocol import Judged, Verdict
from jaxbench.report.tables import Table


def quality_tables(judged: Judged) -> list[Table]:
    """Returns the verdicts, and what they rest on."""
    return [_verdict_table(judged), _run_table(judged)]


def _verdict_table(judged: Judged) -> Table:
    rows = [_row(verdict) for verdict in judged.verdicts]
    notes = []
    if judged.margin is not None:
        samples = (
            f", what {judged.margin_samples:.0%} more samples are worth to the base"
            if judged.margin_samples is not None
            else ""
        )
        origin = "given" if judged.plan.margin else "a quarter of the negative control's damage"
        notes.append(f"Margin {judged.margin:.4f} ({origin}{samples}).")
    if judged.complaint:
        notes.append(f"The test cannot tell: {judged.complaint}.")
    notes += [f"{verdict.name}: {verdict.reason}." for verdict in judged.verdicts]
    return Table(
        title=f"Against {judged.base}, {judged.metric} (task {judged.task})",
        header=("network", "class", "verdict", "damage", "one-sided 95 %", "power", "changes"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _row(verdict: Verdict) -> tuple[str, ...]:
    paired = verdict.paired
    name = verdict.name if verdict.role == "variant" else f"{verdict.name} ({verdict.role})"
    if paired is None or not math.isfinite(paired.mean):
        return name, verdict.validity, verdict.word, "-", "-", "-", verdict.changes or "-"
    return (
        name,
        verdict.validity,
        verdict.word,
        f"{paired.mean:+.4f}",
        f"[{paired.low:+.4f}, {paired.high:+.4f}]",
        f"{paired.power:.2f}",
        verdict.changes or "-",
    )


def _run_table(judged: Judged) -> Table:
    rows = [("base", judged.base, *_metrics(judged.base_metrics), "-")]
    for verdict in judged.verdicts:
        if verdict.metrics:
            rate = f"{verdict.learning_rate:g}" if verdict.learning_rate else "-"
            rows.append((verdict.role, verdict.name, *_metrics(verdict.metrics), rate))
    width = max((len(judged.base_metrics), 0))
    return Table(
        title=f"{judged.metric}, one run a column",
        header=("role", "network", *(f"pair {n + 1}" for n in range(width)), "learning rate"),
        rows=tuple(row for row in rows if len(row) == width + 3),
        notes=(
            f"{judged.plan.steps} steps of {judged.plan.batch} key frames; data "
            f"{judged.data_digest[:12]}.",
        ),
    )


def _metrics(values: Sequence[float | None]) -> list[str]:
    return ["diverged" if value is None else f"{value:.4f}" for value in values]
