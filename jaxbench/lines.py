"""Files of JSON lines that several processes append to: a line is there whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxbench.cache import storage_errors


def append_line(
    path: Path, values: Mapping[str, Any], *, unless: Callable[[], bool] = lambda: False
) -> bool:
    """Appends values as a line, and makes the file where there is none.

    Args:
      unless: Asked while no other process can append; if it says so, nothing is.

    Returns:
      Whether it was appended.

    Raises:
      StorageError: if the line cannot be written; what was there before stays.
    """
    line = (json.dumps(values, allow_nan=False) + "\n").encode()
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if unless():
                return False
            _write_whole(descriptor, line)
        finally:
            os.close(descriptor)
    return True


def _write_whole(descriptor: int, line: bytes) -> None:
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line  # a writer was killed in the middle of its line
    try:
        written = 0
        while written < len(line):
            written += os.write(descriptor, line[written:])
        os.fsync(descriptor)
    except OSError:
        os.ftruncate(descriptor, size)
        raise


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yields each line's values; one that was written half, or is no object, is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict):
                yield values
