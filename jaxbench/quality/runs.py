"""Training runs kept as JSON lines: found again by what was asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxbench.errors import DataError
from jaxbench.lines import append_line, read_lines

RUNS = "runs.jsonl"


class Runs:
    """The runs of a folder, all on the same data."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._path = folder / RUNS
        self._known = {run["run"]: run for run in read_lines(self._path)}
        others = {run["data"] for run in self._known.values()} - {digest}
        if others:
            raise DataError(
                f"{self._path} holds runs on data {min(others)[:12]}, and this is data "
                f"{digest[:12]}: they cannot be compared. Give another --out."
            )

    def find(self, key: str) -> dict[str, Any] | None:
        """Returns a run by its key."""
        return self._known.get(key)

    def keep(self, run: dict[str, Any]) -> None:
        """Appends a run."""
        append_line(self._path, run)
        self._known[run["run"]] = run
