"""What a search found, as tables."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from jaxbench.compare import compare_to_first
from jaxbench.report.markdown import write_tables
from jaxbench.report.measured import session_tables, sessions_of
from jaxbench.report.tables import Table, failure_cell, format_number
from jaxbench.search.engine import Found, Network
from jaxbench.search.front import Times, least_worst, pareto_front, regret_table, winners

_SHOWN = 12  # rows of the composed front, and of single changes


def search_tables(found: Found) -> list[Table]:
    """Returns the tables: the front, one network for all, composition, and counts."""
    tables = [_front_table(found)]
    whole = found.whole_s()
    if len(whole) > 1:
        tables.append(_choice_table(found, whole))
    if any(record.measurement for record in found.records):
        tables += session_tables(found.records)
    tables += _change_tables(found)
    if found.compositions:
        tables.append(_composition_table(found))
    tables.append(_count_table(found))
    return tables


def _front_table(found: Found) -> Table:
    """The base, then the front: what changed, and samples/s on each target against the base."""
    whole = found.whole_s()
    best = set(pareto_front(whole)) if whole else set()
    rows = [_row(found, found.base, whole, best)]
    for name in found.front[:_SHOWN]:
        rows.append(_row(found, found.network(name), whole, best))
    return Table(
        title=f"Front of {found.space['name']}, predicted training samples/s",
        header=("network", "class", "on the front", *found.targets, "against the base"),
        rows=tuple(rows),
        notes=(
            "Whole compiles; ~ composed from blocks, where the whole did not compile on another "
            "target. T1 and T2 are not yet equal: `jaxbench quality` judges.",
        ),
    )


def _row(
    found: Found, network: Network, whole: Mapping[str, Times], best: set[str]
) -> tuple[str, ...]:
    resolved = network.resolved
    base_name, name = found.base.resolved.name, resolved.name
    cells = []
    failed = {one.target: one for one in found.records if one.candidate == name and one.failure}
    for target in found.targets:
        if target in failed:
            cells.append(failure_cell(failed[target]))
            continue
        is_whole = name in whole and base_name in whole
        own = whole[name][target] if is_whole else network.composed_s[target]
        base = whole[base_name][target] if is_whole else found.base.composed_s[target]
        ratio = "" if name == base_name else f" ({base / own:.2f}x)"
        cells.append(f"{'' if is_whole else '~'}{format_number(1 / own)}{ratio}")
    on_front = "yes" if name in best else "no" if best else "?"
    return name, resolved.validity, on_front, *cells, resolved.changes or "-"


def _change_tables(found: Found) -> list[Table]:
    """What each change buys alone, and how much few changes can buy together."""
    return [
        Table(
            title=title,
            header=("changes", "network", "class", *found.targets, *_SIZES, "against the base"),
            rows=tuple(_change_row(found, one) for one in networks),
            notes=("Times faster than the base, composed from blocks; sizes over the base's.",),
        )
        for title, networks in (
            ("One change alone", found.with_changes(1)[:_SHOWN]),
            ("The fastest with so many changes", found.few_changes()),
        )
        if networks
    ]


_SIZES = ("num_params", "forward_flops")


def _change_row(found: Found, network: Network) -> tuple[str, ...]:
    resolved, base = network.resolved, found.base
    num = sum(value != base.resolved.point[name] for name, value in resolved.point.items())
    faster = (base.composed_s[target] / network.composed_s[target] for target in found.targets)
    sizes = (resolved.quantities[size] / base.resolved.quantities[size] for size in _SIZES)
    return (
        str(num),
        resolved.name,
        resolved.validity,
        *(f"{ratio:.2f}x" for ratio in faster),
        *(f"{size:.2f}" for size in sizes),
        resolved.changes,
    )


def _choice_table(found: Found, whole: Mapping[str, Times]) -> Table:
    """Choosing on one target and training on another."""
    regrets, best, middle = regret_table(whole), winners(whole), least_worst(whole)
    rows = [
        (
            f"fastest on {chosen}",
            best[chosen],
            *(f"{regrets[chosen, used]:.3f}" for used in found.targets),
        )
        for chosen in found.targets
    ]
    times = {target: whole[best[target]][target] for target in found.targets}
    rows.append(
        (
            "least worst of all",
            middle,
            *(f"{whole[middle][target] / times[target]:.3f}" for target in found.targets),
        )
    )
    return Table(
        title="Step time of one choice over the best on each target",
        header=("chosen as", "network", *found.targets),
        rows=tuple(rows),
    )


def _composition_table(found: Found) -> Table:
    rows, whole = [], found.whole_s()
    for target, composition in found.compositions.items():
        errors = sorted(composition.errors)
        plain = sorted(composition.plain_errors)
        rows.append(
            (
                target,
                str(len(errors)),
                f"{plain[len(plain) // 2]:.1%}" if plain else "-",
                f"{composition.median_error:.1%}",
                f"{errors[-1]:.1%}" if errors else "-",
                _front_error(found, whole, target),
                "whole compiles" if target in found.whole_targets else "blocks",
            )
        )
    return Table(
        title="Steps composed from blocks against whole compiles",
        header=(
            "target",
            "networks",
            "median, unfitted",
            "median",
            "worst",
            "worst of the front",
            "priced by",
        ),
        rows=tuple(rows),
        notes=(
            "Errors of networks that the fit has not seen: each of the sample left out in turn, "
            "and the front, which is chosen by composed steps and so leans to those too short.",
            *(f"{target}, whole compiles: {why}." for target, why in found.whole_targets.items()),
        ),
    )


def _front_error(found: Found, whole: Mapping[str, Times], target: str) -> str:
    errors = [
        found.network(name).composed_s[target] / whole[name][target] - 1
        for name in found.front
        if name in whole and target not in found.whole_targets
    ]
    return f"{max(errors, key=abs):+.1%}" if errors else "-"


def _count_table(found: Found) -> Table:
    refused = sum(found.refusals.values())
    rows = [
        ("points of the space", f"{found.space['num_points']:,}"),
        ("trials", f"{found.num_trials:,}"),
        ("different networks priced", f"{len(found.networks):,} of {found.budget:,} asked for"),
        ("trials refused", f"{refused:,}"),
        ("networks left by their bound", f"{found.num_bounded:,}"),
        ("blocks compiled now", f"{found.num_compiled:,}"),
        ("seconds", f"{found.seconds:,.0f}"),
    ]
    notes = tuple(
        f"Refused: {why} ({num})."
        for why, num in sorted(found.refusals.items(), key=lambda item: -item[1])[:5]
    )
    return Table(title="What was done", header=("what", "how many"), rows=tuple(rows), notes=notes)


def write_search_page(page: Path, found: Found) -> None:
    """Writes what a search found as a page, with a plot of all networks on the first targets."""
    about = (
        f"`jaxbench search {found.space['name']}` around {found.base.resolved.name} "
        f"({found.space['num_points']:,} points). Predicted{_but_measured(found)}; winners are in "
        "`networks/` as candidate files."
    )
    pictures = {}
    if len(found.targets) > 1:
        pictures[f"{page.stem}.svg"] = _scatter(found).encode()
    write_tables(page, f"Search: {found.space['name']}", about, search_tables(found), pictures)


def _but_measured(found: Found) -> str:
    measured = sorted({one.target for one in found.records if one.measurement})
    return f", and measured on {', '.join(measured)}" if measured else ", not measured"


_SIZE, _EDGE = 560, 60
_TICKS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0)


def _scatter(found: Found) -> str:
    """Returns composed times of all networks over the base's, on two targets, as SVG."""
    across, up = found.targets[:2]
    base = found.base.composed_s
    points = {
        one.resolved.name: (one.composed_s[across] / base[across], one.composed_s[up] / base[up])
        for one in (found.base, *found.networks)
    }
    low = min(value for point in points.values() for value in point) / 1.05
    high = max(value for point in points.values() for value in point) * 1.05

    def at(value: float) -> float:
        return _EDGE + math.log(value / low) / math.log(high / low) * (_SIZE - 2 * _EDGE)

    def dot(name: str) -> str:
        x, y = points[name]
        colour, radius = "#b8c0cc", 2.5
        if name == found.base.resolved.name:
            colour, radius = "#111111", 6.0
        elif name in found.front:
            colour, radius = "#d1495b", 4.5
        return (
            f'<circle cx="{at(x):.1f}" cy="{_SIZE - at(y):.1f}" r="{radius}" fill="{colour}">'
            f"<title>{name}: {x:.3f}, {y:.3f}</title></circle>"
        )

    order = sorted(points, key=lambda name: (name in found.front, name == found.base.resolved.name))
    ticks = [value for value in _TICKS if low < value < high]
    lines = "".join(
        f'<path d="M{at(t):.1f} {_EDGE}V{_SIZE - _EDGE}M{_EDGE} {_SIZE - at(t):.1f}'
        f'H{_SIZE - _EDGE}" stroke="#e6e9ee"/>'
        f'<text x="{at(t):.1f}" y="{_SIZE - _EDGE + 16}" text-anchor="middle">{t:g}</text>'
        f'<text x="{_EDGE - 6}" y="{_SIZE - at(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in ticks
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_SIZE} {_SIZE}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="{_SIZE}" height="{_SIZE}" fill="white"/>{lines}'
        + "".join(map(dot, order))
        + f'<text x="{_SIZE / 2}" y="{_SIZE - 16}" text-anchor="middle">time of a sample over the '
        f"base's, {across}</text>"
        f'<text x="16" y="{_SIZE / 2}" text-anchor="middle" '
        f'transform="rotate(-90 16 {_SIZE / 2})">the same, {up}</text>'
        f'<text x="{_EDGE}" y="24">{len(points):,} networks from blocks: base black, front '
        "red</text></svg>\n"
    )


