"""What there is: candidates, targets, suites and search spaces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxbench.discovery import family_modules
from jaxbench.errors import UsageError
from jaxbench.report.tables import Table, format_number
from jaxbench.run import Progress, describe, families_of
from jaxbench.sizes import size_candidates
from jaxbench.suite import load_suite, suite_names
from jaxbench.target import chip_table, missing_compiler
from jaxbench.worker import call_in_worker


def list_everything(
    what: str | None, families: Sequence[str], progress: Progress
) -> dict[str, Any]:
    """Returns the tables and JSON-ready values of one kind of thing, or an overview of all.

    Args:
      what: `candidates`, with their sizes, `targets`, `suites` or `spaces`; None for suites,
        spaces, targets and families.
      families: Families whose candidates are listed; all if empty.
      progress: Is told of what is counted; sizes that are not in the cache take seconds each.

    Raises:
      UsageError: if there is no such family, or families of something else are asked for.
    """
    if families and what != "candidates":
        raise UsageError(f"{what} has no families. Write jaxbench list candidates FAMILY.")
    if what == "candidates":
        described, tables = _candidates(_modules(families), progress)
        return {"values": {"candidates": described}, "tables": tables}
    makers = {
        "suites": _suites,
        "spaces": _spaces,
        "targets": _targets,
        "candidates": _families,
    }
    chosen = [what] if what else list(makers)
    found = {name: makers[name]() for name in chosen}
    return {
        "values": {name: values for name, (values, _) in found.items()},
        "tables": [table for _, table in found.values()],
    }


def _suites() -> tuple[list[dict[str, Any]], Table]:
    suites = [load_suite(name) for name in suite_names()]
    values = [{"name": suite.name, "about": suite.about} for suite in suites]
    rows = tuple((suite.name, suite.about) for suite in suites)
    return values, Table(title="Suites", header=("suite", "about"), rows=rows)


def _spaces() -> tuple[list[dict[str, Any]], Table]:
    values = call_in_worker("jaxbench.search.server:describe_spaces")
    rows = tuple(
        (one["name"], one["base"], f"{one['num_points']:,}", ", ".join(one["choices"]))
        for one in values
    )
    header = ("space", "base", "points", "choices")
    note = "`jaxbench search SPACE` looks for faster networks in one."
    return values, Table(title="Search spaces", header=header, rows=rows, notes=(note,))


def _targets() -> tuple[list[dict[str, Any]], Table]:
    values = [
        {
            "chip": chip.name,
            "devices_per_chip": chip.devices_per_chip,
            "example": _EXAMPLE[chip.kind].format(
                chip=chip, dims="x".join(["4"] * chip.topology_dims)
            ),
            "missing": missing_compiler(chip.kind),
        }
        for chip in chip_table().values()
    ]
    rows = tuple(
        (
            row["chip"],
            str(row["devices_per_chip"]),
            row["example"],
            row["missing"] or "compiles here",
        )
        for row in values
    )
    header = ("chip", "devices a chip", "with a topology", "state")
    return values, Table(title="Targets", header=header, rows=rows)


_EXAMPLE: Mapping[str, str] = {
    "cpu": "cpu:8",
    "tpu": "{chip.name}:{dims}",
    "gpu": "{chip.name}:{chip.gpus_per_host}",
}


def _families() -> tuple[list[dict[str, Any]], Table]:
    described = describe(family_modules())
    rows = []
    for family, group in _by_family(described).items():
        counts = Counter(one["size"] for one in group)
        pairs = sum(one["base"] != one["name"] for one in group)
        by_size = ", ".join(f"{count} {size}" for size, count in counts.items())
        rows.append((family, by_size, str(pairs)))
    header = ("family", "candidates by size", "variants of a base")
    note = "`jaxbench list candidates FAMILY` shows each, with its size and what it changes."
    return described, Table(title="Families", header=header, rows=tuple(rows), notes=(note,))


def _modules(families: Sequence[str]) -> list[str]:
    known = family_modules()
    names = [module.rpartition(".")[2] for module in known]
    for family in families:
        if family not in names:
            raise UsageError(f"Unknown family {family!r}. There are {', '.join(names)}.")
    return families_of(families) if families else known


def _candidates(modules: list[str], progress: Progress) -> tuple[list[dict[str, Any]], list[Table]]:
    described = size_candidates(describe(modules), progress)
    return described, [
        Table(
            title=f"Family {family}",
            header=(
                "candidate",
                "parameters",
                "forward GFLOPs a sample",
                "class",
                "what it changes",
            ),
            rows=tuple(_candidate_row(one) for one in group),
            notes=(*dict.fromkeys(one["source"] for one in group), "GFLOPs: forward and loss."),
        )
        for family, group in _by_family(described).items()
    ]


def _by_family(described: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in described:
        groups.setdefault(one["family"], []).append(one)
    return groups


def _candidate_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    params, flops = one["num_params"], one["forward_flops"]
    return (
        one["name"],
        "?" if params is None else f"{params:,}",
        "?" if flops is None else format_number(flops / 1e9),
        one["validity"],
        one["replaces"],
    )
