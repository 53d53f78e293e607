"""The verdict's protocol: rewrites checked, networks screened, what is left confirmed in pairs.

A. An exact rewrite (T0) is checked by values and gradients; if it is one, nothing is trained.
B. Screen: one seed, three learning rates, the same for all. It rejects what is worse than the base
   by more than three deviations, and never accepts; each network keeps its best rate.
C. Confirm: fresh seeds in pairs with the base. Verdicts by `verdict.py`, Holm over all confirmed.
D. Assay sensitivity, in the same runs: a negative control (half width) must be found inferior, an
   exact rewrite of the base must not; else the test cannot tell, and there is no verdict.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxbench import cache
from jaxbench.compiler import versions_for
from jaxbench.errors import DataError, Failure, UsageError
from jaxbench.quality.control import halve_width
from jaxbench.quality.shards import packaged_folder
from jaxbench.quality.target_time import TargetTime, samples_ratio, time_to_target
from jaxbench.quality.verdict import (
    Paired,
    extra_share,
    find_margin,
    holm,
    judge_pairs,
    word_of,
)
from jaxbench.record import Record
from jaxbench.run import Limits, Progress, describe, families_of
from jaxbench.target import parse_target
from jaxbench.worker import Job, run_jobs

PROTOCOL = "paired-noninferiority-1"
RUNS = "runs.jsonl"
_RATES = (0.5, 1.0, 2.0)  # times the base's
_SCREEN_DEVIATIONS = 3.0
_SCREEN_SEED, _FIRST_SEED = 1000, 1

Word = Literal[
    "exact", "non-inferior", "equivalent", "inferior", "inconclusive", "the test cannot tell"
]
Described = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much is trained.

    Attributes:
      pairs: Fresh seeds.
      margin: Of the metric; None for a quarter of the negative control's damage.
      together: Seeds trained side by side in one program.
    """

    pairs: int = 6
    steps: int = 200
    batch: int = 8
    checks: int = 5
    margin: float | None = None
    together: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What is said of one network against the base.

    Attributes:
      role: `variant`, or which control it is.
      paired: None where it was not confirmed.
    """

    name: str
    role: Literal["variant", "negative control", "rewrite control"]
    validity: str
    changes: str
    word: Word
    reason: str
    learning_rate: float | None = None
    paired: Paired | None = None
    metrics: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """All verdicts of one base on one data set.

    Attributes:
      complaint: Why the test cannot tell; empty if the controls passed.
      margin_samples: The margin as a share of samples, from the base's learning curve.
      curves: (samples, metric) of every confirmed network, the base among them, pair by pair.
    """

    base: str
    task: str
    metric: str
    data_digest: str
    plan: Plan
    margin: float | None
    margin_samples: float | None
    base_metrics: tuple[float | None, ...]
    base_curve: tuple[tuple[int, float], ...]
    complaint: str
    verdicts: tuple[Verdict, ...]
    curves: Mapping[str, tuple[tuple[tuple[int, float], ...], ...]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)


def judge(
    base: Described,
    variants: Sequence[Described],
    *,
    rewrite: Described | None,
    data: Path,
    out: Path,
    plan: Plan,
    limits: Limits,
    progress: Progress,
) -> Judged:
    """Judges variants against their base.

    Args:
      base, variants: Descriptions of networks.
      rewrite: An exact rewrite of the base, for the control.
      data: Folder of the data set.
      out: Folder of the runs; what is there is not done again.

    Raises:
      DataError: if the data cannot be read, or the runs in `out` are of other data.
    """
    return _Judge(base, variants, rewrite, data, out, plan, limits, progress).go()


def judge_named(
    base: str,
    variants: Sequence[str],
    *,
    files: Sequence[str],
    data: Path | None,
    out: Path,
    plan: Plan,
    limits: Limits,
    progress: Progress,
) -> Judged:
    """Judges candidates by name, on the small data set that ships with jaxbench if none is given.

    Raises:
      UsageError: if there is no such candidate.
      DataError: as `judge`.
    """
    sources = [*families_of([base, *variants]), *(str(Path(file).resolve()) for file in files)]
    described = {one["name"]: one for one in describe(sources, limits)}
    for name in (base, *variants):
        if name not in described:
            raise UsageError(
                f"No candidate {name!r}. `jaxbench list candidates` shows those there are; --from "
                "FILE adds a file's."
            )
    own = described[base]
    return judge(
        own,
        [described[name] for name in variants],
        rewrite=_find_rewrite(own, described.values()),
        data=data or packaged_folder(),
        out=out,
        plan=plan,
        limits=limits,
        progress=progress,
    )


def target_times(judged: Judged, records: Sequence[Record]) -> list[TargetTime]:
    """Returns times to target of all confirmed variants, where there are records of both."""
    own = judged.curves.get(judged.base, ())
    if not own or judged.margin is None:
        return []
    reached = [curve[-1][1] for curve in own if curve]
    target = statistics.fmean(reached) - judged.margin
    found = []
    for verdict in judged.verdicts:
        curves = judged.curves.get(verdict.name, ())
        if verdict.role == "variant" and any(curves):
            samples = samples_ratio(zip(own, curves, strict=True), target)
            found += time_to_target(verdict.name, judged.base, samples, records)
    return found


def _find_rewrite(base: Described, others: Iterable[Described]) -> Described | None:
    """Returns another candidate that is the same function as the base."""
    if base["validity"] not in ("base", "T0"):
        return None
    group = [
        one
        for one in others
        if one["name"] != base["name"]
        and one["base"] == base["base"]
        and one["validity"] in ("base", "T0")
        and one["workload"] == base["workload"]
    ]
    return group[0] if group else None


class _Judge:
    def __init__(
        self,
        base: Described,
        variants: Sequence[Described],
        rewrite: Described | None,
        data: Path,
        out: Path,
        plan: Plan,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._base, self._variants, self._rewrite = base, list(variants), rewrite
        self._data, self._plan, self._limits, self._progress = data, plan, limits, progress
        about = self._ask("jaxbench.quality.protocol_worker:describe_task", described=dict(base))
        self._task, self._digest = about, about["data_digest"]
        self._runs = _Runs(out, self._digest)
        self._control = {**halve_width(base), "of": base.get("of", base["name"])}
        self._rates: dict[str, float] = {}

    def go(self) -> Judged:
        """Runs all stages."""
        self._check_outputs()
        exact = self._check_rewrites()
        trained = [one for one in self._variants if one["name"] not in exact]
        controls = [self._control] + ([self._rewrite] if self._rewrite else [])
        rejected: dict[str, str] = {}
        if trained:
            rejected = self._screen([self._base, *controls, *trained])
            live = [one for one in trained if one["name"] not in rejected]
            self._confirm([self._base, *controls, *live])
        return self._conclude(exact, rejected, trained)

    # --- Stages ---

    def _check_outputs(self) -> None:
        """Refuses variants that put out another shape than the base."""
        shapes = {}
        for one in (self._base, *self._variants):
            shapes[one["name"]] = self._ask(
                "jaxbench.quality.protocol_worker:output_shapes", described=dict(one)
            )
        wanted = shapes[self._base["name"]]
        for name, found in shapes.items():
            if found != wanted:
                raise DataError(
                    f"{name} puts out {found} and {self._base['name']} {wanted}: networks that "
                    "answer another question cannot be held equal. Give a variant with the base's "
                    "output."
                )

    def _check_rewrites(self) -> dict[str, dict[str, Any]]:
        """Returns what was found of the variants that are exact rewrites."""
        found = {}
        for one in self._variants:
            if one["validity"] == "T0":
                checked = self._ask(
                    "jaxbench.quality.static:check_rewrite",
                    described=dict(one),
                    base=dict(self._base),
                )
                if checked["exact"]:
                    found[one["name"]] = checked
        return found

    def _screen(self, networks: Sequence[Described]) -> dict[str, str]:
        """Tunes all in the same way; returns which variants are out, and why."""
        base_rate = self._base["workload"]["learning_rate"]
        rates = [base_rate * factor for factor in _RATES]
        self._train([(one, rate, _SCREEN_SEED) for one in networks for rate in rates], "screening")
        best = {}
        for one in networks:
            metrics = {rate: self._metric(one, rate, _SCREEN_SEED) for rate in rates}
            self._rates[one["name"]] = max(rates, key=lambda rate: _or_worst(metrics[rate]))
            best[one["name"]] = _or_worst(metrics[self._rates[one["name"]]])
        # The base's own noise, of two more seeds at its rate.
        rate = self._rates[self._base["name"]]
        self._train([(self._base, rate, _SCREEN_SEED + at) for at in (1, 2)], "screening")
        noise = statistics.stdev(
            [_or_worst(self._metric(self._base, rate, _SCREEN_SEED + at)) for at in range(3)]
        )
        limit = best[self._base["name"]] - _SCREEN_DEVIATIONS * noise * math.sqrt(2)
        return {
            one["name"]: (
                f"screened out: {best[one['name']]:.4f} at its best rate, base "
                f"{best[self._base['name']]:.4f}, deviation {noise:.4f}"
            )
            for one in self._variants
            if one["name"] in best and best[one["name"]] < limit
        }

    def _confirm(self, networks: Sequence[Described]) -> None:
        self._train(
            [(one, self._rates[one["name"]], seed) for seed in self._seeds() for one in networks],
            "confirming",
        )

    def _conclude(
        self,
        exact: Mapping[str, Mapping[str, Any]],
        rejected: Mapping[str, str],
        trained: Sequence[Described],
    ) -> Judged:
        base_metrics = self._metrics(self._base) if trained else ()
        margin, curve = self._plan.margin, self._mean_curve(self._base) if trained else ()
        paired: dict[str, Paired] = {}
        controls = [(self._control, "negative control")]
        controls += [(self._rewrite, "rewrite control")] if self._rewrite else []
        if trained:
            margin = margin or find_margin(self._damages(self._control))
        if trained and margin:
            confirmed = [
                *(one for one, _ in controls),
                *(one for one in trained if one["name"] not in rejected),
            ]
            for one in confirmed:
                paired[one["name"]] = judge_pairs(self._damages(one), margin)
        names = {one["name"] for one in trained}
        adjusted = holm({name: one.p_value for name, one in paired.items() if name in names})
        words = {
            name: word_of(one, adjusted.get(name, one.p_value)) for name, one in paired.items()
        }
        complaint = self._complaint(words, margin) if trained else ""
        verdicts = []
        for one in self._variants:
            verdicts.append(
                self._verdict(one, "variant", exact, rejected, paired, words, complaint)
            )
        if trained:
            verdicts += [
                self._verdict(one, role, {}, {}, paired, words, "") for one, role in controls
            ]
        return Judged(
            base=self._base["name"],
            task=self._task["task"],
            metric=self._task["metric"],
            data_digest=self._digest,
            plan=self._plan,
            margin=margin,
            margin_samples=extra_share(curve, margin) if curve and margin else None,
            base_metrics=base_metrics,
            base_curve=tuple(curve),
            complaint=complaint,
            verdicts=tuple(verdicts),
            curves={name: self._curves(one) for name, one in self._trained(trained)},
        )

    def _trained(self, trained: Sequence[Described]) -> list[tuple[str, Described]]:
        if not trained:
            return []
        everyone = [
            self._base,
            self._control,
            *trained,
            *([self._rewrite] if self._rewrite else []),
        ]
        return [(one["name"], one) for one in everyone if one["name"] in self._rates]

    def _complaint(self, words: Mapping[str, str], margin: float | None) -> str:
        """Says why these runs cannot tell networks apart; empty if they can."""
        if not margin:
            return "the negative control (half width) was no worse than the base"
        if words.get(self._control["name"]) != "inferior":
            return (
                "the negative control (half width) was not found inferior; train longer, take more "
                "pairs or give --margin"
            )
        if self._rewrite is None:
            return "the base has no exact rewrite to serve as a control; declare a T0 variant"
        if words.get(self._rewrite["name"]) not in ("non-inferior", "equivalent"):
            return "an exact rewrite of the base was not found non-inferior; take more pairs"
        return ""

    def _verdict(
        self,
        one: Described,
        role: Any,
        exact: Mapping[str, Mapping[str, Any]],
        rejected: Mapping[str, str],
        paired: Mapping[str, Paired],
        words: Mapping[str, Any],
        complaint: str,
    ) -> Verdict:
        name = one["name"]
        about = {
            "name": name,
            "role": role,
            "validity": one["validity"],
            "changes": one["replaces"],
            "learning_rate": self._rates.get(name),
        }
        if name in exact:
            return Verdict(**about, word="exact", reason=exact[name]["reason"])
        if name in rejected:
            word: Word = "the test cannot tell" if complaint else "inferior"
            return Verdict(**about, word=word, reason=complaint or rejected[name])
        found = paired.get(name)
        word = words.get(name, "the test cannot tell")
        reason = complaint or _reason(found)
        return Verdict(
            **about,
            word="the test cannot tell" if complaint else word,
            reason=reason,
            paired=found,
            metrics=self._metrics(one),
        )

    # --- Runs ---

    def _seeds(self) -> list[int]:
        return list(range(_FIRST_SEED, _FIRST_SEED + self._plan.pairs))

    def _metric(self, one: Described, rate: float, seed: int) -> float | None:
        run = self._runs.find(self._key(one, rate, seed))
        return run["metric"] if run else None

    def _metrics(self, one: Described) -> tuple[float | None, ...]:
        rate = self._rates[one["name"]]
        return tuple(self._metric(one, rate, seed) for seed in self._seeds())

    def _damages(self, one: Described) -> list[float]:
        """What the metric lost in each pair; pairs whose base diverged say nothing."""
        pairs = zip(self._metrics(self._base), self._metrics(one), strict=True)
        return [base - _or_worst(own) for base, own in pairs if base is not None]

    def _mean_curve(self, one: Described) -> list[tuple[int, float]]:
        rate = self._rates[one["name"]]
        curves = [
            run["curve"]
            for seed in self._seeds()
            if (run := self._runs.find(self._key(one, rate, seed))) and run["curve"]
        ]
        return [
            (int(points[0][0]), statistics.fmean(metric for _, metric in points))
            for points in zip(*curves, strict=True)
        ]

    def _curves(self, one: Described) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Learning curves, a pair each; empty where a run diverged or was not made."""
        rate = self._rates[one["name"]]
        runs = [self._runs.find(self._key(one, rate, seed)) for seed in self._seeds()]
        return tuple(
            tuple((int(samples), metric) for samples, metric in run["curve"]) if run else ()
            for run in runs
        )

    def _schedule(self) -> dict[str, int]:
        return {
            "steps": self._plan.steps,
            "batch": self._plan.batch,
            "checks": self._plan.checks,
        }

    def _key(self, one: Described, rate: float, seed: int) -> str:
        networks = [
            [which[name] for name in ("config", "workload", "source_sha256")]
            for which in (one, self._base)
        ]
        versions = versions_for(parse_target("cpu"))
        asked = [networks, self._digest, rate, seed, self._schedule(), self._plan.together]
        return cache.key_of(PROTOCOL, asked, versions)[:16]

    def _train(self, wanted: Iterable[tuple[Described, float, int]], what: str) -> None:
        """Does the runs that are missing."""
        groups: dict[tuple[str, float], tuple[Described, list[int]]] = {}
        wanted = list(wanted)
        for one, rate, seed in wanted:
            if self._runs.find(self._key(one, rate, seed)) is None:
                groups.setdefault((one["name"], rate), (one, []))[1].append(seed)
        jobs = {}
        for (_, rate), (one, seeds) in groups.items():
            for start in range(0, len(seeds), self._plan.together):
                part = seeds[start : start + self._plan.together]
                job = self._job(one, rate, part)
                jobs[id(job)] = (job, one, rate)
        done = sum(self._runs.find(self._key(*asked)) is not None for asked in wanted)
        for job, result in run_jobs(
            [job for job, _, _ in jobs.values()], num_workers=self._limits.num_workers
        ):
            _, one, rate = jobs[id(job)]
            if isinstance(result, Failure):
                if result.stage == "worker" and result.error in ("Timeout", "MemoryLimit", "Crash"):
                    raise DataError(f"Training {job.name} ended: {result.text}")
                raise DataError(f"Training {job.name} failed: {result.text}")
            for run in result:
                self._runs.keep(
                    {
                        "run": self._key(one, rate, run["seed"]),
                        "data": self._digest,
                        "network": one["name"],
                        "learning_rate": rate,
                        **self._schedule(),
                        **run,
                    }
                )
            done += len(result)
            self._progress(f"{what} {one['name']}", done, len(wanted))

    def _job(self, one: Described, rate: float, seeds: list[int]) -> Job:
        checkpoints = self._runs.folder / "checkpoints" / self._key(one, rate, seeds[0])
        return Job(
            name=f"{one['name']} with seeds {seeds}",
            function="jaxbench.quality.training:train_network",
            arguments={
                "described": dict(one),
                "base": dict(self._base),
                "data": str(self._data),
                "seeds": seeds,
                "learning_rate": rate,
                "schedule": self._schedule(),
                "checkpoints": str(checkpoints),
            },
            limit_s=self._limits.limit_s,
            limit_bytes=self._limits.limit_bytes,
        )

    def _ask(self, function: str, **arguments: Any) -> Any:
        job = Job(
            name=function,
            function=function,
            arguments={**arguments, "data": str(self._data)},
            limit_s=self._limits.limit_s,
            limit_bytes=self._limits.limit_bytes,
        )
        ((_, result),) = run_jobs([job], num_workers=1)
        if isinstance(result, Failure):
            raise DataError(result.text)
        return result


