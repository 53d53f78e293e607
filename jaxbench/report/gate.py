"""What the gate found, for the terminal and for the summary of a CI job."""

from __future__ import annotations

from jaxbench.gate import WORST_FIRST, GateResult, Pair
from jaxbench.gate.change import Change
from jaxbench.report.markdown import render_table
from jaxbench.report.tables import Table
from jaxbench.stats import Interval


def headline(result: GateResult) -> str:
    """Says in one line whether the gate is passed, why, and what it could not decide."""
    return f"{_outcome(result)}{_left_open(result)}"


def _outcome(result: GateResult) -> str:
    num_pairs = len(result.pairs)
    if result.broken:
        by_rule = [
            f"{rule} by {count}"
            for rule in result.rules
            if (count := sum(rule in pair.broken for pair in result.pairs))
        ]
        return f"Gate failed: {len(result.broken)} of {num_pairs} break {', '.join(by_rule)}."
    if not any(pair.kept for pair in result.pairs):
        return f"Gate passed, but nothing was decided about any of {num_pairs}."
    return f"Gate passed: none of {num_pairs} breaks {', '.join(map(str, result.rules))}."


def _left_open(result: GateResult) -> str:
    counts = [
        f"{rule} for {count}"
        for rule in result.rules
        if (count := sum(rule in pair.undecided for pair in result.pairs))
    ]
    return f" Undecided: {', '.join(counts)}." if counts else ""


def gate_tables(result: GateResult) -> list[Table]:
    """Returns the tables of the gate: changed versions, pairs with the worst first, rules."""
    return [_version_table(result), _pair_table(result), _rule_table(result)]


def render_summary(result: GateResult) -> str:
    """Returns the summary of a CI job, in Markdown."""
    tables = "".join(render_table(table) for table in gate_tables(result))
    return f"# {headline(result)}\n{tables}"


def _version_table(result: GateResult) -> Table:
    rows = [(one.name, one.before or "-", one.after or "-") for one in result.versions]
    return Table(title="Changed versions", header=("package", "before", "now"), rows=tuple(rows))


def _pair_table(result: GateResult) -> Table:
    return Table(
        title="Before and now, the worst first",
        header=(
            "candidate",
            "target",
            "layout",
            "signal",
            "ms before",
            "ms now",
            "step time",
            "GiB now",
            "memory",
            "FLOPs",
            "verdict",
            "breaks",
        ),
        rows=tuple(_pair_row(pair) for pair in result.pairs),
        notes=(
            "Step time: change, with its interval where it was measured. Memory: peak of one "
            "device. FLOPs: of the compiled program, one device.",
        ),
    )


def _pair_row(pair: Pair) -> tuple[str, ...]:
    step, peak_bytes = pair.step, pair.peak_bytes.after
    reasons = [step.reason, "same program" if pair.same_program and step.ratio else ""]
    reason = "; ".join(filter(None, reasons))
    return (
        pair.candidate,
        pair.target,
        pair.layout,
        step.signal or "-",
        _milliseconds(step.step_s.before),
        _milliseconds(step.step_s.after),
        _interval(step.ratio),
        "-" if peak_bytes is None else f"{peak_bytes / 2**30:.3g}",
        _growth(pair.peak_bytes),
        _growth(pair.hlo_flops),
        f"{pair.verdict}: {reason}" if reason else pair.verdict,
        ", ".join(map(str, pair.broken)),
    )


def _rule_table(result: GateResult) -> Table:
    rows = []
    for rule in result.rules:
        groups = [(pair.broken, pair.undecided, pair.kept) for pair in result.pairs]
        counts = [sum(rule in group for group in column) for column in zip(*groups, strict=True)]
        rows.append((str(rule), *map(str, counts)))
    counted = [f"{count} {verdict}" for verdict in WORST_FIRST if (count := result.count(verdict))]
    return Table(
        title="Rules",
        header=("rule", "broken by", "undecided for", "kept by"),
        rows=tuple(rows),
        notes=(
            f"Of {len(result.pairs)}: {', '.join(counted)}. Inconclusive: the interval holds no "
            "change as well as the slow-down looked for.",
        ),
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.4g}"


def _growth(change: Change) -> str:
    return "-" if change.ratio is None else _percent(change.ratio)


def _interval(ratio: Interval | None) -> str:
    if ratio is None:
        return "-"
    change = _percent(ratio.value)
    if ratio.low == ratio.high:
        return change
    if not ratio.low:
        return f"{change} (unknown)"
    return f"{change} ({_percent(ratio.low)} to {_percent(ratio.high)})"


def _percent(ratio: float) -> str:
    return f"{ratio - 1:+.1%}"
