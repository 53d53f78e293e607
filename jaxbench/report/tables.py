"""What a run found, as rows of text: the one source of the terminal's and the page's tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jaxbench.compare import (
    Comparison,
    best_records,
    compare_rivals,
    find_flips,
    find_hints,
    regrets,
    signal_agreement,
)
from jaxbench.record import Record
from jaxbench.signals import SIGNALS


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A title, a header, rows of equal length, and notes to print below."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def ordered_targets(records: Iterable[Record]) -> list[str]:
    """Returns the targets in the order of chips.toml, then by name."""
    from jaxbench.target import chip_table

    chips = list(chip_table())
    names = {record.target for record in records}
    return sorted(names, key=lambda name: (chips.index(name.split(":")[0]), name))


def speed_table(records: Sequence[Record]) -> Table:
    """Samples a second of the whole mesh, a candidate a row and a target a column."""
    kept = best_records(records)
    targets = ordered_targets(kept)
    cells = {(record.candidate, record.target): record for record in kept}
    order = sorted(
        {(record.base, record.candidate != record.base, record.candidate) for record in kept}
    )
    rows = []
    for base, is_variant, name in order:
        label = f"  {name}" if is_variant else name
        rows.append((label, *(_speed_cell(cells, name, base, target) for target in targets)))
    return Table(
        title="Training samples/s on the whole target",
        header=("candidate", *targets),
        rows=tuple(rows),
        notes=(
            "* measured on this machine; the others are predicted (`jaxbench validate`: how well). "
            "Bracket: against the base above it.",
            *_extra_notes(kept),
        ),
    )


def _extra_notes(records: Iterable[Record]) -> list[str]:
    """Says what was compiled with other options than its rivals."""
    notes = []
    for record in records:
        extra = (record.compiled or {}).get("extra_options")
        if extra:
            options = ", ".join(f"{name}={value}" for name, value in extra.items())
            notes.append(f"{record.candidate} on {record.target} compiles only with {options}.")
    return sorted(notes)


def _speed_cell(cells: dict[tuple[str, str], Record], name: str, base: str, target: str) -> str:
    record = cells.get((name, target))
    if record is None:
        return "-"
    if record.failure:
        return failure_cell(record)
    if record.samples_per_s is None:
        return "?"
    star = "*" if record.samples_per_s_from == "measurement" else ""
    other = cells.get((base, target))
    ratio = ""
    if (
        other
        and name != base
        and other.samples_per_s
        and not other.failure
        and other.layout == record.layout
    ):
        ratio = f" ({record.samples_per_s / other.samples_per_s:.2f}x)"
    return f"{format_number(record.samples_per_s)}{star}{ratio}"


def failure_cell(record: Record) -> str:
    """What stands in place of a figure: the memory that is missing, or the error."""
    failure = record.failure or {}
    if failure.get("needed_bytes"):
        needed, there = (failure[key] / 2**30 for key in ("needed_bytes", "available_bytes"))
        return f"needs {needed:.1f} of {there:.1f} GiB"
    return f"failed: {failure.get('error')}"


def format_number(value: float) -> str:
    """Three significant digits, thousands grouped."""
    if value >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{value:.3g}"


def signal_table(comparisons: Sequence[Comparison]) -> Table:
    """Each pair of rivals on each target: what every signal says, and the verdict."""
    rows = []
    for comparison in sorted(comparisons, key=lambda c: (c.first, c.second)):
        cells = []
        for signal in SIGNALS:
            ratio = comparison.ratio(signal)
            cells.append(f"{ratio.ratio:.2f}" if ratio else "-")
        rows.append(
            (
                f"{comparison.first} / {comparison.second}",
                comparison.target,
                *cells,
                _verdict_cell(comparison),
            )
        )
    return Table(
        title="How many times faster the first of a pair is, by signal",
        header=("pair", "target", "model FLOPs", "hlo", "compiler", "measured", "verdict"),
        rows=tuple(rows),
        notes=(
            "model: FLOPs of the mathematics, second over first. hlo: our roofline over the "
            "compiled program. "
            "compiler: its own cycles (XLA:TPU only).",
        ),
    )


def _verdict_cell(comparison: Comparison) -> str:
    name = comparison.winner
    return f"{name} is faster" if name else f"{comparison.verdict}: {comparison.reason}"


def flip_table(comparisons: Sequence[Comparison]) -> Table:
    """Pairs whose winner changes with the target: proven first, then those that only lean so."""
    proven = find_flips(comparisons)
    pairs = {(flip.first, flip.second) for flip in proven}
    hints = [flip for flip in find_hints(comparisons) if (flip.first, flip.second) not in pairs]
    rows = [
        (
            kind,
            f"{flip.first} on {', '.join(flip.first_wins_on)}",
            f"{flip.second} on {', '.join(flip.second_wins_on)}",
        )
        for kind, flips in (("flip", proven), ("inconclusive", hints))
        for flip in flips
    ]
    open_ones = sum(comparison.verdict == "inconclusive" for comparison in comparisons)
    return Table(
        title="Choices whose winner changes with the target",
        header=("evidence", "one side wins", "the other wins"),
        rows=tuple(rows),
        notes=(
            f"{len(proven)} proven, {len(hints)} leaning so without enough evidence. Of "
            f"{len(comparisons)} comparisons "
            f"{open_ones} are inconclusive. Proof on a target is a measurement, or hlo and "
            f"compiler agreeing beyond "
            "their known errors.",
        ),
    )


def agreement_table(comparisons: Sequence[Comparison]) -> Table:
    """How often two signals name the same winner."""
    rows = [
        (f"{one} and {other}", f"{agree} of {total}")
        for (one, other), (agree, total) in sorted(signal_agreement(comparisons).items())
    ]
    return Table(
        title="Agreement of signals on who is faster", header=("signals", "agree"), rows=tuple(rows)
    )


def regret_table(records: Sequence[Record]) -> Table:
    """Time lost by choosing on one target and training on another."""
    found = regrets(records)
    targets = ordered_targets(records)
    cells = {(regret.chosen_on, regret.used_on): regret for regret in found}
    rows = []
    for chosen in targets:
        row = [cells.get((chosen, used)) for used in targets]
        rows.append((chosen, *(f"{regret.worst:.0%}" if regret else "" for regret in row)))
    return Table(
        title="Worst regret: time lost on the column's target by taking the row's winner",
        header=("chosen on", *targets),
        rows=tuple(rows),
        notes=("From each record's own speed, measured or predicted: only as good as those.",),
    )


def overhead_table(records: Sequence[Record]) -> Table:
    """Where the workers' time went, over all records."""
    stages = ("trace_s", "lower_s", "compile_s", "price_s", "measure_s")
    sums = {stage: sum(record.timings.get(stage, 0.0) for record in records) for stage in stages}
    total = sum(record.timings.get("worker_s", 0.0) for record in records)
    sums["rest_s"] = max(0.0, total - sum(sums.values()))
    names = ("trace", "lower", "compile", "read and price", "measure", "rest")
    rows = [
        (name, f"{value:.1f}", f"{value / total:.1%}" if total else "-")
        for name, value in zip(names, sums.values(), strict=True)
    ]
    return Table(
        title="Where the workers' time went", header=("stage", "seconds", "share"), rows=tuple(rows)
    )


def run_tables(records: Sequence[Record]) -> list[Table]:
    """What `run` shows."""
    comparisons = compare_rivals(records)
    tables = [speed_table(records)]
    if comparisons:
        tables += [signal_table(comparisons), flip_table(comparisons)]
    return tables


def flips_tables(records: Sequence[Record]) -> list[Table]:
    """What `flips` shows."""
    comparisons = compare_rivals(records)
    return [flip_table(comparisons), agreement_table(comparisons), regret_table(records)]
