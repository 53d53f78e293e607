"""A whole search: sample and check, ask and price, compile the front, write the winners."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxbench.attached import attach
from jaxbench.discovery import space_modules
from jaxbench.errors import CandidateError, UsageError
from jaxbench.record import Record
from jaxbench.run import Limits, Progress, check_writable
from jaxbench.search.candidate_file import write_candidate
from jaxbench.search.compose import Composition
from jaxbench.search.explore import Explorer, Network
from jaxbench.search.front import choose_near_front
from jaxbench.search.points import Points
from jaxbench.search.pricing import Pricing
from jaxbench.search.trials import SamplerName, Trials
from jaxbench.target import Target, missing_compiler, parse_target
from jaxbench.worker import Conversation, Job

_MOST_CHANGES = 6  # of networks that are named for having few


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is done.

    Attributes:
      budget: Different networks priced.
      num_sample: Random networks compiled whole, to fit and check the composition.
      num_whole: Networks of the front compiled whole; the winners always are, unless it is 0.
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
class Found:
    """What a search found.

    Attributes:
      base: The base among the networks.
      budget: Networks that were to be priced; fewer are there where no new ones came.
      refusals: How many points were refused, by why.
      num_bounded: Networks whose analytic bound alone is worse than the base everywhere.
      compositions: By target.
      whole_targets: Those on which all is compiled whole, and why.
      front: Names of the front of composed times and of those near it, compiled whole.
      records: Whole compiles of the front and the base.
      seconds: Of this call.
      files: Candidate files of the front and of `few_changes`.
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
    whole_targets: Mapping[str, str]
    front: tuple[str, ...]
    records: tuple[Record, ...]
    seconds: float
    files: tuple[str, ...] = ()

    def network(self, name: str) -> Network:
        """Returns one by name."""
        return next(one for one in (self.base, *self.networks) if one.resolved.name == name)

    def with_changes(self, num: int) -> list[Network]:
        """Returns the networks that differ from the base in so many choices, the fastest over all
        targets first."""
        base = self.base.resolved.point
        return sorted(
            (
                one
                for one in self.networks
                if sum(value != base[name] for name, value in one.resolved.point.items()) == num
            ),
            key=lambda one: math.prod(one.composed_s.values()),
        )

    def few_changes(self) -> list[Network]:
        """Returns the fastest with one change, with two, and so on, where there are any."""
        return [one for num in range(1, _MOST_CHANGES + 1) for one in self.with_changes(num)[:1]]

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
    if plan.measure:
        attach(aimed)
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
        self._plan, self._progress = plan, progress
        self._space, self._base = points.space, points.base
        self._pricing = Pricing(
            points.space,
            points.base,
            targets,
            source=source,
            out=out,
            limits=limits,
            progress=progress,
        )

    def run(self, started: float) -> Found:
        """Goes through all stages."""
        pricing = self._pricing
        sample = self._points.draw(self._plan.num_sample, self._progress)
        if self._space["has_blocks"]:
            pricing.check_composition(sample, self._plan.bound)
        pricing.price_base()
        explorer = Explorer(
            self._points,
            pricing,
            [target.name for target in self._targets],
            budget=self._plan.budget,
            near=self._plan.sampler != "random",
            seed=self._plan.seed,
            progress=self._progress,
        )
        trials = Trials(
            self._out,
            self._space,
            [target.name for target in self._targets],
            sampler=self._plan.sampler,
            seed=self._plan.seed,
            violations=explorer.violations,
        )
        try:
            told = explorer.explore(trials)
        finally:
            trials.close()
        base = Network(resolved=self._base, composed_s=pricing.base_s)
        networks = {base.resolved.name: base, **told.networks}
        front = self._front(networks)
        chosen = [networks[name].resolved for name in front]
        pricing.compile([self._base, *chosen], measure=self._plan.measure)
        found = Found(
            space=self._space,
            targets=tuple(target.name for target in self._targets),
            base=base,
            networks=tuple(told.networks.values()),
            budget=self._plan.budget,
            refusals=told.refusals,
            num_trials=told.num_trials,
            num_bounded=len(told.bounded),
            num_compiled=pricing.num_compiled,
            compositions=pricing.compositions,
            whole_targets=pricing.whole_targets,
            front=tuple(front),
            records=tuple(
                record
                for record in pricing.records.values()
                if record.candidate in (self._base.name, *front)
            ),
            seconds=time.monotonic() - started,
        )
        named = {one.name: one for one in (*chosen, *(few.resolved for few in found.few_changes()))}
        files = [write_candidate(self._out / "networks", one) for one in named.values()]
        return replace(found, files=tuple(str(file) for file in files if file))

    def _front(self, networks: Mapping[str, Network]) -> list[str]:
        """Returns what is worth a whole compile, without the base: the front of composed times, and
        as many as are wanted of those no further from it than composed times were seen to be
        off."""
        if not self._plan.num_whole:
            return []
        return choose_near_front(
            {name: one.composed_s for name, one in networks.items()},
            base=self._base.name,
            most=self._plan.num_whole,
            slack=self._pricing.worst_error,
        )
