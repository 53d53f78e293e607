"""A whole search: sample and check, ask and price, compile the front, write the winners."""

from __future__ import annotations

import collections
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbench.cache import storage_errors
from jaxbench.compiler import versions_for
from jaxbench.discovery import space_modules
from jaxbench.errors import CandidateError, Failure, UsageError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.record import Record, read_records
from jaxbench.run import Limits, Progress, Request, check_writable, cpu_peaks, run
from jaxbench.search.bounds import lower_bound_s
from jaxbench.search.candidate_file import write_candidate
from jaxbench.search.compose import Composition, fit_composition
from jaxbench.search.front import Times, least_worst, pareto_front, winners
from jaxbench.search.prices import PriceBook
from jaxbench.search.resolved import Resolved
from jaxbench.search.space import point_digest
from jaxbench.search.trials import SamplerName, Trials
from jaxbench.target import Target, missing_compiler, parse_target
from jaxbench.worker import Conversation, Job

_BATCH = 16  # trials asked for at once
_DRAWS = 20_000  # until a space is held to be empty
_CHANGED = 0.3  # of a sample's choices, in every second draw
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
        line = _Line(server, source, aimed, out, plan, limits, progress)
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


class _Line:
    """One search as it goes."""

    def __init__(
        self,
        server: Conversation,
        source: str,
        targets: list[Target],
        out: Path,
        plan: Plan,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._server, self._targets, self._out = server, targets, out
        self._plan, self._limits, self._progress = plan, limits, progress
        self.space: dict[str, Any] = _answer(server.ask("describe"))
        self._resolved: dict[str, Resolved | str] = {}
        on_cpu = next((target for target in targets if target.kind == "cpu"), None)
        self._peaks = cpu_peaks(on_cpu) if on_cpu else None
        self._book = PriceBook(
            source, self.space["digest"], targets, cpu_peaks=self._peaks, limits=limits
        )
        self._base = self._require(self.space["base_point"])
        self._by_forward = [b for b in self.space["bands"] if b["quantity"] == "forward_s"]
        self._compositions: dict[str, Composition] = {}
        self._whole_targets: list[str] = []
        self._records: dict[tuple[str, str], Record] = {}

    def run(self, started: float) -> Found:
        """Goes through all stages."""
        self._check_composition()
        trials = Trials(
            self._out,
            self.space,
            [target.name for target in self._targets],
            sampler=self._plan.sampler,
            seed=self._plan.seed,
            violations=self._violations,
        )
        try:
            networks, refusals, num_bounded, num_trials = self._explore(trials)
        finally:
            trials.close()
        base = Network(resolved=self._base, composed_s=self._price(self._base) or {})
        front = self._front([base, *networks])
        by_name = {one.resolved.name: one for one in (base, *networks)}
        chosen = [by_name[name].resolved for name in front if name in by_name]
        self._compile([self._base, *chosen], measure=self._plan.measure)
        names = {self._base.name, *(one.name for one in chosen)}
        files = [write_candidate(self._out / "networks", one) for one in chosen]
        return Found(
            space=self.space,
            targets=tuple(target.name for target in self._targets),
            base=base,
            networks=tuple(networks),
            refusals=refusals,
            num_trials=num_trials,
            num_bounded=num_bounded,
            num_compiled=self._book.num_compiled,
            compositions=self._compositions,
            whole_targets=tuple(self._whole_targets),
            front=tuple(front),
            records=tuple(record for record in self._records.values() if record.candidate in names),
            files=tuple(str(file) for file in files if file),
            seconds=time.monotonic() - started,
        )

    # --- Points ---

    def _resolve(self, point: Mapping[str, Any]) -> Resolved | str:
        """Returns a point's network, or why it is refused."""
        digest = point_digest(point)
        if digest not in self._resolved:
            answer = _answer(self._server.ask("resolve", point=dict(point)))
            refused = answer.get("refused")
            self._resolved[digest] = refused or Resolved.from_answer(point, answer)
        return self._resolved[digest]

    def _require(self, point: Mapping[str, Any]) -> Resolved:
        found = self._resolve(point)
        if isinstance(found, str):
            raise CandidateError(f"The base of space {self.space['name']!r} cannot be: {found}")
        return found

    def _refusal(self, found: Resolved | str) -> str | None:
        """Says why a network is none of the space, or None."""
        if isinstance(found, str):
            return found
        bands = [band for band in self.space["bands"] if band["quantity"] != "forward_s"]
        for band, violation in zip(bands, found.violations, strict=True):
            if violation > 0:
                return f"{band['quantity']} out of band"
        return None

    def _violations(self, point: Mapping[str, Any]) -> list[float]:
        """What Optuna is told of constraints: positive where one is broken."""
        found = self._resolve(point)
        if isinstance(found, str):
            return [1e3] * max(1, len(self.space["bands"]))
        forward = [max(0.0, self._slow_forward(found))] * bool(self._by_forward)
        return [*found.violations, *forward] or [0.0]

    def _draw(self, num: int) -> list[Resolved]:
        """Draws different valid networks at random, half of them near the base."""
        generator = random.Random(self.space["digest"])
        found: dict[str, Resolved] = {}
        refusals: collections.Counter[str] = collections.Counter()
        for draw in range(_DRAWS):
            share = 1.0 if draw % 2 else _CHANGED
            point = {
                choice["name"]: generator.choice(choice["values"])
                if generator.random() < share
                else self._base.point[choice["name"]]
                for choice in self.space["choices"]
            }
            one = self._resolve(point)
            why = self._refusal(one)
            if why:
                refusals[why] += 1
            elif isinstance(one, Resolved) and one.name != self._base.name:
                found[one.name] = one
                self._progress("drawing valid networks", len(found), num)
            if len(found) == num:
                break
        if not found:
            why = ", ".join(f"{what} ({n})" for what, n in refusals.most_common(3))
            raise CandidateError(
                f"Space {self.space['name']!r} has no valid point among {_DRAWS} drawn: {why}. "
                "Widen a band, or add values."
            )
        return list(found.values())

    # --- Prices ---

    def _check_composition(self) -> None:
        """Compiles a random sample whole and fits how steps follow from blocks."""
        sample = [self._base, *self._draw(max(1, self._plan.num_sample))]
        if not self.space["has_blocks"]:
            self._whole_targets = [target.name for target in self._targets]
            return
        self._compile(sample)
        self._book.fill(sample, self._progress)
        for target in self._targets:
            kinds, whole = [], []
            for one in sample:
                by_kind, record = self._book.by_kind(one, target), self._record(one, target)
                if isinstance(by_kind, dict) and record and record.prediction:
                    kinds.append(by_kind)
                    whole.append(record.prediction["step_s"])
            composition = fit_composition(kinds, whole)
            self._compositions[target.name] = composition
            if composition.median_error > self._plan.bound:
                self._whole_targets.append(target.name)
        self._keep_sample(sample)

    def _keep_sample(self, sample: Sequence[Resolved]) -> None:
        """Writes the sample's seconds by target, whole and composed from fits without each."""
        kept: dict[str, dict[str, dict[str, float]]] = {"whole_s": {}, "composed_s": {}}
        for target in self._targets:
            errors = iter(self._compositions[target.name].signed_errors)
            for one in sample:
                by_kind, record = self._book.by_kind(one, target), self._record(one, target)
                if isinstance(by_kind, dict) and record and record.prediction:
                    step_s = record.prediction["step_s"]
                    kept["whole_s"].setdefault(one.name, {})[target.name] = step_s / one.samples
                    kept["composed_s"].setdefault(one.name, {})[target.name] = (
                        step_s * (1 + next(errors)) / one.samples
                    )
        path = self._out / "sample.json"
        with storage_errors(path):
            path.write_text(json.dumps(kept), encoding="utf-8")

    def _explore(self, trials: Trials) -> tuple[list[Network], collections.Counter[str], int, int]:
        """Asks and tells until as many networks as planned have a price."""
        networks: dict[str, Network] = {}
        refusals: collections.Counter[str] = collections.Counter()
        bounded, stale = set(), 0
        for _, point, values in trials.finished():
            self._sort_in(point, values, networks, refusals, bounded)
        limits = self._base_bounds()
        while len(networks) < self._plan.budget and stale < _STALE:
            before = len(networks)
            asked = trials.ask(min(_BATCH, self._plan.budget - len(networks)))
            resolved = {number: self._resolve(point) for number, point in asked}
            worth = [
                one
                for one in resolved.values()
                if isinstance(one, Resolved)
                and not self._refusal(one)
                and not self._is_bounded(one, limits)
            ]
            self._fill(worth)
            for number, point in asked:
                values = self._values(resolved[number], limits)
                trials.tell(number, values)
                self._sort_in(point, values, networks, refusals, bounded)
            stale = 0 if len(networks) > before else stale + len(asked)
            self._progress("networks priced", len(networks), self._plan.budget)
        return list(networks.values()), refusals, len(bounded), len(trials.finished())

    def _sort_in(
        self,
        point: Mapping[str, Any],
        values: Sequence[float] | None,
        networks: dict[str, Network],
        refusals: collections.Counter[str],
        bounded: set[str],
    ) -> None:
        """Puts one told trial where it belongs."""
        one = self._resolve(point)
        if why := self._refusal(one):
            refusals[why] += 1
            return
        assert isinstance(one, Resolved)
        if self._is_bounded(one, self._base_bounds()):
            bounded.add(one.name)
        elif (times := self._price(one)) is None:
            refusals["a block or the network does not compile"] += 1
        elif self._slow_forward(one) > 0:
            refusals["forward_s out of band"] += 1
        elif one.name != self._base.name:
            networks[one.name] = Network(resolved=one, composed_s=times)

    def _fill(self, networks: Sequence[Resolved]) -> None:
        if len(self._whole_targets) < len(self._targets):
            self._book.fill(networks, self._progress)
        if self._by_forward:
            self._book.fill([self._base, *networks], self._progress, forward=True)
        if self._whole_targets:
            self._compile(networks, only=self._whole_targets)

    def _values(self, one: Resolved | str, limits: Times) -> list[float] | None:
        if isinstance(one, str) or self._refusal(one):
            return None
        if self._is_bounded(one, limits):
            return [self._bounds(one)[target.name] for target in self._targets]
        times = self._price(one)
        return None if times is None else [times[target.name] for target in self._targets]

    def _price(self, one: Resolved) -> Times | None:
        """Returns seconds of one sample by target, composed or of whole compiles."""
        times = {}
        for target in self._targets:
            if target.name in self._whole_targets:
                record = self._record(one, target)
                step_s = record.prediction["step_s"] if record and record.prediction else None
            else:
                by_kind = self._book.by_kind(one, target)
                step_s = (
                    None
                    if isinstance(by_kind, str)
                    else self._compositions[target.name].step_s(by_kind)
                )
            if step_s is None or (step_s <= 0):
                return None
            times[target.name] = step_s / one.samples
        return times

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

    def _base_bounds(self) -> Times:
        """What a network must be able to beat somewhere: the base's own times."""
        return self._price(self._base) or {}

    def _is_bounded(self, one: Resolved, limits: Times) -> bool:
        return bool(limits) and all(
            bound > limits[target] for target, bound in self._bounds(one).items()
        )

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

    def _record(self, one: Resolved, target: Target) -> Record | None:
        return self._records.get((one.name, target.name))

    def _front(self, networks: Sequence[Network]) -> list[str]:
        """Returns the front by composed times, fullest first: winners, then those in between."""
        times = {one.resolved.name: one.composed_s for one in networks if one.composed_s}
        front = pareto_front(times)
        first = dict.fromkeys([least_worst(times), *winners(times).values()])
        rest = sorted(
            (name for name in front if name not in first), key=lambda name: _mean(times, name)
        )
        chosen = [name for name in (*first, *rest) if name != self._base.name]
        return chosen[: max(self._plan.num_whole, len(first))]


def _mean(times: Mapping[str, Times], name: str) -> float:
    """Geometric mean over targets, relative to nothing: an order alone."""
    product = 1.0
    for value in times[name].values():
        product *= value
    return product


def _request(one: Resolved, target: Target, *, measure: bool) -> Request:
    return Request(
        described=one.described,
        layout=resolve_layout(parse_layout(one.layout), target.num_devices).name,
        target=target,
        measured=measure and target.kind == "cpu",
        versions=versions_for(target),
    )


def _answer(given: Any) -> Any:
    if isinstance(given, Failure):
        raise CandidateError(f"The space's process failed: {given.text}")
    return given
