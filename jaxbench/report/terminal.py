"""Tables and progress for people at a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.table import Table as RichTable

from jaxbench.report.tables import Table


def print_tables(tables: Sequence[Table]) -> None:
    """Prints tables to stdout; to a pipe they are not cut to any width."""
    console = Console(width=None if sys.stdout.isatty() else 250, highlight=False)
    for table in tables:
        shown = RichTable(title=table.title, title_justify="left", title_style="bold")
        for index, name in enumerate(table.header):
            shown.add_column(name, justify="left" if index == 0 else "right", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown) if table.rows else console.print(f"[bold]{table.title}[/bold]: none")
        for note in table.notes:
            console.print(note, markup=False)
        console.print()


@contextlib.contextmanager
def progress_line() -> Iterator[Callable[[str, int, int], None]]:
    """Yields `progress(what, done, total)`, which rewrites a line of stderr on a terminal."""
    started = time.monotonic()
    shown = sys.stderr.isatty()

    def progress(what: str, done: int, total: int) -> None:
        left_s = (time.monotonic() - started) / max(done, 1) * (total - done)
        text = f"{done}/{total} {what.split(' [')[0]}, about {left_s:.0f} s left"
        sys.stderr.write(f"\r\x1b[2K{text[:120]}")
        sys.stderr.flush()

    try:
        yield progress if shown else lambda what, done, total: None
    finally:
        if shown:
            sys.stderr.write("\r\x1b[2K")
