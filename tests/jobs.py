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

from jaxbench.errors import LayoutError, MeasureError
from jaxbench.measure.stepper import Chain, Probe

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
    frames = (entry.frame.f_locals for entry in inspect.stack())
    sender = next(found["sender"] for found in frames if "sender" in found)
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


class Kept:
    """What a conversation is held with: it counts, and ends in every way that there is."""

    def __init__(self, start: int = 0) -> None:
        self.total = start

    def add(self, number: int) -> int:
        """Changes what it keeps."""
        self.total += number
        return self.total

    def pid(self) -> int:
        """Returns its process."""
        return os.getpid()

    def fail(self, text: str) -> None:
        """Raises, after it changed what it keeps."""
        self.total += 1
        raise LayoutError(text)

    def unsendable(self) -> Any:
        """Returns what cannot leave the process."""
        return make_unsendable()

    def sleep(self, seconds: float) -> str:
        """Takes its time."""
        time.sleep(seconds)
        return f"slept {seconds} s"

    def abort(self) -> None:
        """Crashes."""
        abort()

    def leave(self, code: int) -> None:
        """Ends without a word."""
        leave(code)

    def eat(self, file: str) -> None:
        """Takes memory without end."""
        eat(file)

    def leave_child(self, file: str) -> str:
        """Starts something that goes on."""
        return leave_child(file)


def keep(start: int = 0) -> Kept:
    """Makes what a conversation is held with."""
    return Kept(start)


def keep_nothing(text: str) -> None:
    """Makes nothing."""
    raise LayoutError(text)


class SleepingStepper:
    """A stepper without a network: its steps sleep, and fail where they are told."""

    def __init__(self, step_s: float, fail_at: int, crash_at: int) -> None:
        self.step_s, self.fail_at, self.crash_at, self.num_chains = step_s, fail_at, crash_at, 0

    def chain(self, *, steps: int, extra_share: float = 0.0) -> Chain:
        """Sleeps."""
        self.num_chains += 1
        if self.num_chains == self.fail_at:
            raise MeasureError("made up for tests")
        if self.num_chains == self.crash_at:
            abort()
        start = time.perf_counter()
        time.sleep(steps * self.step_s * (1 + extra_share))
        seconds = time.perf_counter() - start
        return Chain(
            steps=steps,
            seconds=seconds,
            dispatch_s=seconds / 2,
            calendar_s=seconds,
            cpu_s=0.0,
            page_faults=0,
            page_loads=0,
            resident_bytes=2**20,
        )

    def probe(self) -> Probe:
        """Looks at nothing."""
        return Probe(yardstick_s=0.001, hash_cpu_s=0.0001)

    def about(self) -> dict[str, Any]:
        """Names no real device."""
        return {"device": "bed", "platform": "cpu", "pid": os.getpid()}

    def final_loss(self) -> float:
        """Counts chains."""
        return float(self.num_chains)

    def device_memory(self) -> dict[str, int]:
        """Keeps no account."""
        return {}


def open_sleeping(step_s: float, fail_at: int = 0, crash_at: int = 0) -> SleepingStepper:
    """Makes a stepper."""
    return SleepingStepper(step_s, fail_at, crash_at)
