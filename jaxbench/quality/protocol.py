"""The verdict's protocol: rewrites checked, networks screened, what is left confirmed in pairs.

A. An exact rewrite (T0) is checked by values and gradients; if it is one, nothing is trained.
B. Screen: one seed, three learning rates, the same for all. It rejects what is worse than the base
   by more than three deviations, and never accepts; each network keeps its best rate.
C. Confirm: fresh seeds in pairs with the base. Verdicts by `verdict.py`, Holm over all confirmed.
D. Assay sensitivity, in the same runs: a negative control (half width) must be found inferior, an
   exact rewrite of the base must not; else the test cannot tell, and there is no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.compiler import versions_for
from jaxbench.errors import DataError, Failure, UsageError
from jaxbench.quality.control import halve_width
from jaxbench.quality.judged import Judged, Plan, Verdict, Word
from jaxbench.quality.runs import Runs
from jaxbench.quality.shards import packaged_folder
from jaxbench.quality.verdict import (
    Paired,
    extra_share,
    find_margin,
    holm,
    judge_pairs,
    word_of,
)
from jaxbench.run import Limits, Progress, describe, families_of
from jaxbench.target import parse_target
from jaxbench.worker import Job, run_jobs

PROTOCOL = "paired-noninferiority-1"
_RATES = (0.5, 1.0, 2.0)  # times the base's
_SCREEN_DEVIATIONS = 3.0
_SCREEN_SEED, _FIRST_SEED = 1000, 1
_WORKER = "jaxbench.quality.protocol_worker"

Described = Mapping[str, Any]


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
    return _Judge(
        base=base,
        variants=variants,
        rewrite=rewrite,
        data=data,
        out=out,
        plan=plan,
        limits=limits,
        progress=progress,
    ).go()


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


@dataclass(kw_only=True)
class _Judge:
    """One judgement as it goes."""

    base: Described
    variants: Sequence[Described]
    rewrite: Described | None
    data: Path
    out: Path
    plan: Plan
    limits: Limits
    progress: Progress
    rates: dict[str, float] = field(default_factory=dict)
    no_rewrite: str = "the base has no exact rewrite to serve as a control; declare a T0 variant"

    def __post_init__(self) -> None:
        self.task = self._ask(f"{_WORKER}:describe_task", described=dict(self.base))
        self.digest: str = self.task["data_digest"]
        self.runs = Runs(self.out, self.digest)
        self.control = {**halve_width(self.base), "of": self.base.get("of", self.base["name"])}

    def go(self) -> Judged:
        """Runs all stages."""
        self._check_outputs()
        exact = self._check_rewrites()
        trained = [one for one in self.variants if not _is_exact(exact, one)]
        controls = [self.control] + ([self.rewrite] if self.rewrite else [])
        rejected: dict[str, str] = {}
        if trained:
            self._check_rewrite_control(exact)
            rejected = self._screen([self.base, *controls, *trained])
            live = [one for one in trained if one["name"] not in rejected]
            self._confirm([self.base, *controls, *live])
        return self._conclude(exact, rejected, trained)

    # --- Stages ---

    def _check_outputs(self) -> None:
        """Refuses variants that put out another shape than the base."""
        shapes = {}
        for one in (self.base, *self.variants):
            shapes[one["name"]] = self._ask(f"{_WORKER}:output_shapes", described=dict(one))
        wanted = shapes[self.base["name"]]
        for name, found in shapes.items():
            if found != wanted:
                raise DataError(
                    f"{name} puts out {found} and {self.base['name']} {wanted}: networks that "
                    "answer another question cannot be held equal. Give a variant with the base's "
                    "output."
                )

    def _check_rewrites(self) -> dict[str, dict[str, Any]]:
        """Returns what was found of the variants that are declared exact rewrites."""
        return {
            one["name"]: self._check_rewrite(one)
            for one in self.variants
            if one["validity"] == "T0"
        }

    def _check_rewrite(self, one: Described) -> dict[str, Any]:
        return self._ask(
            "jaxbench.quality.static:check_rewrite", described=dict(one), base=dict(self.base)
        )

    def _check_rewrite_control(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        """Leaves out a control that is declared a rewrite of the base and is none."""
        if self.rewrite is not None:
            name = self.rewrite["name"]
            checked = known[name] if name in known else self._check_rewrite(self.rewrite)
            if not checked["exact"]:
                self.no_rewrite = f"{name} is declared an exact rewrite: {checked['reason']}"
                self.rewrite = None

    def _screen(self, networks: Sequence[Described]) -> dict[str, str]:
        """Tunes all in the same way; returns which variants are out, and why."""
        base_rate = self.base["workload"]["learning_rate"]
        rates = [base_rate * factor for factor in _RATES]
        self._train([(one, rate, _SCREEN_SEED) for one in networks for rate in rates], "screening")
        best = {}
        for one in networks:
            metrics = {rate: self._metric(one, rate, _SCREEN_SEED) for rate in rates}
            self.rates[one["name"]] = max(rates, key=lambda rate: _or_worst(metrics[rate]))
            best[one["name"]] = _or_worst(metrics[self.rates[one["name"]]])
        # The base's own noise, of two more seeds at its rate.
        rate = self.rates[self.base["name"]]
        self._train([(self.base, rate, _SCREEN_SEED + at) for at in (1, 2)], "screening")
        own = [self._metric(self.base, rate, _SCREEN_SEED + at) for at in range(3)]
        noise = statistics.stdev(self._require(own))
        limit = best[self.base["name"]] - _SCREEN_DEVIATIONS * noise * math.sqrt(2)
        return {
            one["name"]: (
                f"screened out: {best[one['name']]:.4f} at its best rate, base "
                f"{best[self.base['name']]:.4f}, deviation {noise:.4f}"
            )
            for one in self.variants
            if one["name"] in best and best[one["name"]] < limit
        }

    def _confirm(self, networks: Sequence[Described]) -> None:
        self._train(
            [(one, self.rates[one["name"]], seed) for seed in self._seeds() for one in networks],
            "confirming",
        )

    def _conclude(
        self,
        exact: Mapping[str, Mapping[str, Any]],
        rejected: Mapping[str, str],
        trained: Sequence[Described],
    ) -> Judged:
        base_metrics = self._metrics(self.base) if trained else ()
        margin, curve = self.plan.margin, self._mean_curve(self.base) if trained else ()
        paired: dict[str, Paired] = {}
        controls = [(self.control, "negative control")]
        controls += [(self.rewrite, "rewrite control")] if self.rewrite else []
        if trained:
            margin = margin or find_margin(self._damages(self.control))
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
        for one in self.variants:
            verdicts.append(
                self._verdict(one, "variant", exact, rejected, paired, words, complaint)
            )
        if trained:
            verdicts += [
                self._verdict(one, role, {}, {}, paired, words, "") for one, role in controls
            ]
        return Judged(
            base=self.base["name"],
            task=self.task["task"],
            metric=self.task["metric"],
            data_digest=self.digest,
            plan=self.plan,
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
            self.base,
            self.control,
            *trained,
            *([self.rewrite] if self.rewrite else []),
        ]
        return [(one["name"], one) for one in everyone if one["name"] in self.rates]

    def _complaint(self, words: Mapping[str, str], margin: float | None) -> str:
        """Says why these runs cannot tell networks apart; empty if they can."""
        if not margin:
            lost = self._metrics(self.control).count(None)
            why = f"diverged in {lost} runs" if lost else "was no worse than the base"
            return f"the negative control (half width) {why}: no margin follows; give --margin"
        if words.get(self.control["name"]) != "inferior":
            return (
                "the negative control (half width) was not found inferior; train longer, take more "
                "pairs or give --margin"
            )
        if self.rewrite is None:
            return self.no_rewrite
        if words.get(self.rewrite["name"]) not in ("non-inferior", "equivalent"):
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
            "learning_rate": self.rates.get(name),
        }
        if _is_exact(exact, one):
            return Verdict(**about, word="exact", reason=exact[name]["reason"])
        if name in rejected:
            word: Word = "the test cannot tell" if complaint else "inferior"
            return Verdict(**about, word=word, reason=complaint or rejected[name])
        found = paired.get(name)
        word = words.get(name, "the test cannot tell")
        reason = complaint or _reason(found)
        if name in exact:
            reason = f"no exact rewrite: {exact[name]['reason']}; {reason}"
        return Verdict(
            **about,
            word="the test cannot tell" if complaint else word,
            reason=reason,
            paired=found,
            metrics=self._metrics(one),
        )

    # --- Runs ---

    def _seeds(self) -> list[int]:
        return list(range(_FIRST_SEED, _FIRST_SEED + self.plan.pairs))

    def _metric(self, one: Described, rate: float, seed: int) -> float | None:
        run = self.runs.find(self._key(one, rate, seed))
        return run["metric"] if run else None

    def _metrics(self, one: Described) -> tuple[float | None, ...]:
        rate = self.rates[one["name"]]
        return tuple(self._metric(one, rate, seed) for seed in self._seeds())

    def _require(self, metrics: Sequence[float | None]) -> list[float]:
        """Returns the base's metrics; a base that diverges is nothing to compare with."""
        found = [metric for metric in metrics if metric is not None]
        if len(found) < len(metrics):
            raise DataError(
                f"The base {self.base['name']} diverged in {len(metrics) - len(found)} of "
                f"{len(metrics)} runs: nothing can be compared with it. Lower its learning rate."
            )
        return found

    def _damages(self, one: Described) -> list[float]:
        """What the metric lost in each pair; infinite where the network diverged."""
        pairs = zip(self._require(self._metrics(self.base)), self._metrics(one), strict=True)
        return [base - _or_worst(own) for base, own in pairs]

    def _mean_curve(self, one: Described) -> list[tuple[int, float]]:
        rate = self.rates[one["name"]]
        curves = [
            run["curve"]
            for seed in self._seeds()
            if (run := self.runs.find(self._key(one, rate, seed))) and run["curve"]
        ]
        return [
            (int(points[0][0]), statistics.fmean(metric for _, metric in points))
            for points in zip(*curves, strict=True)
        ]

    def _curves(self, one: Described) -> tuple[tuple[tuple[int, float], ...], ...]:
        """Learning curves, a pair each; empty where a run diverged or was not made."""
        rate = self.rates[one["name"]]
        runs = [self.runs.find(self._key(one, rate, seed)) for seed in self._seeds()]
        return tuple(
            tuple((int(samples), metric) for samples, metric in run["curve"]) if run else ()
            for run in runs
        )

    def _schedule(self) -> dict[str, int]:
        return {
            "steps": self.plan.steps,
            "batch": self.plan.batch,
            "checks": self.plan.checks,
        }

    def _key(self, one: Described, rate: float, seed: int) -> str:
        networks = [
            [which[name] for name in ("config", "workload", "source_sha256")]
            for which in (one, self.base)
        ]
        versions = versions_for(parse_target("cpu"))
        asked = [networks, self.digest, rate, seed, self._schedule(), self.plan.together]
        return cache.key_of(PROTOCOL, asked, versions)[:16]

    def _train(self, wanted: Iterable[tuple[Described, float, int]], what: str) -> None:
        """Does the runs that are missing."""
        groups: dict[tuple[str, float], tuple[Described, list[int]]] = {}
        wanted = list(wanted)
        for one, rate, seed in wanted:
            if self.runs.find(self._key(one, rate, seed)) is None:
                groups.setdefault((one["name"], rate), (one, []))[1].append(seed)
        jobs = {}
        for (_, rate), (one, seeds) in groups.items():
            for start in range(0, len(seeds), self.plan.together):
                part = seeds[start : start + self.plan.together]
                job = self._job(one, rate, part)
                jobs[id(job)] = (job, one, rate)
        done = sum(self.runs.find(self._key(*asked)) is not None for asked in wanted)
        for job, result in run_jobs(
            [job for job, _, _ in jobs.values()], num_workers=self.limits.num_workers
        ):
            _, one, rate = jobs[id(job)]
            if isinstance(result, Failure):
                raise DataError(f"Training {job.name} failed: {result.text}")
            for run in result:
                self.runs.keep(
                    {
                        "run": self._key(one, rate, run["seed"]),
                        "data": self.digest,
                        "network": one["name"],
                        "learning_rate": rate,
                        **self._schedule(),
                        **run,
                    }
                )
            done += len(result)
            self.progress(f"{what} {one['name']}", done, len(wanted))

    def _job(self, one: Described, rate: float, seeds: list[int]) -> Job:
        checkpoints = self.runs.folder / "checkpoints" / self._key(one, rate, seeds[0])
        return Job(
            name=f"{one['name']} with seeds {seeds}",
            function="jaxbench.quality.training:train_network",
            arguments={
                "described": dict(one),
                "base": dict(self.base),
                "data": str(self.data),
                "seeds": seeds,
                "learning_rate": rate,
                "schedule": self._schedule(),
                "checkpoints": str(checkpoints),
            },
            limit_s=self.limits.limit_s,
            limit_bytes=self.limits.limit_bytes,
        )

    def _ask(self, function: str, **arguments: Any) -> Any:
        job = Job(
            name=function,
            function=function,
            arguments={**arguments, "data": str(self.data)},
            limit_s=self.limits.limit_s,
            limit_bytes=self.limits.limit_bytes,
        )
        ((_, result),) = run_jobs([job], num_workers=1)
        if isinstance(result, Failure):
            raise DataError(result.text)
        return result


def _is_exact(checked: Mapping[str, Mapping[str, Any]], one: Described) -> bool:
    return one["name"] in checked and checked[one["name"]]["exact"]


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
