"""Sessions in real processes, with steps that sleep: what each way to end leaves behind."""

import json
import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import CANDIDATES, wait_for

from jaxbench import run
from jaxbench.machine import describe_environment
from jaxbench.measure import protocol
from jaxbench.measure.doubts import Kind
from jaxbench.measure.protocol import PROTOCOL
from jaxbench.measure.session import Timed, time_together
from jaxbench.record import read_records
from jaxbench.worker import Job

NAMES = ("one", "two", "three")


def sleeping(*settings: dict[str, Any]) -> list[Job]:
    """Jobs of networks that sleep; steps of 5 ms unless said otherwise."""
    return [
        Job(name=name, function="jobs:open_sleeping", arguments={"step_s": 0.005, **one})
        for name, one in zip(NAMES, settings, strict=False)
    ]


def broken(job: Job) -> Job:
    """The same, but its stepper cannot be made."""
    return Job(name=job.name, function="jobs:keep_nothing", arguments={"text": "no such network"})


def workers() -> set[int]:
    """Workers of this process, by the fork server."""
    children = psutil.Process().children(recursive=True)
    return {child.pid for child in children if _leads(child)}


def _leads(process: psutil.Process) -> bool:
    try:
        return process.status() != "zombie" and os.getpgid(process.pid) == process.pid
    except (psutil.Error, ProcessLookupError):
        return False


@pytest.fixture(autouse=True)
def _chains_of_15_ms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "_CHAIN_S", 0.015)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    before = workers()
    yield
    wait_for(lambda: not workers() - before, timeout_s=5)


def session(jobs: list[Job], *, budget_s: float = 0.5) -> tuple[list[Timed], bool]:
    return time_together(jobs, budget_s=budget_s, precision=1e-6)


def test_time_together_measures_each_and_says_what_of() -> None:
    timed, interrupted = session(sleeping({}, {"step_s": 0.01}), budget_s=2.0)
    assert not interrupted
    assert [one.failure for one in timed] == [None, None]
    first, second = (one.measurement or {} for one in timed)
    assert json.loads(json.dumps(timed[0].measurement, allow_nan=False)) == first
    assert first["session"] == second["session"]
    for measured in (first, second):
        assert (measured["protocol"], measured["base"]) == (PROTOCOL, "one")
        assert measured["ended"] == "budget"
        assert measured["environment"] == describe_environment("bed")
        assert measured["yardstick_s"] == [0.001] * len(measured["yardstick_s"])
        assert measured["usage"].keys() == {"wall_s", "cores", "others_cores", "swapped_bytes"}
        assert measured["memory"] == {"resident_bytes": 2**20, "device": {}}
        assert {doubt["kind"] for doubt in measured["doubts"]} <= set(Kind)
        assert measured["num_copies"] == 2
        assert {row[5] for row in measured["chains"]} == {0, 1}
    # Sleeping ends late, never early.
    assert min(first["samples_s"]) > 0.0045
    assert min(second["samples_s"]) > 0.009
    assert first["warm_up"][0][0] == 1
    assert first["first_step_s"] == pytest.approx(first["warm_up"][0][1], abs=1e-6)
    assert all(0.5 < ratio < 2 for ratio in first["controls"]["same"])


@pytest.mark.parametrize(
    ("budget_s", "free_bytes", "copies"),
    [
        (0.5, 2**40, 2),
        (60.0, 2**40, 4),
        (60.0, 2**20, 1),  # no room for a second one of each
    ],
)
def test_time_together_takes_as_many_processes_as_time_and_memory_allow(
    budget_s: float, free_bytes: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=free_bytes))
    timed, _ = time_together(sleeping({}, {}), budget_s=budget_s, precision=1.0)
    measured = [one.measurement or {} for one in timed]
    assert [one["num_copies"] for one in measured] == [copies, copies]
    kinds = {doubt["kind"] for doubt in measured[1]["doubts"]}
    assert (Kind.ONE_PROCESS in kinds) == (copies == 1)


def test_time_together_base_that_cannot_be_made_gives_its_place_to_the_next() -> None:
    one, two, three = sleeping({}, {}, {})
    timed, _ = session([broken(one), two, three])
    failure = timed[0].failure
    assert failure is not None
    assert (failure.stage, failure.text) == ("measure", "no such network")
    assert timed[0].measurement is None
    assert [(one.measurement or {})["base"] for one in timed[1:]] == ["two", "two"]
    assert len((timed[1].measurement or {})["controls"]["same"]) >= 4


def test_time_together_nobody_that_can_be_made_gives_the_failures() -> None:
    timed, interrupted = session([broken(job) for job in sleeping({}, {})])
    assert not interrupted
    assert [one.measurement for one in timed] == [None, None]
    assert [one.failure.text for one in timed if one.failure] == ["no such network"] * 2


@pytest.mark.parametrize(
    ("how", "stage", "error"),
    [("fail_at", "measure", "MeasureError"), ("crash_at", "worker", "Crash")],
)
def test_time_together_rival_that_fails_keeps_what_it_gave_and_the_others_go_on(
    how: str, stage: str, error: str
) -> None:
    # Six chains of warm-up in each of two processes; in eight rounds each runs ten more.
    timed, _ = session(sleeping({}, {how: 10}, {}))
    assert [one.failure is None for one in timed] == [True, False, True]
    failure, measured = timed[1].failure, timed[1].measurement
    assert failure is not None
    assert (failure.stage, failure.error) == (stage, error)
    assert measured is not None
    assert measured["ended"] == "failed"
    assert 0 < len(measured["chains"]) < 20
    assert [(one.measurement or {})["ended"] for one in timed[::2]] == ["budget"] * 2


def test_time_together_rival_that_fails_before_any_long_chain_has_no_measurement() -> None:
    # Six chains of warm-up, or more where the machine is busy; so it fails within it.
    timed, _ = session(sleeping({}, {"fail_at": 2}))
    assert timed[1].measurement is None
    assert timed[1].failure is not None


@pytest.mark.parametrize("fail_at", [1, 10])
def test_time_together_base_that_fails_leaves_no_rival_without_a_word(fail_at: int) -> None:
    timed, _ = session(sleeping({"fail_at": fail_at}, {}))
    assert timed[0].failure is not None
    assert timed[1].measurement is not None or timed[1].failure is not None


@contextmanager
def ctrl_c_after(seconds: float) -> Iterator[Callable[..., None]]:
    """Gives what has to be called for it to come so much later; further calls do nothing."""
    armed = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def arm(*_: object) -> None:
        if not armed:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        armed.append(True)

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        yield arm
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def test_time_together_interrupt_gives_what_was_measured() -> None:
    jobs = sleeping({}, {})
    with ctrl_c_after(0.3) as after_a_round:
        timed, interrupted = time_together(
            jobs, budget_s=60.0, precision=1e-6, progress=after_a_round
        )
    assert interrupted
    for one in timed:
        assert one.failure is None
        assert (one.measurement or {})["ended"] == "interrupted"
        assert math.isfinite(sum((one.measurement or {})["samples_s"]))


def test_run_named_interrupt_before_any_chain_leaves_it_to_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs: list[Job], **_: Any) -> tuple[list[Timed], bool]:
        return [Timed(measurement=None, failure=None) for _ in jobs], True

    monkeypatch.setattr(run, "time_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.run_named(
            [str(CANDIDATES / "tiny.py")],
            out=tmp_path,
            targets=["cpu"],
            layout=None,
            measure=True,
            limits=run.Limits(),
            progress=lambda *_: None,
        )
    assert [record for record in read_records(tmp_path) if not record.is_lost] == []
