"""Candidates timed against each other in processes of their own, as values for their records."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from jaxbench.errors import Failure
from jaxbench.machine import Meter, Usage, describe_environment, read_energy
from jaxbench.measure.doubts import find_doubts
from jaxbench.measure.paired import chain_ratios, step_samples_s
from jaxbench.measure.protocol import PLANTED_SHARE, PROTOCOL, Session, Slot, measure_session
from jaxbench.measure.stepper import Chain, Probe
from jaxbench.worker import Conversation, Job, resident_bytes

_CHAIN_LIMIT_S = 600.0
_COPIES, _COPIES_FROM_S = 4, 10.0  # of wall time; below it there are two
_MEMORY_SHARE = 0.5  # of what is free, for further processes; their temporaries need the rest
_DEVICE_SHARE = 0.9  # of an accelerator's memory, for all processes; the rest is contexts and code


@dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """What a session gave of one candidate; a failure may stand beside what came before it."""

    measurement: dict[str, Any] | None
    failure: Failure | None


class _Copies:
    """A candidate's stepper in a few processes, of which one is asked at a time."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self._conversations, self._turn = conversations, 0
        self._order = list(range(len(conversations)))
        self.num_copies = len(conversations)

    def turn(self) -> None:
        """Takes the next; each once, then all again in another order."""
        self._turn = (self._turn + 1) % self.num_copies
        if self._turn == 0:
            random.shuffle(self._order)

    def chain(self, *, steps: int, extra_share: float = 0.0) -> Chain | Failure:
        copy = self._order[self._turn]
        given = self._conversations[copy].ask(
            "chain", limit_s=_CHAIN_LIMIT_S, steps=steps, extra_share=extra_share
        )
        return given if isinstance(given, Failure) else dataclasses.replace(given, copy=copy)

    def probe(self) -> Probe | Failure:
        return self._conversations[self._order[self._turn]].ask("probe", limit_s=_CHAIN_LIMIT_S)


def time_together(
    jobs: Sequence[Job],
    *,
    budget_s: float,
    precision: float,
    progress: Callable[[float], None] = lambda spent_s: None,
) -> tuple[list[Timed], bool]:
    """Runs one session; the first job is the base.

    Args:
      jobs: Each makes a `Stepper`.
      budget_s: Wall seconds, after the processes have made state and batch.
      precision: Half the width of the ratios' intervals at which the session may end before.

    Returns:
      (what each candidate gave, whether Ctrl-C ended the session).
    """
    with contextlib.ExitStack() as stack:
        given = [stack.enter_context(Conversation(job)) for job in jobs]
        failures = [conversation.wait_ready() for conversation in given]
        live = [one for one, failure in zip(given, failures, strict=True) if failure is None]
        missing = [Timed(measurement=None, failure=failure) for failure in failures]
        if not live:
            return missing, False
        live_jobs = [jobs[given.index(one)] for one in live]
        num_copies = _num_copies(live, budget_s)
        further = [
            [stack.enter_context(Conversation(job)) for _ in range(num_copies - 1)]
            for job in live_jobs
        ]
        # The first is the base: where that is gone, the next one has taken its place.
        control = [stack.enter_context(Conversation(live_jobs[0])) for _ in range(num_copies)]
        copies = [
            [one, *(more for more in others if more.wait_ready() is None)]
            for one, others in zip(live, further, strict=True)
        ]
        control = [one for one in control if one.wait_ready() is None] or control[:1]
        meter = Meter([one.pid for one in (*itertools.chain(*copies), *control)])
        session = measure_session(
            [(job.name, _Copies(mine)) for job, mine in zip(live_jobs, copies, strict=True)],
            _Copies(control),
            budget_s=budget_s,
            precision=precision,
            energy=lambda: read_energy()[0],
            progress=progress,
        )
        usage, name = meter.read(), secrets.token_hex(8)
        for slot, one in zip(session.candidates, live, strict=True):
            is_timed = any(row[1] > 1 for row in slot.rows)
            values = _values(slot, session, usage, one) if is_timed else None
            measurement = None if values is None else {"session": name, **values}
            failure = slot.failure
            if not (measurement or failure or session.ended == "interrupted"):
                failure = _left_alone(session.candidates[0].name)
            missing[given.index(one)] = Timed(measurement=measurement, failure=failure)
    return missing, session.ended == "interrupted"


def _num_copies(live: Sequence[Conversation], budget_s: float) -> int:
    """Returns for how many processes of each candidate and of the control there is room."""
    largest = sum(resident_bytes(one.pid) for one in live) + resident_bytes(live[0].pid)
    room = _MEMORY_SHARE * psutil.virtual_memory().available
    wanted = _COPIES if budget_s >= _COPIES_FROM_S else 2
    about = [_answer(one.ask("about")) for one in live]
    return max(1, min(wanted, 1 + int(room / max(largest, 1)), _device_room(about, wanted)))


def _device_room(about: Sequence[Mapping[str, Any]], wanted: int) -> int:
    """Returns how many processes each an accelerator holds; `wanted` where it keeps no account."""
    peaks = [one.get("peak_bytes", 0) for one in about]
    there, needed = about[0].get("memory_bytes", 0), sum(peaks) + peaks[0]
    return int(_DEVICE_SHARE * there / needed) if there and needed else wanted


def _left_alone(base: str) -> Failure:
    """Of stage `worker`, so that the next run tries again."""
    text = f"{base}, against which it was to be timed, failed before; time it without"
    return Failure(stage="worker", error="NoBase", text=text)


def _values(slot: Slot, session: Session, usage: Usage, one: Conversation) -> dict[str, Any]:
    """The measurement of one candidate, JSON-ready."""
    base = session.candidates[0]
    about = _answer(one.ask("about"))
    warm_up = [[chain.steps, round(chain.seconds, 7)] for chain in slot.warm_up]
    return {
        "protocol": PROTOCOL,
        "base": base.name,
        "base_again": None,
        "ended": "failed" if slot.failure else session.ended,
        "samples_s": step_samples_s(slot.rows),
        "chains": [list(row) for row in slot.rows],
        "first_step_s": slot.warm_up[0].seconds,
        "warm_up": warm_up,
        "final_loss": _final_loss(one),
        "environment": describe_environment(about.get("device", "unknown")),
        "pinned_threads": about.get("pinned_threads", 0),
        "num_copies": slot.stepper.num_copies,
        "doubts": [doubt.to_json() for doubt in find_doubts(slot, session, usage)],
        "controls": {
            "planted_share": PLANTED_SHARE,
            "same": _rounded(chain_ratios(base.rows, session.same.rows)),
            "planted": _rounded(chain_ratios(base.rows, session.planted.rows)),
        },
        "yardstick_s": [probe.yardstick_s for probe in session.probes],
        "memory": {
            "resident_bytes": slot.resident_bytes[1],
            "device": _answer(one.ask("device_memory")),
        },
        "energy": {"joules": slot.joules, "missing": usage.energy_missing},
        "usage": {key: value for key, value in asdict(usage).items() if "energy" not in key},
        "wall_s": session.wall_s,
        "timed_s": session.timed_s,
    }


def _answer(given: Any) -> Mapping[str, Any]:
    return {} if isinstance(given, Failure) else given


def _final_loss(one: Conversation) -> float | None:
    loss = one.ask("final_loss")
    return None if isinstance(loss, Failure) else loss


def _rounded(ratios: Sequence[float]) -> list[float]:
    return [round(ratio, 6) for ratio in ratios]
