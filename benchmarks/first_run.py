"""Times what a newcomer meets: clone, install, quickstart, quickstart again, --help. Run by hand.

    python benchmarks/first_run.py

Everything happens in a new folder with an empty compile cache; uv's own package cache is used as
it is, so the installation is a download only where that is empty. Prints one line a figure.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

QUICKSTART = ["uv", "run", "jaxbench", "run", "quickstart"]


def timed(
    command: list[str], folder: Path, environment: dict[str, str]
) -> tuple[float, float, str]:
    """Runs a command; returns (seconds, peak resident MB of the process itself, its stdout)."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=output)
        peak = 0.0
        while process.poll() is None:
            peak = max(peak, _own_megabytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode:
            sys.exit(f"{' '.join(command)} ended with {process.returncode}")
        output.seek(0)
        return seconds, peak, output.read()


def _own_megabytes(pid: int) -> float:
    """Resident memory of the jaxbench process that the user started, not of its workers."""
    found = 0.0
    try:
        for member in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            line = member.cmdline()
            if any(part.endswith("/jaxbench") for part in line):
                found = max(found, member.memory_info().rss / 1e6)
    except psutil.Error:
        pass
    return found


def main() -> None:
    repository = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "jaxbench"
        subprocess.run(["git", "clone", "--quiet", str(repository), str(folder)], check=True)
        environment = {**os.environ, "JAXBENCH_CACHE": f"{name}/cache"}
        # Python keeps compiled modules unless told otherwise: a newcomer's does.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        environment.pop("VIRTUAL_ENV", None)
        cold_s, peak, table = timed(QUICKSTART, folder, environment)
        warm_s, _, _ = timed(QUICKSTART, folder, environment)
        help_command = [str(folder / ".venv/bin/jaxbench"), "--help"]
        helps = [timed(help_command, folder, environment)[0] for _ in range(7)]
        print(table)
        print(f"clone to table, installation included: {cold_s:.1f} s")
        print(f"again: {warm_s:.1f} s")
        print(f"--help: {statistics.median(helps):.2f} s, median of 7")
        print(f"peak memory of the parent: {peak:.0f} MB")


if __name__ == "__main__":
    main()
