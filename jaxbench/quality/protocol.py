"""The verdict's protocol: rewrites checked, networks screened, what is left confirmed in pairs.

A. An exact rewrite (T0) is checked by values and gradients; if it is one, nothing is trained.
B. Screen: one seed, three learning rates, the same for all. It rejects what is worse than the base
   by more than three deviations, and never accepts. Each network keeps its best rate, which is the
   base's unless another is better by more than the noise of one seed.
C. Confirm: fresh seeds in pairs with the base. Verdicts by `verdict.py`, Holm over all confirmed.
D. Assay sensitivity, in the same runs: a negative control (half width) must be found inferior, an
   exact rewrite of the base must not; else the test cannot tell, and there is no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxbench.errors import DataError, UsageError
from jaxbench.quality.bench import Bench, Curve, Described, mean_curve
from jaxbench.quality.control import halve_width, scale_width
from jaxbench.quality.judged import Judged, Plan, Verdict, Word
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

_RATES = (0.5, 1.0, 2.0)  # times the base's
_SCREEN_DEVIATIONS = 3.0
_SCREEN_SEED, _FIRST_SEED = 1000, 1
_SHAPES = "jaxbench.quality.protocol_worker:output_shapes"


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
        bench=Bench(base, data=data, out=out, plan=plan, limits=limits, progress=progress),
        plan=plan,
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
    scales: Sequence[float] = (1.0,),
) -> tuple[Judged, ...]:
    """Judges candidates by name, on the small data set that ships with jaxbench if none is given.

    Args:
      scales: What all widths are multiplied by; all is judged once at each.

    Returns:
      What was found at each scale, the smallest first.

    Raises:
      UsageError: if there is no such candidate, or a scale is not positive.
      DataError: as `judge`, or where there is no width to scale.
    """
    if wrong := [scale for scale in scales if not scale > 0]:
        raise UsageError(f"A scale of {wrong[0]:g} leaves no network. Give positive --scales.")
    sources = [*families_of([base, *variants]), *(str(Path(file).resolve()) for file in files)]
    described = {one["name"]: one for one in describe(sources, limits)}
    for name in (base, *variants):
        if name not in described:
            raise UsageError(
                f"No candidate {name!r}. `jaxbench list candidates` shows those there are; --from "
                "FILE adds a file's."
            )
    rewrite = _find_rewrite(described[base], described.values())
    return tuple(
        judge(
            scale_width(described[base], scale),
            [scale_width(described[name], scale) for name in variants],
            rewrite=rewrite and scale_width(rewrite, scale),
            data=data or packaged_folder(),
            out=out,
            plan=plan,
            limits=limits,
            progress=progress,
        )
        for scale in sorted(set(scales))
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
    bench: Bench
    plan: Plan
    no_rewrite: str = "the base has no exact rewrite to serve as a control; declare a T0 variant"

    def __post_init__(self) -> None:
        self.seeds = range(_FIRST_SEED, _FIRST_SEED + self.plan.pairs)
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
            shapes[one["name"]] = self.bench.ask(_SHAPES, one)
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
        return self.bench.ask("jaxbench.quality.static:check_rewrite", one, base=dict(self.base))

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
        self.bench.train(
            [(one, rate, _SCREEN_SEED) for one in networks for rate in rates], "screening"
        )
        # The base's own noise, of two more seeds at its rate.
        own_rate = self._best_rate(self.base, rates)
        self.bench.train([(self.base, own_rate, _SCREEN_SEED + at) for at in (1, 2)], "screening")
        own = [self.bench.metric(self.base, own_rate, _SCREEN_SEED + at) for at in range(3)]
        noise = statistics.stdev(self._require(own))
        best = {}
        for one in networks:
            rate = self._best_rate(one, rates)
            found, at_own = (
                _or_worst(self.bench.metric(one, which, _SCREEN_SEED)) for which in (rate, own_rate)
            )
            # Of one seed, a rate that is better by no more than noise is no better.
            rate, best[one["name"]] = (
                (rate, found) if found > at_own + noise * math.sqrt(2) else (own_rate, at_own)
            )
            self.bench.rates[one["name"]] = rate
        limit = best[self.base["name"]] - _SCREEN_DEVIATIONS * noise * math.sqrt(2)
        return {
            one["name"]: (
                f"screened out: {best[one['name']]:.4f} at its best rate, base "
                f"{best[self.base['name']]:.4f}, deviation {noise:.4f}"
            )
            for one in self.variants
            if one["name"] in best and best[one["name"]] < limit
        }

    def _best_rate(self, one: Described, rates: Sequence[float]) -> float:
        return max(rates, key=lambda rate: _or_worst(self.bench.metric(one, rate, _SCREEN_SEED)))

    def _confirm(self, networks: Sequence[Described]) -> None:
        self.bench.train(
            [(one, self.bench.rates[one["name"]], seed) for seed in self.seeds for one in networks],
            "confirming",
            drive=True,
        )

    def _conclude(
        self,
        exact: Mapping[str, Mapping[str, Any]],
        rejected: Mapping[str, str],
        trained: Sequence[Described],
    ) -> Judged:
        if not trained:
            verdicts = [
                self._verdict(one, "variant", exact, {}, {}, {}, "") for one in self.variants
            ]
            return self._judged(verdicts)
        controls = [(self.control, "negative control")]
        controls += [(self.rewrite, "rewrite control")] if self.rewrite else []
        confirmed = [
            *(one for one, _ in controls),
            *(one for one in trained if one["name"] not in rejected),
        ]
        damages = {one["name"]: self._damages(one) for one in confirmed}
        margin = self.plan.margin or find_margin(damages[self.control["name"]])
        paired = {name: judge_pairs(own, margin) for name, own in damages.items()} if margin else {}
        names = {one["name"] for one in trained}
        adjusted = holm({name: one.p_value for name, one in paired.items() if name in names})
        words = {
            name: word_of(one, adjusted.get(name, one.p_value)) for name, one in paired.items()
        }
        complaint = self._complaint(words, margin)
        verdicts = [
            self._verdict(one, "variant", exact, rejected, paired, words, complaint)
            for one in self.variants
        ]
        verdicts += [self._verdict(one, role, {}, {}, paired, words, "") for one, role in controls]
        curves = {
            one["name"]: self.bench.curves(one, self.seeds) for one in (self.base, *confirmed)
        }
        return self._judged(verdicts, margin=margin, complaint=complaint, curves=curves)

    def _judged(
        self,
        verdicts: Sequence[Verdict],
        *,
        margin: float | None = None,
        complaint: str = "",
        curves: Mapping[str, tuple[Curve, ...]] | None = None,
    ) -> Judged:
        """Returns all that was found; nothing was trained where there are no curves."""
        base_curve = mean_curve(curves[self.base["name"]]) if curves else ()
        return Judged(
            base=self.base["name"],
            task=self.bench.about["task"],
            metric=self.bench.about["metric"],
            data_digest=self.bench.about["data_digest"],
            plan=self.plan,
            margin=margin,
            margin_samples=extra_share(base_curve, margin) if base_curve and margin else None,
            base_metrics=self.bench.metrics(self.base, self.seeds) if curves else (),
            base_curve=base_curve,
            complaint=complaint,
            verdicts=tuple(verdicts),
            base_rollouts=self.bench.rollouts(self.base, self.seeds) if curves else (),
            curves=curves or {},
        )

    def _complaint(self, words: Mapping[str, str], margin: float | None) -> str:
        """Says why these runs cannot tell networks apart; empty if they can."""
        if not margin:
            lost = self.bench.metrics(self.control, self.seeds).count(None)
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
            "learning_rate": self.bench.rates.get(name),
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
            metrics=self.bench.metrics(one, self.seeds),
            rollouts=self.bench.rollouts(one, self.seeds),
        )

    def _damages(self, one: Described) -> list[float]:
        """What the metric lost in each pair; infinite where the network diverged."""
        own = self.bench.metrics(one, self.seeds)
        pairs = zip(self._base_metrics(), own, strict=True)
        return [base - _or_worst(metric) for base, metric in pairs]

    def _base_metrics(self) -> list[float]:
        return self._require(self.bench.metrics(self.base, self.seeds))

    def _require(self, metrics: Sequence[float | None]) -> list[float]:
        """Returns the base's metrics; a base that diverges is nothing to compare with."""
        found = [metric for metric in metrics if metric is not None]
        if len(found) < len(metrics):
            raise DataError(
                f"The base {self.base['name']} diverged in {len(metrics) - len(found)} of "
                f"{len(metrics)} runs: nothing can be compared with it. Lower its learning rate."
            )
        return found


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
