"""What there is: candidates, targets and suites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxbench.discovery import family_modules
from jaxbench.report.tables import Table
from jaxbench.run import describe
from jaxbench.suite import load_suite, suite_names
from jaxbench.target import chip_table, missing_compiler


def list_everything(what: str | None) -> dict[str, Any]:
    """Returns the tables and JSON-ready values of one kind of thing, or of all three."""
    makers = {"suites": _suites, "targets": _targets, "candidates": _candidates}
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


def _candidates() -> tuple[list[dict[str, Any]], Table]:
    described = describe(family_modules())
    rows = tuple(
        (one["name"], one["size"], one["validity"], one["replaces"] or "the base", one["source"])
        for one in described
    )
    header = ("candidate", "size", "class", "what it changes", "source")
    return described, Table(title="Candidates", header=header, rows=rows)
