"""What a search found, as tables."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbench.report.tables import Table, format_number
from jaxbench.search.engine import Found, Network
from jaxbench.search.front import Times, least_worst, pareto_front, regret_table, winners

_SHOWN = 12  # rows of the composed front


def search_tables(found: Found) -> list[Table]:
    """Returns the tables: the front, one network for all, composition, and counts."""
    tables = [_front_table(found)]
    whole = found.whole_s()
    if len(whole) > 1:
        tables.append(_choice_table(found, whole))
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
            "Whole compiles; ~ composed from blocks, where the whole did not compile or was not "
            "tried. T1 and T2 are not yet equal: `jaxbench quality` judges.",
        ),
    )


def _row(
    found: Found, network: Network, whole: Mapping[str, Times], best: set[str]
) -> tuple[str, ...]:
    resolved = network.resolved
    base_name, name = found.base.resolved.name, resolved.name
    cells = []
    for target in found.targets:
        is_whole = name in whole and base_name in whole
        own = whole[name][target] if is_whole else network.composed_s[target]
        base = whole[base_name][target] if is_whole else found.base.composed_s[target]
        ratio = "" if name == base_name else f" ({base / own:.2f}x)"
        cells.append(f"{'' if is_whole else '~'}{format_number(1 / own)}{ratio}")
    on_front = "yes" if name in best else "no" if best else "?"
    return name, resolved.validity, on_front, *cells, resolved.changes or "-"


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
    rows = []
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
                "whole compiles" if target in found.whole_targets else "blocks",
            )
        )
    return Table(
        title="Steps composed from blocks against whole compiles",
        header=("target", "networks", "median, unfitted", "median", "worst", "priced by"),
        rows=tuple(rows),
        notes=("Errors of networks that the fit has not seen (each left out in turn).",),
    )


def _count_table(found: Found) -> Table:
    refused = sum(found.refusals.values())
    rows = [
        ("points of the space", f"{found.space['num_points']:,}"),
        ("trials", f"{found.num_trials:,}"),
        ("different networks priced", f"{len(found.networks):,}"),
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


def search_values(found: Found) -> dict[str, object]:
    """Returns JSON-ready values of everything that a search found."""
    whole = found.whole_s()
    return {
        "space": found.space["name"],
        "base": found.base.resolved.name,
        "targets": list(found.targets),
        "front": list(found.front),
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
        "composition": {
            target: {
                "errors": list(one.errors),
                "plain_errors": list(one.plain_errors),
                "coefficients": dict(one.coefficients),
                "constant_s": one.constant_s,
            }
            for target, one in found.compositions.items()
        },
        "refusals": dict(found.refusals),
        "num_points": found.space["num_points"],
        "num_trials": found.num_trials,
        "num_bounded": found.num_bounded,
        "blocks_compiled": found.num_compiled,
        "files": list(found.files),
        "seconds": found.seconds,
    }
