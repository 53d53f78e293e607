"""The machine: fingerprints, whose load it was, and energy counters made of files."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from commands import wait_for

from jaxbench import machine
from jaxbench.machine import Meter, describe_environment, read_energy

_BUSY = "while True: pass"


def test_describe_environment_same_machine_has_the_same_fingerprint() -> None:
    one, other = describe_environment("cpu"), describe_environment("cpu")
    assert one == other
    assert one["device"] == "cpu"
    assert one["cores"] >= 1
    assert one["memory_bytes"] == psutil.virtual_memory().total
    assert int(one["fingerprint"], 16) >= 0


def fingerprint(
    monkeypatch: pytest.MonkeyPatch, device: str = "cpu", **changes: Any
) -> tuple[str, dict[str, Any]]:
    with monkeypatch.context() as patch:
        if "total" in changes:
            memory = SimpleNamespace(total=changes["total"])
            patch.setattr(machine.psutil, "virtual_memory", lambda: memory)
        if "cores" in changes:
            patch.setattr(machine.os, "cpu_count", lambda: changes["cores"])
        if "processor" in changes:
            patch.setattr(machine, "processor", lambda: changes["processor"])
        found = describe_environment(device)
    return found["fingerprint"], found


@pytest.mark.parametrize(
    "change",
    [{"device": "NVIDIA H100"}, {"cores": 999}, {"processor": "model name\t: other"}, {"total": 1}],
)
def test_describe_environment_other_machine_has_another_fingerprint(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    assert fingerprint(monkeypatch, **change)[0] != fingerprint(monkeypatch)[0]


def test_describe_environment_few_bytes_less_memory_are_the_same_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, found = fingerprint(monkeypatch, total=8 * 2**30)
    other, _ = fingerprint(monkeypatch, total=8 * 2**30 - 2**20)  # a kernel keeps some for itself
    assert one == other
    assert found["memory_bytes"] == 8 * 2**30


def test_describe_environment_processor_is_named_without_its_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, found = fingerprint(monkeypatch, processor="model name\t: Some CPU @ 2: fast")
    assert found["processor"] == "Some CPU @ 2: fast"
    _, found = fingerprint(monkeypatch, processor="arm64")
    assert found["processor"] == "arm64"


@pytest.fixture
def busy() -> Iterator[psutil.Process]:
    """A process that does nothing but compute."""
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as process:
        yield psutil.Process(process.pid)
        process.kill()


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def test_meter_busy_process_is_others_load_unless_it_is_ours(busy: psutil.Process) -> None:
    before_s = cpu_s(busy)
    unaware, aware = Meter(), Meter([busy.pid])
    wait_for(lambda: cpu_s(busy) - before_s > 1.0, timeout_s=60)
    its, ours = unaware.read(), aware.read()
    spent_s = cpu_s(busy) - before_s
    # All that others did besides is in both. Kernels count in ticks of 10 ms; 0.15 s are left for
    # the time between the two readings.
    apart_s = its.others_cores * its.wall_s - ours.others_cores * ours.wall_s
    assert apart_s == pytest.approx(spent_s, abs=0.15)
    assert its.others_cores * its.wall_s > 0.8
    assert its.others_cores < its.cores + 0.5


def test_meter_process_that_has_ended_counts_as_last_seen(busy: psutil.Process) -> None:
    wait_for(lambda: cpu_s(busy) > 0.2, timeout_s=60)
    meter = Meter([busy.pid])
    busy.kill()
    wait_for(lambda: not busy.is_running() or busy.status() == "zombie", timeout_s=10)
    usage = meter.read()
    assert 0 <= usage.others_cores < usage.cores + 0.5


def test_meter_process_that_never_was_is_passed_over() -> None:
    usage = Meter([2**22 + 1]).read()
    assert usage.others_cores >= 0


def test_meter_tells_wall_time_cores_and_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    swapped = iter([SimpleNamespace(sin=100, sout=7), SimpleNamespace(sin=300, sout=7)])
    monkeypatch.setattr(machine.psutil, "swap_memory", lambda: next(swapped))
    meter = Meter()
    time.sleep(0.05)
    usage = meter.read()
    assert 0.05 <= usage.wall_s < 10
    assert usage.cores >= 1
    assert usage.swapped_bytes == 200


# --- Energy ---------------------------------------------------------------------------------------


@pytest.fixture
def rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as the kernel's, empty, on a machine without NVIDIA's library."""
    monkeypatch.setattr(machine, "_RAPL", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return tmp_path


def write_counter(rapl: Path, domain: str, name: str, microjoules: int | str) -> None:
    (rapl / domain).mkdir(exist_ok=True)
    (rapl / domain / "name").write_text(f"{name}\n")
    (rapl / domain / "energy_uj").write_text(f"{microjoules}\n")


def test_read_energy_absent_is_said_in_words(rapl: Path) -> None:
    joules, missing = read_energy()
    assert joules == {}
    assert missing == f"no RAPL counters under {rapl}; no pynvml for NVIDIA GPUs"
    rapl.rmdir()
    assert read_energy() == (joules, missing)


def test_read_energy_packages_are_read_in_joules_and_their_parts_are_not(rapl: Path) -> None:
    write_counter(rapl, "intel-rapl:0", "package-0", 1_500_000)
    write_counter(rapl, "intel-rapl:1", "package-1", 250_000)
    write_counter(rapl, "intel-rapl:0:0", "core", 900_000)
    (rapl / "intel-rapl").mkdir()
    assert read_energy() == ({"package-0": 1.5, "package-1": 0.25}, "")


def test_read_energy_counter_that_cannot_be_read_is_said_in_words(rapl: Path) -> None:
    write_counter(rapl, "intel-rapl:0", "package-0", "no number")
    (rapl / "intel-rapl:1").mkdir()
    joules, missing = read_energy()
    assert joules == {}
    assert "intel-rapl:0: ValueError" in missing
    assert "intel-rapl:1: FileNotFoundError" in missing


def test_meter_energy_is_what_the_counters_rose_by(rapl: Path) -> None:
    write_counter(rapl, "intel-rapl:0", "package-0", 1_500_000)
    write_counter(rapl, "intel-rapl:1", "package-1", 9_000_000)
    meter = Meter()
    write_counter(rapl, "intel-rapl:0", "package-0", 4_000_000)
    write_counter(rapl, "intel-rapl:1", "package-1", 1)  # it has wrapped
    usage = meter.read()
    assert usage.energy_joules == {"package-0": 2.5}
    assert usage.energy_missing == ""


def test_meter_without_counters_says_why(rapl: Path) -> None:
    usage = Meter().read()
    assert usage.energy_joules == {}
    assert "no RAPL counters" in usage.energy_missing


class _NVMLError(Exception):
    pass


def fake_nvml(millijoules: list[int], error: str = "") -> SimpleNamespace:
    def start() -> None:
        if error:
            raise _NVMLError(error)

    return SimpleNamespace(
        NVMLError=_NVMLError,
        nvmlInit=start,
        nvmlDeviceGetCount=lambda: len(millijoules),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: millijoules[handle],
    )


def test_read_energy_gpus_are_read_in_joules(rapl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([2500, 10]))
    assert read_energy() == ({"gpu-0": 2.5, "gpu-1": 0.01}, "")


def test_read_energy_driver_that_is_not_there_is_said_in_words(
    rapl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml([], error="Driver Not Loaded"))
    joules, missing = read_energy()
    assert joules == {}
    assert "NVML: Driver Not Loaded" in missing
