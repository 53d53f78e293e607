"""What this machine is and does, as far as compiled code and timings depend on it."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_RAPL = Path("/sys/class/powercap")
_GIB = 2**30


@functools.cache
def processor() -> str:
    """Returns the processor's name as its system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith("model name")), platform.processor())


def describe_environment(device: str) -> dict[str, Any]:
    """Describes what timings on this machine depend on; equal fingerprints may be compared.

    Args:
      device: Kind of the device that was timed.
    """
    from jaxbench.cache import key_of

    found = {
        "device": device,
        "processor": processor().partition(": ")[2] or processor(),
        "cores": os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.machine()}",
    }
    same = {**found, "memory_bytes": round(found["memory_bytes"] / _GIB)}
    return {**found, "fingerprint": key_of(same)[:16]}


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What happened on the machine between two moments.

    Attributes:
      others_cores: Cores, on average, that neither idled nor worked for us; what a hypervisor took
        away counts.
      energy_joules: By counter (`package-0`, ...); empty where the system offers none.
      energy_missing: Why there is none.
    """

    wall_s: float
    cores: int
    others_cores: float
    swapped_bytes: int
    energy_joules: Mapping[str, float]
    energy_missing: str


class Meter:
    """Watches the machine from its making until `read`."""

    def __init__(self, pids: Iterable[int] = ()) -> None:
        self._processes = [psutil.Process(os.getpid()), *_processes(pids)]
        self._seen_s: dict[int, float] = {}
        self._started = time.monotonic()
        self._busy_s, self._own_s = _busy_s(), self._ours_s()
        self._swapped_bytes = _swapped_bytes()
        self._energy, self._energy_missing = read_energy()

    def read(self) -> Usage:
        """Returns what happened since. A process that has ended counts as it was last seen."""
        wall_s = max(time.monotonic() - self._started, 1e-9)
        others_s = (_busy_s() - self._busy_s) - (self._ours_s() - self._own_s)
        energy, missing = read_energy()
        return Usage(
            wall_s=wall_s,
            cores=os.cpu_count() or 1,
            others_cores=max(0.0, others_s / wall_s),
            swapped_bytes=_swapped_bytes() - self._swapped_bytes,
            energy_joules={
                name: joules - self._energy[name]
                for name, joules in energy.items()
                if name in self._energy and joules >= self._energy[name]
            },
            energy_missing=missing,
        )

    def _ours_s(self) -> float:
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seen_s[process.pid] = times.user + times.system
        return sum(self._seen_s.values())


def _processes(pids: Iterable[int]) -> list[psutil.Process]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found.append(psutil.Process(pid))
    return found


def _busy_s() -> float:
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    # Linux counts guests under user as well.
    return sum(times) - idle - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)


def _swapped_bytes() -> int:
    with contextlib.suppress(OSError, RuntimeError):
        memory = psutil.swap_memory()
        return memory.sin + memory.sout
    return 0


def read_energy() -> tuple[dict[str, float], str]:
    """Returns (joules by counter, why there are none); a counter starts at an arbitrary value.

    Intel's and AMD's packages through RAPL, NVIDIA's GPUs through NVML where `pynvml` is installed.
    """
    found, reasons = {}, []
    domains = sorted(_RAPL.glob("intel-rapl:?")) if _RAPL.exists() else []
    for domain in domains:
        try:
            name = (domain / "name").read_text().strip()
            found[name] = int((domain / "energy_uj").read_text()) / 1e6
        except (OSError, ValueError) as error:
            reasons.append(f"{domain.name}: {error.__class__.__name__}")
    if not domains:
        reasons.append(f"no RAPL counters under {_RAPL}")
    gpus, reason = _gpu_energy()
    found.update(gpus)
    reasons.append(reason)
    return found, "" if found else "; ".join(filter(None, reasons))


def _gpu_energy() -> tuple[dict[str, float], str]:
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}, "no pynvml for NVIDIA GPUs"
    try:
        pynvml.nvmlInit()
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())
        ]
        return {
            f"gpu-{index}": pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
            for index, handle in enumerate(handles)
        }, ""
    except pynvml.NVMLError as error:
        return {}, f"NVML: {error}"
