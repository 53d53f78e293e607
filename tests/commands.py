"""Running the command line as its users do: in processes of its own, on a cache of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

CANDIDATES = Path(__file__).parent / "candidates"
_MARK = "JAXBENCH_TEST_MARK"


@pytest.fixture(scope="session")
def shared_cache(pytestconfig: pytest.Config) -> Path:
    """A cache that stays from one run of the tests to the next."""
    return pytestconfig.cache.mkdir("jaxbench-commands")  # type: ignore[union-attr]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One started command. Whatever it starts in turn carries its mark in the environment."""

    process: subprocess.Popen
    mark: str = field(repr=False)

    def finish(self, timeout_s: float = 300) -> tuple[int, str, str]:
        """Waits for its end; returns its exit code, stdout and stderr."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stdout, stderr

    def end(self) -> None:
        """Ends whatever is left of it, for a test that goes wrong."""
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ValueError):  # its pipes were read to their end before
            self.process.communicate()

    def left(self) -> list[psutil.Process]:
        """Returns the processes that carry the mark and still run."""
        return [process for process in psutil.process_iter() if _mark_of(process) == self.mark]


def _mark_of(process: psutil.Process) -> str | None:
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.environ().get(_MARK)
    except (psutil.Error, ProcessLookupError):  # psutil lets the second through now and then
        return None


def start(
    *command: Any,
    cache: Path,
    cwd: Path | None = None,
    pass_fds: tuple[int, ...] = (),
    **environment: str,
) -> Command:
    """Starts a Python command in a session of its own, as a terminal would."""
    mark = uuid.uuid4().hex
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Tests that a shell started in the background ignore Ctrl-C, and so would their children.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        env={**os.environ, "JAXBENCH_CACHE": str(cache), _MARK: mark, **environment},
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=pass_fds,
        start_new_session=True,
    )
    return Command(process=process, mark=mark)


def start_jaxbench(*arguments: Any, cache: Path, cwd: Path | None = None) -> Command:
    """Starts `jaxbench ARGUMENTS`."""
    return start("-m", "jaxbench.cli", *arguments, cache=cache, cwd=cwd)


def jaxbench(*arguments: Any, cache: Path, cwd: Path | None = None) -> tuple[int, str, str]:
    """Runs `jaxbench ARGUMENTS`; returns its exit code, stdout and stderr. It leaves no process."""
    command = start_jaxbench(*arguments, cache=cache, cwd=cwd)
    try:
        result = command.finish()
        wait_for(lambda: not command.left(), timeout_s=5)
    finally:
        command.end()
    return result


def wait_for(true: Callable[[], Any], *, timeout_s: float) -> Any:
    """Returns what `true` gives as soon as it is something; fails if that takes too long."""
    deadline = time.monotonic() + timeout_s
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)
    return found


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Reads the records of a folder as any tool would: whole lines of JSON."""
    path = folder / "records.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def error_line(stderr: str) -> str:
    """Returns the one line that stderr must be."""
    assert stderr.count("\n") == 1, stderr
    assert stderr.startswith("jaxbench: "), stderr
    assert "Traceback" not in stderr
    return stderr.removeprefix("jaxbench: ").rstrip("\n")
