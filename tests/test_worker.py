"""Workers: what a job gives however it ends, and that nothing of it stays behind."""

import itertools
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import wait_for

from jaxbench.errors import Failure, JaxbenchError
from jaxbench.worker import Conversation, Job, call_in_worker, run_jobs

GIB = 2**30


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXBENCH_CACHE", str(tmp_path / "cache"))


def job(function: str, **options: Any) -> Job:
    settings = {
        key: options.pop(key) for key in ("limit_s", "limit_bytes", "alone") if key in options
    }
    return Job(
        name=f"{function} {options}", function=f"jobs:{function}", arguments=options, **settings
    )


def run_one(asked: Job) -> Any:
    ((done, result),) = run_jobs([asked], num_workers=1)
    assert done is asked
    return result


def alive(pids: list[int]) -> list[int]:
    """Those that still run, or any of their process groups."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.pid in pids or os.getpgid(process.pid) in pids:
                left.append(process.pid)
        except (psutil.Error, ProcessLookupError):
            continue
    return left


def read_pids(file: Path) -> list[int]:
    return json.loads(file.read_text())


def test_run_jobs_results_come_with_their_job() -> None:
    jobs = [job("add", one=index, other=10) for index in range(5)]
    results = dict(_by_name(run_jobs(jobs, num_workers=2)))
    assert results == {asked.name: index + 10 for index, asked in enumerate(jobs)}


def _by_name(pairs: Iterator[tuple[Job, Any]]) -> Iterator[tuple[str, Any]]:
    return ((done.name, result) for done, result in pairs)


def test_run_jobs_no_jobs_gives_nothing() -> None:
    assert list(run_jobs([], num_workers=2)) == []


def test_run_jobs_large_result_arrives_whole() -> None:
    assert run_one(job("make_large", size=20_000_000)) == b"x" * 20_000_000


def test_run_jobs_worker_leads_a_group_and_is_not_the_callers_script() -> None:
    found = run_one(job("report_process"))
    assert found["group"] == found["pid"]
    assert found["main"] is None or "pytest" not in found["main"]
    assert found["platforms"] == "cpu"
    assert not alive([found["pid"]])


def test_run_jobs_output_of_worker_stays_off_the_screen(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_one(job("write_noise")) is None
    assert capfd.readouterr() == ("", "")


def test_run_jobs_own_error_becomes_failure() -> None:
    assert run_one(job("raise_error", text="3 does not divide over 2.\nUse 4.")) == Failure(
        stage="worker", error="LayoutError", text="3 does not divide over 2. Use 4."
    )


def test_run_jobs_other_error_becomes_failure_of_its_first_line() -> None:
    failure = run_one(job("raise_surprise", text="first\nsecond"))
    assert (failure.error, failure.text) == ("ZeroDivisionError", "first")
    failure = run_one(job("raise_surprise", text=""))
    assert (failure.error, failure.text) == ("ZeroDivisionError", "ZeroDivisionError")


def test_run_jobs_unknown_function_becomes_failure() -> None:
    failure = run_one(Job(name="nothing", function="jobs:nothing"))
    assert (failure.stage, failure.error) == ("worker", "AttributeError")


def test_run_jobs_unsendable_result_becomes_failure() -> None:
    failure = run_one(job("make_unsendable"))
    assert isinstance(failure, Failure)
    assert failure.stage == "worker"


def test_run_jobs_system_exit_becomes_failure() -> None:
    assert run_one(job("exit_politely")).error == "SystemExit"


@pytest.mark.parametrize("name", ["SIGABRT", "SIGSEGV", "SIGKILL"])
def test_run_jobs_signal_becomes_crash_that_names_it(name: str) -> None:
    asked = job("abort") if name == "SIGABRT" else job("kill", number=signal.Signals[name])
    failure = run_one(asked)
    assert (failure.stage, failure.error) == ("worker", "Crash")
    assert name in failure.text
    assert ("memory" in failure.text) == (name == "SIGKILL")


def test_run_jobs_crash_keeps_its_log_and_says_where() -> None:
    failure = run_one(job("abort"))
    log = Path(failure.text.partition("log: ")[2])
    assert "Check failed: made up for tests" in log.read_text()


def test_run_jobs_exit_without_result_becomes_crash_with_its_code() -> None:
    failure = run_one(job("leave", code=7))
    assert failure.error == "Crash"
    assert "exit code 7" in failure.text


def test_run_jobs_half_sent_result_becomes_crash() -> None:
    failure = run_one(job("send_half"))
    assert failure.error == "Crash"
    assert "exit code 1" in failure.text


def test_run_jobs_time_limit_ends_worker_and_child(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    failure = run_one(job("ignore_and_sleep", file=str(file), limit_s=2.0))
    assert (failure.stage, failure.error) == ("worker", "Timeout")
    assert "2 s" in failure.text
    assert "--limit-s" in failure.text
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)


@pytest.mark.parametrize("where", ["eat", "eat_in_child"])
def test_run_jobs_memory_limit_ends_worker_and_child(tmp_path: Path, where: str) -> None:
    file = tmp_path / "pids"
    failure = run_one(job(where, file=str(file), limit_bytes=GIB, limit_s=60.0))
    assert (failure.stage, failure.error) == ("worker", "MemoryLimit")
    assert "1.0 GiB" in failure.text
    assert "--limit-gib" in failure.text
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)


@pytest.mark.parametrize("how", ["leave_child", "crash_beside_child"])
def test_run_jobs_child_that_outlives_its_worker_is_ended(tmp_path: Path, how: str) -> None:
    file = tmp_path / "pids"
    result = run_one(job(how, file=str(file)))
    assert result == "done" or result.error == "Crash"
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)


def test_run_jobs_bad_ends_leave_other_jobs_alone(tmp_path: Path) -> None:
    jobs = [
        job("ignore_and_sleep", file=str(tmp_path / "pids"), limit_s=1.5),
        job("abort"),
        job("add", one=1, other=1),
        job("raise_surprise", text="no"),
        job("add", one=2, other=2),
        job("leave", code=1),
        job("add", one=3, other=3),
    ]
    results = dict(_by_name(run_jobs(jobs, num_workers=2)))
    given = [results[asked.name] for asked in jobs]
    assert [one for one in given if not isinstance(one, Failure)] == [2, 4, 6]
    errors = [one.error for one in given if isinstance(one, Failure)]
    assert errors == ["Timeout", "Crash", "ZeroDivisionError", "Crash"]


def test_run_jobs_alone_runs_last_and_while_no_other_does(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    jobs = [
        job("note_times", folder=str(tmp_path), name=name, seconds=0.4, alone=name in "ac")
        for name in names
    ]
    assert [result for _, result in run_jobs(jobs, num_workers=2)] == [None] * 5
    times = {name: tuple(json.loads((tmp_path / name).read_text())) for name in names}
    for one, other in itertools.combinations(names, 2):
        overlap = min(times[one][1], times[other][1]) > max(times[one][0], times[other][0])
        assert not (overlap and {one, other} & {"a", "c"}), times
    assert max(times[name][1] for name in "bde") < min(times[name][0] for name in "ac")


def test_run_jobs_never_more_than_num_workers(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d", "e"]
    jobs = [job("note_times", folder=str(tmp_path), name=name, seconds=0.5) for name in names]
    assert len(list(run_jobs(jobs, num_workers=2))) == 5
    times = [json.loads((tmp_path / name).read_text()) for name in names]
    running = [sum(low <= start < high for low, high in times) for start, _ in times]
    assert max(running) == 2


def test_run_jobs_left_early_ends_what_runs(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    jobs = [job("ignore_and_sleep", file=str(file)), job("add", one=1, other=2)]
    results = run_jobs(jobs, num_workers=2)
    assert next(results) == (jobs[1], 3)
    wait_for(lambda: file.exists() and file.read_text(), timeout_s=10)
    assert len(alive(read_pids(file))) == 2
    results.close()
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)


def test_run_jobs_error_in_the_callers_loop_ends_what_runs(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    jobs = [job("ignore_and_sleep", file=str(file)), job("add", one=1, other=2)]

    def consume() -> None:
        for _ in run_jobs(jobs, num_workers=2):
            wait_for(lambda: file.exists() and file.read_text(), timeout_s=10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        consume()
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)


def test_call_in_worker_returns_or_raises_the_text() -> None:
    assert call_in_worker("jobs:add", one=2, other=3) == 5
    with pytest.raises(JaxbenchError, match="no such thing"):
        call_in_worker("jobs:raise_error", text="no such thing")


# --- Conversations --------------------------------------------------------------------------------


@pytest.fixture
def talk() -> Iterator[Conversation]:
    with Conversation(job("keep", start=10)) as conversation:
        yield conversation


def test_conversation_answers_of_one_object_that_it_keeps(talk: Conversation) -> None:
    assert talk.wait_ready() is None
    assert talk.ask("add", number=2) == 12
    assert talk.ask("add", number=3) == 15
    assert talk.ask("pid") == talk.pid


def test_conversation_two_at_once_keep_apart(talk: Conversation) -> None:
    with Conversation(job("keep")) as other:
        assert other.ask("add", number=1) == 1
        assert talk.ask("add", number=1) == 11
        assert other.pid != talk.pid


def test_conversation_exception_is_a_failure_and_the_object_lives_on(talk: Conversation) -> None:
    assert talk.ask("fail", text="3 does not divide over 2.\nUse 4.") == Failure(
        stage="measure", error="LayoutError", text="3 does not divide over 2. Use 4."
    )
    assert talk.ask("nothing_of_this_name").error == "AttributeError"
    failure = talk.ask("unsendable")
    assert isinstance(failure, Failure)
    assert failure.stage == "measure"
    assert talk.ask("add", number=0) == 11


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [("abort", {}, "SIGABRT"), ("leave", {"code": 7}, "exit code 7")],
)
def test_conversation_crash_is_the_answer_to_every_later_call(
    talk: Conversation, method: str, arguments: dict[str, Any], says: str
) -> None:
    failure = talk.ask(method, **arguments)
    assert (failure.stage, failure.error) == ("worker", "Crash")
    assert says in failure.text
    assert talk.ask("add", number=1) == failure
    assert talk.wait_ready() == failure
    assert Path(failure.text.partition("log: ")[2]).exists()


def test_conversation_worker_killed_between_two_calls_is_a_crash(talk: Conversation) -> None:
    assert talk.ask("add", number=1) == 11
    os.kill(talk.pid, signal.SIGKILL)
    wait_for(lambda: not alive([talk.pid]), timeout_s=10)
    failure = talk.ask("add", number=1)
    assert (failure.stage, failure.error) == ("worker", "Crash")
    assert "SIGKILL" in failure.text
    assert talk.ask("add", number=1) == failure


def test_conversation_time_limit_is_the_answer_to_every_later_call(talk: Conversation) -> None:
    assert talk.ask("sleep", seconds=0.3, limit_s=30.0) == "slept 0.3 s"
    failure = talk.ask("sleep", seconds=600.0, limit_s=1.0)
    assert (failure.stage, failure.error) == ("worker", "Timeout")
    assert "1 s" in failure.text
    assert talk.ask("add", number=1) == failure
    assert not alive([talk.pid])


def test_conversation_memory_limit_is_the_answer_to_every_later_call(tmp_path: Path) -> None:
    with Conversation(job("keep", limit_bytes=GIB)) as talk:
        assert talk.ask("add", number=1) == 1
        failure = talk.ask("eat", file=str(tmp_path / "pids"), limit_s=60.0)
        assert (failure.stage, failure.error) == ("worker", "MemoryLimit")
        assert "1.0 GiB" in failure.text
        assert talk.ask("add", number=1) == failure
        assert not alive([talk.pid])


def test_conversation_close_leaves_no_process_and_no_log(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    with Conversation(job("keep")) as talk:
        assert talk.ask("leave_child", file=str(file)) == "done"
        assert len(alive(read_pids(file))) == 2
    wait_for(lambda: not alive(read_pids(file)), timeout_s=5)
    assert isinstance(talk.ask("add", number=1), Failure)
    assert list((tmp_path / "cache" / "logs").iterdir()) == []
    talk.close()


@pytest.mark.parametrize(
    ("asked", "stage", "error"),
    [
        (job("keep_nothing", text="no such thing"), "measure", "LayoutError"),
        (job("no_such_function"), "measure", "AttributeError"),
        (job("abort"), "worker", "Crash"),
        (job("ignore_and_sleep", file="/dev/null", limit_s=1.0), "worker", "Timeout"),
    ],
    ids=lambda value: value.function if isinstance(value, Job) else str(value),
)
def test_conversation_object_that_cannot_be_made_is_the_answer_to_every_call(
    asked: Job, stage: str, error: str
) -> None:
    with Conversation(asked) as talk:
        failure = talk.wait_ready()
        assert isinstance(failure, Failure)
        assert (failure.stage, failure.error) == (stage, error)
        assert talk.ask("add", number=1) == failure
        wait_for(lambda: not alive([talk.pid]), timeout_s=5)


def test_conversation_answer_that_an_interrupt_missed_is_not_taken_for_the_next(
    talk: Conversation,
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    talk.wait_ready()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            talk.ask("sleep", seconds=1.0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert talk.ask("add", number=1) == 11
    assert talk.ask("add", number=1) == 12
