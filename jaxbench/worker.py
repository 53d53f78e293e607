"""Jobs in processes of their own, with time and memory limits, none outliving its parent.

Workers fork from the standard library's fork server, which has imported JAX and Flax once but
started no backend; so a worker starts in milliseconds and loads just the one compiler that it
needs. Compilers write to stderr from C; a worker's stdout and stderr go to a log file, never to the
user's screen.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self

import psutil

from jaxbench.cache import cache_dir, storage_errors
from jaxbench.compiler import ENVIRONMENT
from jaxbench.errors import Failure, JaxbenchError

_POLL_S = 0.1
_MEMORY_POLL_S = 0.5  # a look through /proc costs milliseconds
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One call to be made in a worker.

    Attributes:
      name: What a person reads while it runs.
      function: `package.module:function`; it takes `arguments` and returns plain data.
      limit_s: Wall seconds until it is killed.
      limit_bytes: Resident memory, of it and its children, at which it is killed.
      alone: Runs while no other job does, as measurements must.
    """

    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    limit_s: float = 1800.0
    limit_bytes: int = 12 * 2**30
    alone: bool = False


@dataclass(slots=True)
class _Running:
    job: Job
    process: Any
    receiver: Connection
    started: float
    log: Path
    looked: float = 0.0


def run_jobs(jobs: Sequence[Job], *, num_workers: int) -> Iterator[tuple[Job, Any]]:
    """Runs jobs, `num_workers` at a time, and yields each with its result as it ends.

    A result is what the function returned, or a `Failure`: of the function's own `JaxbenchError`,
    of any other exception, of a signal, or of a limit. Jobs marked `alone` run last, one after the
    other. When the iteration is left early, whatever runs is killed.
    """
    queue = [job for job in jobs if not job.alone]
    last = [job for job in jobs if job.alone]
    running: list[_Running] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [_kill(entry) for entry in running])
        while queue or last or running:
            while queue and len(running) < num_workers:
                running.append(_start(queue.pop(0)))
            if not running and last:
                running.append(_start(last.pop(0)))
            wait([entry.receiver for entry in running], timeout=_POLL_S)
            for entry in list(running):
                done, result = _poll(entry)
                if done:
                    running.remove(entry)
                    yield entry.job, result


def call_in_worker(function: str, **arguments: Any) -> Any:
    """Makes one call in a worker; raises JaxbenchError with the text of a failure."""
    job = Job(name=function, function=function, arguments=arguments)
    ((_, result),) = run_jobs([job], num_workers=1)
    if isinstance(result, Failure):
        raise JaxbenchError(result.text)
    return result


class Conversation:
    """A worker that keeps one object, which the job's function makes, and is asked for its methods.

    A method that raises gives a `Failure`, and the object lives on. When the process has ended, or
    has been ended for a limit, every answer is the failure that says how.
    """

    def __init__(self, job: Job) -> None:
        self._entry = _start(job, _converse)
        self._over: Failure | None = None
        self.pid: int = self._entry.process.pid
        self._made = False
        self._is_behind = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def wait_ready(self) -> Failure | None:
        """Waits for the object; returns what kept it from being made."""
        if self._made or self._over:
            return self._over
        made = self._receive(self._entry.job.limit_s)
        self._made = True
        if isinstance(made, Failure):
            self._end(made)
        return self._over

    def ask(self, method: str, *, limit_s: float | None = None, **arguments: Any) -> Any:
        """Calls a method of the object and returns what it gives, or a `Failure`."""
        if self.wait_ready():
            return self._over
        limit_s = limit_s or self._entry.job.limit_s
        if self._is_behind:  # Ctrl-C came while the last answer was awaited
            self._receive(limit_s)
        try:
            self._entry.receiver.send((method, arguments))
        except OSError:
            return self._end(_ended(self._entry))
        self._is_behind = True
        answer = self._receive(limit_s)
        self._is_behind = False
        return answer

    def close(self) -> None:
        """Ends the worker."""
        if self._over is None:
            self._end(Failure(stage="worker", error="Closed", text="the worker was ended"))
            self._entry.log.unlink(missing_ok=True)

    def _receive(self, limit_s: float) -> Any:
        entry, started = self._entry, time.monotonic()
        while not entry.receiver.poll(_POLL_S):
            if not entry.process.is_alive() and not entry.receiver.poll():
                return self._end(_ended(entry))
            if time.monotonic() - started > limit_s:
                return self._end(_timeout(entry, limit_s))
            if _is_too_large(entry):
                return self._end(_memory_limit(entry))
        try:
            answer = entry.receiver.recv()
        except (EOFError, OSError):
            return self._end(_ended(entry))
        return self._end(_memory_limit(entry)) if _is_too_large(entry) else answer

    def _end(self, failure: Failure) -> Failure:
        self._over = failure
        _kill(self._entry)
        return failure


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["jaxbench.preload"])
    return context


def _start(job: Job, life: Callable[..., None] | None = None) -> _Running:
    """Starts a worker that lives `life`; its connection goes both ways."""
    os.environ.update(ENVIRONMENT)
    context = _context()
    receiver, sender = context.Pipe()
    log = cache_dir() / "logs" / f"{os.getpid()}-{time.time_ns()}.log"
    with storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
    process = context.Process(
        target=life or _work, args=(job, sender, str(log), os.getpid()), daemon=True
    )
    with _no_main_module(), _interrupts_later():
        process.start()
    sender.close()
    return _Running(job=job, process=process, receiver=receiver, started=time.monotonic(), log=log)