def search_values(found: Found) -> dict[str, object]:
    """Returns JSON-ready values of everything that a search found."""
    whole = found.whole_s()
    return {
        "space": found.space["name"],
        "base": found.base.resolved.name,
        "targets": list(found.targets),
        "front": list(found.front),
        "few_changes": [one.resolved.name for one in found.few_changes()],
        "whole_front": pareto_front(whole),
        "whole_s": whole,
        "networks": [
            {
                "name": one.resolved.name,
                "point": dict(one.resolved.point),
                "validity": one.resolved.validity,
                "changes": one.resolved.changes,
                "composed_s": dict(one.composed_s),
                "quantities": dict(one.resolved.quantities),
            }
            for one in (found.base, *found.networks)
        ],
        "measured": [
            comparison
            for session in sessions_of(found.records)
            for comparison in compare_to_first(session)
        ],
        "composition": {
            target: {
                "errors": list(one.errors),
                "plain_errors": list(one.plain_errors),
                "coefficients": dict(one.coefficients),
                "constant_s": one.constant_s,
            }
            for target, one in found.compositions.items()
        },
        "whole_targets": dict(found.whole_targets),
        "refusals": dict(found.refusals),
        "num_points": found.space["num_points"],
        "num_trials": found.num_trials,
        "num_bounded": found.num_bounded,
        "blocks_compiled": found.num_compiled,
        "files": list(found.files),
        "seconds": found.seconds,
    }
