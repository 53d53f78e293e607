"""Verdicts on a driving task, as tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from scipy import stats

from jaxbench.quality.judged import Judged, Verdict
from jaxbench.quality.shards import packaged_folder, read_data
from jaxbench.quality.target_time import TargetTime
from jaxbench.quality.verdict import damage_trend
from jaxbench.report.markdown import write_tables
from jaxbench.report.picture import frame_picture
from jaxbench.report.tables import Table
from jaxbench.stats import Interval


def quality_tables(
    ladder: Sequence[Judged], times: Sequence[TargetTime] = (), *, main: Judged | None = None
) -> list[Table]:
    """Returns the verdicts at each scale, what they rest on, how damage goes with scale, and times
    to target of one scale (the last if no `main` is given) where there are records."""
    tables = [table(judged) for judged in ladder for table in (_verdict_table, _run_table)]
    tables += [_rollout_table(judged) for judged in ladder if any(judged.base_rollouts)]
    tables += [_ladder_table(ladder)] if len(ladder) > 1 else []
    return [*tables, _time_table(main or ladder[-1], times)] if times else tables


def write_quality_page(
    page: Path,
    ladder: Sequence[Judged],
    times: Sequence[TargetTime],
    data: Path | None,
    *,
    main: Judged,
) -> None:
    """Writes the verdicts as a page, with pictures of key frames; `main` names it."""
    frames = read_data(data or packaged_folder())
    size, pictures = len(frames.test["scene"]), {}
    about = (
        f"{len(frames.train['scene'])} key frames to train on and {size} to judge by, of "
        f"{frames.about['source']}; data {frames.digest[:12]}. "
    )
    if main.task == "tokens":
        about += "Sequences of a generated language, drawn from the key frames' numbers alone."
    else:
        about += (
            "Flat shading, flat ground, no pedestrians: good for comparing architectures, no claim "
            "on real roads."
        )
        pictures = {
            f"frame-{number}.png": frame_picture(
                frames.test, size * (2 * number + 1) // 6, extent_m=frames.about["extent_m"]
            )
            for number in range(3)
        }
    tables = quality_tables(ladder, times, main=main)
    write_tables(page, f"Verdicts against {main.base}", about, tables, pictures)


def _ladder_table(ladder: Sequence[Judged]) -> Table:
    """Damage in margins, rung by rung; only what was trained is spoken of."""
    rows = []
    for steps in zip(*(judged.verdicts for judged in ladder), strict=True):
        shown = [
            f"{one.word} {one.paired.mean / one.paired.margin:+.2f}"
            if one.paired and math.isfinite(one.paired.mean)
            else one.word
            for one in steps
        ]
        rows.append((steps[0].name, *shown, damage_trend(steps[0].paired, steps[-1].paired)))
    return Table(
        title="Verdict and damage in margins, by scale",
        header=("network", *(judged.base for judged in ladder), "from first to last"),
        rows=tuple(rows),
        notes=("Nothing is claimed of networks smaller or larger than these.",),
    )


def _time_table(judged: Judged, times: Sequence[TargetTime]) -> Table:
    rows = [
        (
            one.name,
            one.target,
            _interval(one.samples),
            f"{_interval(one.seconds)} {one.signal}",
            _interval(one.time),
        )
        for one in times
    ]
    return Table(
        title="Time to target over the base's",
        header=("network", "target", "samples", "seconds a sample", "time"),
        rows=tuple(rows),
        notes=(
            f"Target: {judged.metric} of the base less the margin. 95 % intervals; the second is "
            "that of the signal.",
        ),
    )


def _interval(found: Interval) -> str:
    if not math.isfinite(found.value):
        return "never" if found.value == math.inf else "unknown"
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


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
    width = len(judged.base_metrics)
    return Table(
        title=f"{judged.metric}, one run a column",
        header=("role", "network", *(f"pair {n + 1}" for n in range(width)), "learning rate"),
        rows=tuple(rows),
        notes=(
            f"{judged.plan.steps} steps of {judged.plan.batch} key frames; data "
            f"{judged.data_digest[:12]}.",
        ),
    )


def _rollout_table(judged: Judged) -> Table:
    """Closed loop: what came of driving, and how far against the base of the same pair."""
    base = judged.base_rollouts
    others = [(one.name, one.rollouts) for one in judged.verdicts if any(one.rollouts)]
    rows = []
    for name, found in ((judged.base, base), *others):
        known = [one for one in found if one]
        shares = (statistics.fmean(one[end] for one in known) for end in known[0])
        pairs = [(a, b) for a, b in zip(base, found, strict=True) if a and b]
        apart = [b["completion"] - a["completion"] for a, b in pairs]
        rows.append((name, *(f"{share:.1%}" for share in shares), _mean_interval(apart)))
    rows[0] = (*rows[0][:-1], "-")
    return Table(
        title="Closed loop in MetaDrive, a secondary endpoint",
        header=("network", "of the route", "arrived", "crashed", "off the road", "route - base's"),
        rows=tuple(rows),
        notes=(
            f"Means over {len(base)} runs of {judged.plan.rollout} scenes that no data set holds; "
            "95 % interval over pairs. No verdict rests on it.",
        ),
    )


def _mean_interval(values: Sequence[float]) -> str:
    mean = statistics.fmean(values) if values else math.nan
    if len(values) < 2:
        return f"{mean:+.1%}"
    half = statistics.stdev(values) / math.sqrt(len(values)) * stats.t.ppf(0.975, len(values) - 1)
    return f"{mean:+.1%} [{mean - half:+.1%}, {mean + half:+.1%}]"


def _metrics(values: Sequence[float | None]) -> list[str]:
    return ["diverged" if value is None else f"{value:.4f}" for value in values]
