"""A whole search: sample and check, ask and price, compile the front, write the winners."""

from __future__ import annotations

import collections
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from jaxbench.cache import storage_errors
from jaxbench.compiler import versions_for
from jaxbench.discovery import space_modules
from jaxbench.errors import CandidateError, UsageError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.record import Record, read_records
from jaxbench.run import Limits, Progress, Request, check_writable, cpu_peaks, run
from jaxbench.search.bounds import lower_bound_s
from jaxbench.search.candidate_file import write_candidate
from jaxbench.search.compose import Composition, fit_composition
from jaxbench.search.front import Times, least_worst, pareto_front, winners
from jaxbench.search.points import Points
from jaxbench.search.prices import PriceBook
from jaxbench.search.resolved import Resolved
from jaxbench.search.trials import SamplerName, Trials
from jaxbench.target import Target, missing_compiler, parse_target
from jaxbench.worker import Conversation, Job

_BATCH = 16  # trials asked for at once
_STALE = 2_000  # trials without a new network


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is done.

    Attributes:
      budget: Different networks priced.
      num_sample: Random networks compiled whole, to fit and check the composition.
      num_whole: Networks of the front compiled whole.
      bound: Median composition error above which a target's networks are compiled whole.
      measure: Also time the front on attached targets.
    """

    budget: int = 500
    sampler: SamplerName = "nsga2"
    seed: int | None = None
    num_sample: int = 12
    num_whole: int = 8
    bound: float = 0.05
    measure: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A network that has a price. Seconds of one sample, by target."""

    resolved: Resolved
    composed_s: Times


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What a search found.

    Attributes:
      base: The base among the networks.
      budget: Networks that were to be priced; fewer are there where no new ones came.
      refusals: How many points were refused, by why.
      num_bounded: Networks whose analytic bound alone is worse than the base everywhere.
      compositions: By target.
      whole_targets: Those on which composition is too far off and all is compiled whole.
      front: Names by composed times.
      records: Whole compiles of the front and the base.
      seconds: Of this call.
    """

    space: Mapping[str, Any]
    targets: tuple[str, ...]
    base: Network
    networks: tuple[Network, ...]
    budget: int
    refusals: Mapping[str, int]
    num_trials: int
    num_bounded: int
    num_compiled: int
    compositions: Mapping[str, Composition]
    whole_targets: tuple[str, ...]
    front: tuple[str, ...]
    records: tuple[Record, ...]
    files: tuple[str, ...]
    seconds: float

    def network(self, name: str) -> Network:
        """Returns one by name."""
        return next(one for one in (self.base, *self.networks) if one.resolved.name == name)

    def whole_s(self) -> dict[str, dict[str, float]]:
        """Returns seconds of one sample of the networks that were compiled whole everywhere."""
        found: dict[str, dict[str, float]] = {}
        for record in self.records:
            if record.prediction and not record.failure:
                step_s = record.prediction["step_s"] / record.workload["global_batch"]
                found.setdefault(record.candidate, {})[record.target] = step_s
        return {name: times for name, times in found.items() if len(times) == len(self.targets)}


def search(
    space: str,
    targets: Sequence[str],
    *,
    out: Path,
    plan: Plan,
    limits: Limits,
    progress: Progress,
) -> Found:
    """Searches a space for networks that train faster.

    Args:
      space: Name of a shipped space, or path of a Python file with a `SPACE`.
      targets: Each is an objective: seconds of one sample.
      out: Folder of the journal, the records and the winners; a search there is gone on with.

    Raises:
      UsageError: if a name is unknown, or the folder holds another search.
      CandidateError: if the space cannot be used, or no point of it is valid.
    """
    started = time.monotonic()
    source = _source(space)
    aimed = [parse_target(name) for name in targets]
    for target in aimed:
        if missing := missing_compiler(target.kind):
            raise UsageError(f"Cannot compile for {target.name}: {missing}.")
    check_writable(out)
    job = Job(
        name=space, function="jaxbench.search.server:SpaceServer", arguments={"source": source}
    )
    with Conversation(job) as server:
        if failure := server.wait_ready():
            raise CandidateError(failure.text)
        line = _Line(Points(server), source, aimed, out, plan, limits, progress)
        return line.run(started)


def _source(space: str) -> str:
    if space.endswith(".py"):
        if not Path(space).is_file():
            raise UsageError(f"No file {space!r} here. Give a Python file with a SPACE.")
        return str(Path(space).resolve())
    known = space_modules()
    if space not in known:
        raise UsageError(
            f"Unknown space {space!r}. Shipped: {', '.join(known)}; a file's name ends in .py."
        )
    return known[space]


@dataclass(kw_only=True, slots=True)
class _Told:
    """What the trials of a search have given so far."""

    networks: dict[str, Network] = field(default_factory=dict)
    refusals: collections.Counter[str] = field(default_factory=collections.Counter)
    bounded: set[str] = field(default_factory=set)
    num_trials: int = 0


class _Line:
    """One search as it goes."""

    def __init__(
        self,
        points: Points,
        source: str,
        targets: list[Target],
        out: Path,
        plan: Plan,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._points, self._targets, self._out = points, targets, out
        self._plan, self._limits, self._progress = plan, limits, progress
        self._space, self._base = points.space, points.base
        on_cpu = next((target for target in targets if target.kind == "cpu"), None)
        self._peaks = cpu_peaks(on_cpu) if on_cpu else None
        self._book = PriceBook(
            source, self._space["digest"], targets, cpu_peaks=self._peaks, limits=limits
        )
        self._by_forward = [b for b in self._space["bands"] if b["quantity"] == "forward_s"]
        self._compositions: dict[str, Composition] = {}
        self._whole_targets: list[str] = []
        self._records: dict[tuple[str, str], Record] = {}
        self._base_s: Times = {}

    def run(self, started: float) -> Found:
        """Goes through all stages."""
        self._check_composition()
        self._price_base()
        trials = Trials(
            self._out,
            self._space,
            [target.name for target in self._targets],
            sampler=self._plan.sampler,
            seed=self._plan.seed,
            violations=self._violations,
        )
        try:
            told = self._explore(trials)
        finally:
            trials.close()
        base = Network(resolved=self._base, composed_s=self._base_s)
        networks = {base.resolved.name: base, **told.networks}
        front = self._front(networks)
        chosen = [networks[name].resolved for name in front]
        self._compile([self._base, *chosen], measure=self._plan.measure)
        files = [write_candidate(self._out / "networks", one) for one in chosen]
        return Found(
            space=self._space,
            targets=tuple(target.name for target in self._targets),
            base=base,
            networks=tuple(told.networks.values()),
            budget=self._plan.budget,
            refusals=told.refusals,
            num_trials=told.num_trials,
            num_bounded=len(told.bounded),
            num_compiled=self._book.num_compiled,
            compositions=self._compositions,
            whole_targets=tuple(self._whole_targets),
            front=tuple(front),
            records=tuple(
                record
                for record in self._records.values()
                if record.candidate in (self._base.name, *front)
            ),
            files=tuple(str(file) for file in files if file),
            seconds=time.monotonic() - started,
        )

    # --- Prices ---

    def _check_composition(self) -> None:
        """Compiles a random sample whole and fits how steps follow from blocks."""
        sample = [self._base, *self._points.draw(self._plan.num_sample, self._progress)]
        if not self._space["has_blocks"]:
            self._whole_targets = [target.name for target in self._targets]
            return
        self._compile(sample)
        self._book.fill(sample, self._progress)
        for target in self._targets:
            both = self._both(sample, target)
            composition = fit_composition(
                [by_kind for _, by_kind, _ in both], [step_s for _, _, step_s in both]
            )
            self._compositions[target.name] = composition
            if composition.median_error > self._plan.bound:
                self._whole_targets.append(target.name)
        self._keep_sample(sample)

    def _both(
        self, sample: Sequence[Resolved], target: Target
    ) -> list[tuple[Resolved, dict[str, float], float]]:
        """Returns (network, seconds of blocks by kind, step of the whole) where there are both."""
        found = []
        for one in sample:
            by_kind, step_s = self._book.by_kind(one, target), self._whole_step_s(one, target)
            if isinstance(by_kind, dict) and step_s is not None:
                found.append((one, by_kind, step_s))
        return found

    def _keep_sample(self, sample: Sequence[Resolved]) -> None:
        """Writes the sample's seconds by target, whole and composed from fits without each."""
        kept: dict[str, dict[str, dict[str, float]]] = {"whole_s": {}, "composed_s": {}}
        for target in self._targets:
            errors = self._compositions[target.name].signed_errors
            both = self._both(sample, target)
            for (one, _, step_s), error in zip(both, errors, strict=True):
                sample_s = step_s / one.samples
                kept["whole_s"].setdefault(one.name, {})[target.name] = sample_s
                kept["composed_s"].setdefault(one.name, {})[target.name] = sample_s * (1 + error)
        path = self._out / "sample.json"
        with storage_errors(path):
            path.write_text(json.dumps(kept), encoding="utf-8")

    def _price_base(self) -> None:
        """Prices what all others are held against.

        Raises:
          CandidateError: if it has no price on a target.
        """
        self._fill([self._base])
        times = self._price(self._base)
        if times is None:
            failed = [
                f"{target}: {record.failure['text']}"
                for (name, target), record in self._records.items()
                if name == self._base.name and record.failure
            ]
            raise CandidateError(
                f"The base {self._base.name} has no price: {'; '.join(failed) or 'no block'}. Name "
                "other targets, or another base."
            )
        self._base_s = times

    def _explore(self, trials: Trials) -> _Told:
        """Asks and tells until as many networks as planned have a price."""
        told, stale = _Told(), 0
        for _, point, values in trials.finished():
            self._sort_in(told, self._points.resolve(point), values)
        while len(told.networks) < self._plan.budget and stale < _STALE:
            before = len(told.networks)
            asked = trials.ask(min(_BATCH, self._plan.budget - before))
            resolved = {number: self._points.resolve(point) for number, point in asked}
            self._fill([one for one in resolved.values() if self._is_worth_it(one)])
            for number, one in resolved.items():
                values = self._values(one)
                trials.tell(number, values)
                self._sort_in(told, one, values)
            stale = 0 if len(told.networks) > before else stale + len(asked)
            self._progress("networks priced", len(told.networks), self._plan.budget)
        return told

    def _sort_in(self, told: _Told, one: Resolved | str, values: Sequence[float] | None) -> None:
        """Puts one told trial where it belongs; its values are those that were told."""
        told.num_trials += 1
        why = self._points.refusal(one)
        if why is not None or isinstance(one, str):
            told.refusals[str(why)] += 1
        elif values is None:
            told.refusals["a block does not compile, or forward_s is out of band"] += 1
        elif self._is_bounded(one):
            told.bounded.add(one.name)
        elif one.name != self._base.name:
            names = (target.name for target in self._targets)
            times = dict(zip(names, values, strict=True))
            told.networks[one.name] = Network(resolved=one, composed_s=times)

    def _violations(self, point: Mapping[str, Any]) -> list[float]:
        """What Optuna is told of constraints: positive where one is broken."""
        found = self._points.resolve(point)
        if isinstance(found, str):
            return [1e3] * max(1, len(self._space["bands"]))
        forward = [max(0.0, self._slow_forward(found))] * bool(self._by_forward)
        return [*found.violations, *forward] or [0.0]

    def _is_worth_it(self, one: Resolved | str) -> TypeGuard[Resolved]:
        """Whether a network is one of the space and may beat the base somewhere."""
        return not (isinstance(one, str) or self._points.refusal(one) or self._is_bounded(one))

    def _fill(self, networks: Sequence[Resolved]) -> None:
        if len(self._whole_targets) < len(self._targets):
            self._book.fill(networks, self._progress)
        if self._by_forward:
            self._book.fill([self._base, *networks], self._progress, forward=True)
        if self._whole_targets:
            self._compile(networks, only=self._whole_targets)

    def _values(self, one: Resolved | str) -> list[float] | None:
        """Returns what is told of a network: seconds of a sample by target, or none."""
        if isinstance(one, str) or self._points.refusal(one):
            return None
        if self._is_bounded(one):
            return [self._bounds(one)[target.name] for target in self._targets]
        times = self._price(one)
        if times is None or self._slow_forward(one) > 0:
            return None
        return [times[target.name] for target in self._targets]

    def _price(self, one: Resolved) -> Times | None:
        """Returns seconds of one sample by target, composed or of whole compiles."""
        times = {}
        for target in self._targets:
            step_s = (
                self._whole_step_s(one, target)
                if target.name in self._whole_targets
                else self._composed_step_s(one, target)
            )
            if step_s is None or step_s <= 0:
                return None
            times[target.name] = step_s / one.samples
        return times

    def _whole_step_s(self, one: Resolved, target: Target) -> float | None:
        record = self._records.get((one.name, target.name))
        return record.prediction["step_s"] if record and record.prediction else None

    def _composed_step_s(self, one: Resolved, target: Target) -> float | None:
        by_kind = self._book.by_kind(one, target)
        if isinstance(by_kind, str):
            return None
        return self._compositions[target.name].step_s(by_kind)

    def _slow_forward(self, one: Resolved) -> float:
        """By how much, at worst, the forward pass misses its band."""
        worst = -1.0
        for target in self._targets if self._by_forward else ():
            own, base = (
                self._book.by_kind(network, target, forward=True) for network in (one, self._base)
            )
            if isinstance(own, str) or isinstance(base, str):
                continue
            ratio = sum(own.values()) / one.samples / (sum(base.values()) / self._base.samples)
            for band in self._by_forward:
                worst = max(worst, band["low"] - ratio, ratio - band["high"])
        return worst

    def _bounds(self, one: Resolved) -> dict[str, float]:
        return {
            target.name: lower_bound_s(one, target, cpu_peaks=self._peaks) / one.samples
            for target in self._targets
        }

    def _is_bounded(self, one: Resolved) -> bool:
        """Whether even its analytic bounds are worse than the base on every target."""
        return all(bound > self._base_s[target] for target, bound in self._bounds(one).items())

    # --- Whole compiles ---

    def _compile(
        self,
        networks: Sequence[Resolved],
        *,
        measure: bool = False,
        only: Sequence[str] | None = None,
    ) -> None:
        requests = [
            _request(one, target, measure=measure)
            for one in networks
            for target in self._targets
            if only is None or target.name in only
        ]
        run(requests, self._out, self._limits, self._progress)
        wanted = {request.id for request in requests}
        for record in read_records(self._out):
            if record.id in wanted:
                self._records[record.candidate, record.target] = record

    def _front(self, networks: Mapping[str, Network]) -> list[str]:
        """Returns the front by composed times, without the base: first one for all targets and
        each target's winner, then those in between."""
        times = {name: one.composed_s for name, one in networks.items()}
        first = dict.fromkeys([least_worst(times), *winners(times).values()])
        rest = sorted(
            (name for name in pareto_front(times) if name not in first),
            key=lambda name: math.prod(times[name].values()),
        )
        chosen = [name for name in (*first, *rest) if name != self._base.name]
        return chosen[: max(self._plan.num_whole, len(first))]


def _request(one: Resolved, target: Target, *, measure: bool) -> Request:
    return Request(
        described=one.described,
        layout=resolve_layout(parse_layout(one.layout), target.num_devices).name,
        target=target,
        measured=measure and target.kind == "cpu",
        versions=versions_for(target),
    )