@contextlib.contextmanager
def _no_main_module() -> Iterator[None]:
    """Keeps `multiprocessing` from running the user's script again in each worker."""
    main = sys.modules["__main__"]
    saved = {
        name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__
    }
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update(saved)


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Holds Ctrl-C back while a worker is half started."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _work(job: Job, sender: Connection, log: str, parent: int) -> None:
    """The worker's whole life."""
    _settle(log, parent)
    _answer(sender, lambda: _function(job)(**job.arguments))
    sender.close()
    # Compiler libraries crash in their destructors now and then; the result is already sent.
    os._exit(0)


def _converse(job: Job, connection: Connection, log: str, parent: int) -> None:
    """The life of a worker that keeps one object and is asked for its methods."""
    _settle(log, parent)
    kept: list[Any] = []
    _answer(connection, lambda: kept.append(_function(job)(**job.arguments)), "measure")
    with contextlib.suppress(EOFError, OSError):
        while kept:
            method, arguments = connection.recv()
            # B023: the function is called before the loop goes on.
            _answer(connection, lambda: getattr(kept[0], method)(**arguments), "measure")  # noqa: B023
    os._exit(0)


def _settle(log: str, parent: int) -> None:
    """Makes the worker's process end with its parent and say what it has to say into its log."""
    os.setpgid(0, 0)
    # The fork server ends when the last holder of this pipe does. Each worker inherits it: with it
    # open, workers would keep the server, and so themselves, alive after the user's process dies.
    os.close(forkserver._forkserver._forkserver_alive_fd)  # pyright: ignore
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if not psutil.pid_exists(parent):
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)


def _function(job: Job) -> Callable[..., Any]:
    module, _, name = job.function.partition(":")
    return getattr(importlib.import_module(module), name)


def _answer(connection: Connection, call: Callable[[], Any], stage: str = "worker") -> None:
    """Sends what a call gives, or the failure that it ends in."""
    try:
        connection.send(call())
    except BaseException as error:  # noqa: BLE001 - whatever ends a job becomes its record
        import traceback

        traceback.print_exc()
        connection.send(failure_of(error, stage=stage))


def failure_of(error: BaseException, *, stage: str) -> Failure:
    """Returns the failure that an exception stands for: its type and the first line of its text."""
    text = str(error).strip().splitlines()
    return Failure(
        stage=stage,
        error=type(error).__name__,
        text=text[0][:500] if text else type(error).__name__,
    )


def _poll(entry: _Running) -> tuple[bool, Any]:
    """Returns (whether the job has ended, its result)."""
    limit = entry.job.limit_s
    if entry.receiver.poll():
        try:
            result = entry.receiver.recv()
        except (EOFError, OSError):  # it ended before, or in the middle of, its result
            return True, _ended(entry)
        entry.process.join(timeout=5)
        _kill(entry)
        entry.log.unlink(missing_ok=True)
        return True, result
    if not entry.process.is_alive():
        return (True, _ended(entry)) if not entry.receiver.poll() else (False, None)
    if time.monotonic() - entry.started > limit:
        _kill(entry)
        return True, _timeout(entry, limit)
    if _is_too_large(entry):
        _kill(entry)
        return True, _memory_limit(entry)
    return False, None


def _ended(entry: _Running) -> Failure:
    """Says how a worker ended that sent no result."""
    entry.process.join(timeout=5)
    code = entry.process.exitcode
    _kill(entry)
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system ran out of memory, or somebody killed it)" if name == "SIGKILL" else ""
        return _failure("Crash", f"worker ended with {name}{hint}", entry)
    return _failure("Crash", f"worker ended with exit code {code} and no result", entry)


def _timeout(entry: _Running, limit_s: float) -> Failure:
    text = f"stopped after {limit_s:.0f} s, the time limit; raise --limit-s"
    return _failure("Timeout", text, entry)


def _memory_limit(entry: _Running) -> Failure:
    gib = entry.job.limit_bytes / 2**30
    text = f"stopped at {gib:.1f} GiB, the memory limit; raise --limit-gib"
    return _failure("MemoryLimit", text, entry)


def _failure(error: str, text: str, entry: _Running) -> Failure:
    return Failure(stage="worker", error=error, text=f"{text}; log: {entry.log}")


def _is_too_large(entry: _Running) -> bool:
    now = time.monotonic()
    if now - entry.looked < _MEMORY_POLL_S:
        return False
    entry.looked = now
    return resident_bytes(entry.process.pid) > entry.job.limit_bytes


def resident_bytes(pid: int) -> int:
    """Returns the resident memory of a process and its children; 0 if it has ended."""
    total = 0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for member in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.Error):
                total += member.memory_info().rss
    return total


def _kill(entry: _Running) -> None:
    """Ends the worker and what it started (the CUDA compiler runs helpers of its own)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(entry.process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(entry.process.pid, signal.SIGKILL)
    entry.process.join(timeout=5)
    entry.receiver.close()
