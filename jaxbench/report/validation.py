"""Published against predicted step times: tables, and a page with a scatter plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxbench.cache import storage_errors
from jaxbench.report.markdown import render_table
from jaxbench.report.tables import Table
from jaxbench.validate import Outcome, Summary

_COLOURS = {
    "v3": "#888888", "v4": "#1f77b4", "v5e": "#2ca02c", "v5p": "#17becf", "v6e": "#9467bd",
    "7x": "#8c564b", "a100": "#ff7f0e", "h100": "#d62728", "b200": "#e377c2",
}  # fmt: skip


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """Every case: published, predicted, error, and what could not be reproduced."""
    rows = []
    for outcome in outcomes:
        case, prediction = outcome.case, outcome.prediction
        cells = ("-", "-", "-", outcome.failure[:60])
        if prediction is not None:
            cells = (
                format_s(prediction["step_s"]),
                f"{outcome.error:+.1%}",
                f"{format_s(prediction['low_s'])} - {format_s(prediction['high_s'])}",
                prediction["bound"],
            )
        differs = (
            f"{case.differs}; {outcome.failure}" if prediction and outcome.failure else case.differs
        )
        rows.append((case.id, case.target, case.half, format_s(case.step_s), *cells, differs))
    return Table(
        title="Published training steps",
        header=(
            "case",
            "target",
            "half",
            "published",
            "predicted",
            "error",
            "interval",
            "bound",
            "not reproduced",
        ),  # fmt: skip
        rows=tuple(rows),
        notes=("Constants of chips were fitted on rows marked fit, never on the others.",),
    )


def summary_table(summaries: Sequence[Summary]) -> Table:
    """Errors of each set of cases."""
    rows = tuple(
        (
            summary.name,
            str(summary.num_cases),
            f"{summary.median:.1%}",
            f"{summary.ninth_of_ten:.1%}",
            f"{summary.worst:.1%}",
            "-" if math.isnan(summary.tau) else f"{summary.tau:.2f}",
        )
        for summary in summaries
    )
    return Table(
        title="How far predictions are from what others measured",
        header=("set", "cases", "median error", "nine of ten within", "worst", "Kendall's tau"),
        rows=rows,
    )


def format_s(seconds: float) -> str:
    """Seconds or milliseconds with three digits."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def render_validation(
    outcomes: Sequence[Outcome], summaries: Sequence[Summary], picture: str
) -> str:
    """Returns the Markdown page; `picture` is the plot's file beside it."""
    made_with = sorted({outcome.made_with for outcome in outcomes if outcome.made_with})
    head = (
        "# Predictions against published step times\n\n"
        "Each training step was built again from its published configuration, compiled by the real "
        "compiler for the chip\nit ran on, and predicted; no row has a constant of its own.\n\n"
        f"![predicted against published seconds]({picture})\n"
    )
    tables = render_table(summary_table(summaries)) + render_table(outcome_table(outcomes))
    return head + tables + "\nCompiled with: " + "; ".join(made_with) + ".\n"


def write_page(page: Path, outcomes: Sequence[Outcome], summaries: Sequence[Summary]) -> None:
    """Writes the page and, beside it, the plot."""
    picture = page.with_suffix(".svg")
    with storage_errors(page):
        picture.write_text(scatter_svg(outcomes), encoding="utf-8")
        page.write_text(render_validation(outcomes, summaries, picture.name), encoding="utf-8")


# --- The plot ---

_SIZE, _MARGIN = 560, 56


def scatter_svg(outcomes: Sequence[Outcome]) -> str:
    """Returns a log-log scatter plot as SVG: equality, 15 % around it, a point a case."""
    points = [
        (outcome.case, outcome.prediction["step_s"])
        for outcome in outcomes
        if outcome.prediction is not None
    ]
    seconds = [value for case, predicted in points for value in (case.step_s, predicted)]
    low, high = min(seconds, default=1e-2) / 1.5, max(seconds, default=10.0) * 1.5

    def at(value: float) -> float:
        share = math.log(value / low) / math.log(high / low)
        return _MARGIN + share * (_SIZE - 2 * _MARGIN)

    def line(factor: float, style: str) -> str:
        return (
            f'<line x1="{at(low):.1f}" y1="{_SIZE - at(low * factor):.1f}" x2="{at(high):.1f}" '
            f'y2="{_SIZE - at(high * factor):.1f}" {style}/>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIZE + 90} {_SIZE}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{_SIZE + 90}" height="{_SIZE}" fill="white"/>',
        line(1.0, 'stroke="black"'),
        *(line(factor, 'stroke="#bbb" stroke-dasharray="4 3"') for factor in (1.15, 1 / 1.15)),
        *_ticks(low, high, at),
        f'<text x="{_SIZE / 2}" y="{_SIZE - 8}" text-anchor="middle">published seconds</text>',
        f'<text x="14" y="{_SIZE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 14 {_SIZE / 2})">predicted seconds</text>',
    ]
    chips = list(dict.fromkeys(case.chip for case, _ in points))
    for case, predicted in points:
        parts.append(
            f'<circle cx="{at(case.step_s):.1f}" cy="{_SIZE - at(predicted):.1f}" r="4" '
            f'fill="{_colour(case.chip)}" fill-opacity="0.75"><title>{case.id}: '
            f"{predicted / case.step_s - 1:+.1%}</title></circle>"
        )
    for index, chip in enumerate(chips):
        y = 40 + 20 * index
        parts.append(f'<circle cx="{_SIZE}" cy="{y}" r="5" fill="{_colour(chip)}"/>')
        parts.append(f'<text x="{_SIZE + 10}" y="{y + 4}">{chip}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _colour(chip: str) -> str:
    return _COLOURS.get(chip.partition("-")[2], "#000000")


def _ticks(low: float, high: float, at: Callable[[float], float]) -> list[str]:
    parts = []
    for exponent in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        value = 10.0**exponent
        x, y = at(value), _SIZE - at(value)
        label = f"{value:g}"
        parts.append(
            f'<text x="{x:.1f}" y="{_SIZE - _MARGIN + 18}" text-anchor="middle">{label}</text>'
        )
        parts.append(f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
        grid = 'stroke="#eee"'
        end = _SIZE - _MARGIN
        parts.append(f'<line x1="{x:.1f}" y1="{_MARGIN}" x2="{x:.1f}" y2="{end}" {grid}/>')
        parts.append(f'<line x1="{_MARGIN}" y1="{y:.1f}" x2="{end}" y2="{y:.1f}" {grid}/>')
    return parts
