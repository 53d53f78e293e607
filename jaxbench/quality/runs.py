"""Training runs as JSON lines: appended as soon as they end, found again by what was asked."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.errors import DataError

RUNS = "runs.jsonl"


class Runs:
    """Training runs as JSON lines, appended as soon as they end."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._path = folder / RUNS
        with cache.storage_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        self._known = {run["run"]: run for run in read_runs(folder)}
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
        """Appends a run, whole or not at all."""
        line = (json.dumps(run) + "\n").encode()
        with cache.storage_errors(self._path), self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._known[run["run"]] = run


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Reads a folder's training runs; a half-written line is passed over."""
    path, found = folder / RUNS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found
