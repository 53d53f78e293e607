"""The same tables as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxbench.cache import storage_errors
from jaxbench.compare import compare_rivals
from jaxbench.record import Record
from jaxbench.report.measured import session_tables
from jaxbench.report.tables import (
    Table,
    agreement_table,
    flip_table,
    overhead_table,
    regret_table,
    signal_table,
    speed_table,
)


def render_page(title: str, about: str, records: Sequence[Record]) -> str:
    """Returns a page with every table of a folder of records."""
    comparisons = compare_rivals(records)
    versions = {
        f"{name} {version}" for record in records for name, version in record.versions.items()
    }
    tables = [
        speed_table(records),
        flip_table(comparisons),
        agreement_table(comparisons),
        regret_table(records),
        signal_table(comparisons),
        *session_tables(records),
        overhead_table(records),
    ]
    made_with = ", ".join(sorted(versions))
    head = f"# {title}\n\n{about}\n\n{len(records)} records. Made with {made_with}.\n"
    return head + "".join(render_table(table) for table in tables)


def write_tables(
    page: Path, title: str, about: str, tables: Sequence[Table], pictures: Mapping[str, bytes]
) -> None:
    """Writes a page of tables; pictures, by file name, lie beside it and come first."""
    with storage_errors(page):
        page.parent.mkdir(parents=True, exist_ok=True)
        for name, raw in pictures.items():
            (page.parent / name).write_bytes(raw)
        shown = "".join(f"\n![{name.partition('.')[0]}]({name})\n" for name in pictures)
        body = "".join(render_table(table) for table in tables)
        page.write_text(f"# {title}\n\n{about}\n{shown}{body}", encoding="utf-8")


def render_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.strip().replace("|", "\\|") for cell in cells) + " |\n"

    body = "".join(map(line, table.rows)) if table.rows else ""
    rule = line(["---"] * len(table.header))
    text = line(table.header) + rule + body if table.rows else "None.\n"
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return f"\n## {table.title}\n\n{text}{notes}"