class _Runs:
    """Training runs as JSON lines, appended as soon as they end."""

    def __init__(self, folder: Path, digest: str) -> None:
        self.folder = folder
        self._path = folder / RUNS
        with cache.storage_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
        self._known = {run["run"]: run for run in read_runs(folder)}
        others = {run["data"] for run in self._known.values()} - {digest}
        if others:
            raise DataError(
                f"{self._path} holds runs on data {min(others)[:12]}, and this is data "
                f"{digest[:12]}: they cannot be compared. Give another --out."
            )

    def find(self, key: str) -> dict[str, Any] | None:
        """Returns a run by its key."""
        return self._known.get(key)

    def keep(self, run: dict[str, Any]) -> None:
        """Appends a run, whole or not at all."""
        line = (json.dumps(run) + "\n").encode()
        with cache.storage_errors(self._path), self._path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._known[run["run"]] = run


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Reads a folder's training runs; a half-written line is passed over."""
    path, found = folder / RUNS, []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _or_worst(metric: float | None) -> float:
    """A run that diverged counts as infinitely bad."""
    return -math.inf if metric is None else metric


def _reason(paired: Paired | None) -> str:
    if paired is None:
        return "it was not confirmed"
    if not math.isfinite(paired.mean):
        lost = sum(not math.isfinite(damage) for damage in paired.damages)
        return f"{lost} of {len(paired.damages)} runs diverged"
    return (
        f"damage {paired.mean:+.4f} [{paired.low:+.4f}, {paired.high:+.4f}], margin "
        f"{paired.margin:.4f}, {len(paired.damages)} pairs, power {paired.power:.2f}"
    )
