"""The simulator's environment: a Python of its own with MetaDrive, made once by uv."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxbench.cache import cache_dir, storage_errors
from jaxbench.errors import DataError
from jaxbench.run import Progress

SIMULATOR = "metadrive-simulator==0.4.3"
_PYTHON = "3.11"
_WITHOUT = (
    "Without it the small data set that ships with jaxbench is there (leave --data out), "
    "`build-data DIR --scenarionet FOLDER` or `--nuscenes FOLDER` makes one of data of your own, "
    "and verdicts stand without --rollout."
)


def simulator_python(progress: Progress) -> Path:
    """Makes the environment where it is not there yet, and returns its Python.

    Raises:
      DataError: if there is no uv, or the simulator cannot be installed.
    """
    folder = cache_dir() / "simulator" / SIMULATOR
    python, done = folder / "bin" / "python", folder / "complete"
    if done.exists() and python.exists():
        return python
    uv = shutil.which("uv")
    if uv is None:
        raise DataError(
            f"{SIMULATOR} needs uv to make its Python {_PYTHON}. Install uv. {_WITHOUT}"
        )
    progress("installing the simulator", 0, 1)
    with storage_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    run_simulator([uv, "venv", "--quiet", "--clear", "--python", _PYTHON, str(folder)])
    run_simulator([uv, "pip", "install", "--quiet", "--python", str(python), SIMULATOR])
    done.touch()
    return python


def run_simulator(command: Sequence[str]) -> None:
    """Runs a command.

    Raises:
      DataError: where it fails; one line that says how far one gets without.
    """
    ran: Any = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        text = " ".join(ran.stderr.split())[-300:] or "no word"
        what = " ".join(Path(part).name for part in command[:3])
        raise DataError(f"{what} ended with exit code {ran.returncode}: {text}. {_WITHOUT}")
