"""What the tests of the workers let them do. Workers import it by name."""

import inspect
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from jaxbench.errors import LayoutError

_EAT = (
    "import time\neaten = []\nwhile True:\n    eaten.append(b'x' * 2**26)\n    time.sleep(0.03)\n"
)


def add(one: int, other: int) -> int:
    """Returns something."""
    return one + other


def make_large(size: int) -> bytes:
    """Returns more than a pipe holds."""
    return b"x" * size


def make_unsendable() -> Any:
    """Returns what cannot leave the process."""
    return lambda: None


def report_process() -> dict[str, Any]:
    """Returns what a worker is to the system."""
    return {
        "pid": os.getpid(),
        "group": os.getpgid(0),
        "main": getattr(sys.modules["__main__"], "__file__", None),
        "platforms": os.environ.get("JAX_PLATFORMS"),
    }


def write_noise() -> None:
    """Writes where a compiler writes."""
    print("noise on stdout")
    os.write(1, b"noise on descriptor 1\n")
    os.write(2, b"noise on descriptor 2\n")


def raise_error(text: str) -> None:
    """Raises an error of jaxbench's own."""
    raise LayoutError(text)


def raise_surprise(text: str) -> None:
    """Raises any other error."""
    raise ZeroDivisionError(text)


def leave(code: int) -> None:
    """Ends the process without a word."""
    os._exit(code)


def exit_politely() -> None:
    """Ends the process as a script does."""
    sys.exit(3)


def abort() -> None:
    """Ends as a failed check in C++ does."""
    os.write(2, b"Check failed: made up for tests\n")
    os.abort()


def kill(number: int) -> None:
    """Ends by a signal."""
    os.kill(os.getpid(), number)
    time.sleep(60)


def send_half() -> None:
    """Ends in the middle of sending its result."""
    sender = inspect.stack()[1].frame.f_locals["sender"]
    os.write(sender.fileno(), struct.pack("!i", 1000) + b"the first of a thousand bytes")
    os._exit(1)


def ignore_and_sleep(file: str) -> None:
    """Hears no polite signal and never ends; a child of its does neither."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    Path(file).write_text(json.dumps([os.getpid(), child.pid]))
    time.sleep(600)


def leave_child(file: str) -> str:
    """Returns at once, but what it started goes on."""
    child = subprocess.Popen(["sleep", "600"])
    Path(file).write_text(json.dumps([os.getpid(), child.pid]))
    return "done"


def crash_beside_child(file: str) -> None:
    """Crashes, but what it started goes on."""
    leave_child(file)
    os.abort()


def eat(file: str) -> None:
    """Takes memory without end, in itself."""
    Path(file).write_text(json.dumps([os.getpid()]))
    exec(_EAT)  # noqa: S102


def eat_in_child(file: str) -> None:
    """Takes memory without end, in a child."""
    child = subprocess.Popen([sys.executable, "-c", _EAT])
    Path(file).write_text(json.dumps([os.getpid(), child.pid]))
    child.wait()


def note_times(folder: str, name: str, seconds: float) -> None:
    """Notes when it starts and when it ends."""
    start = time.monotonic()
    time.sleep(seconds)
    (Path(folder) / name).write_text(json.dumps([start, time.monotonic()]))
