"""Prices of whole networks: composed from blocks where that is near enough, else compiled whole."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxbench.attached import attach
from jaxbench.cache import storage_errors
from jaxbench.compiler import versions_for
from jaxbench.errors import CandidateError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.record import Record, read_records
from jaxbench.run import Limits, Progress, Request, cpu_peaks, run
from jaxbench.search.bounds import lower_bound_s
from jaxbench.search.compose import Composition, fit_composition
from jaxbench.search.front import Times
from jaxbench.search.prices import PriceBook
from jaxbench.search.resolved import Resolved
from jaxbench.target import Target


class Pricing:
    """What the networks of one space cost on each target.

    Attributes:
      compositions: By target; none in a space without blocks.
      whole_targets: Where networks are compiled whole, and why.
      records: Whole compiles, by network and target.
      by_forward: The space's bands on the forward pass.
      base_s: Seconds of one sample of the base, by target.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        base: Resolved,
        targets: Sequence[Target],
        *,
        source: str,
        out: Path,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._base, self.targets, self._out = base, targets, out
        self._limits, self._progress = limits, progress
        on_cpu = next((target for target in targets if target.kind == "cpu"), None)
        self._peaks = cpu_peaks(on_cpu) if on_cpu else None
        self._book = PriceBook(
            source, space["digest"], targets, cpu_peaks=self._peaks, limits=limits
        )
        self.by_forward = [b for b in space["bands"] if b["quantity"] == "forward_s"]
        self.compositions: dict[str, Composition] = {}
        self.whole_targets: dict[str, str] = {}
        if not space["has_blocks"]:
            self.whole_targets = {target.name: "the space has no blocks" for target in targets}
        self.records: dict[tuple[str, str], Record] = {}
        self.base_s: Times = {}

    @property
    def num_compiled(self) -> int:
        """Blocks compiled by this process."""
        return self._book.num_compiled

    def check_composition(self, sample: Sequence[Resolved], bound: float) -> None:
        """Compiles a sample whole and fits how steps follow from blocks.

        Targets whose median error exceeds `bound` are compiled whole from there on.
        """
        sample = [self._base, *sample]
        self.compile(sample)
        self._book.fill(sample, self._progress)
        for target in self.targets:
            both = self._both(sample, target)
            composition = fit_composition(
                [by_kind for _, by_kind, _ in both], [step_s for _, _, step_s in both]
            )
            self.compositions[target.name] = composition
            if not both:
                self.whole_targets[target.name] = self._why_none(sample, target)
            elif composition.median_error > bound:
                self.whole_targets[target.name] = (
                    f"the median error of composed steps is {composition.median_error:.0%}, above "
                    f"the bound of {bound:.0%}"
                )
        self._keep_sample(sample)

    def _why_none(self, sample: Sequence[Resolved], target: Target) -> str:
        """Says why not one of a sample has both a whole step and a composed one."""
        whys = [why for one in sample if isinstance(why := self._book.by_kind(one, target), str)]
        return f"no block: {whys[0]}" if whys else "no network of the sample compiles whole"

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
        for target in self.targets:
            errors = self.compositions[target.name].signed_errors
            both = self._both(sample, target)
            for (one, _, step_s), error in zip(both, errors, strict=True):
                sample_s = step_s / one.samples
                kept["whole_s"].setdefault(one.name, {})[target.name] = sample_s
                kept["composed_s"].setdefault(one.name, {})[target.name] = sample_s * (1 + error)
        path = self._out / "sample.json"
        with storage_errors(path):
            path.write_text(json.dumps(kept), encoding="utf-8")

    @property
    def worst_error(self) -> float:
        """Of composed steps of the sample against whole compiles, on any target priced so."""
        return max(
            (
                max(one.errors, default=0.0)
                for target, one in self.compositions.items()
                if target not in self.whole_targets
            ),
            default=0.0,
        )

    def price_base(self) -> None:
        """Prices what all others are held against.

        Raises:
          CandidateError: if it has no price on a target.
        """
        self.fill([self._base])
        times = self.price(self._base)
        if times is None:
            failed = [
                f"{target}: {record.failure['text']}"
                for (name, target), record in self.records.items()
                if name == self._base.name and record.failure
            ]
            raise CandidateError(
                f"The base {self._base.name} has no price: {'; '.join(failed) or 'no block'}. Name "
                "other targets, or another base."
            )
        self.base_s = times

    def fill(self, networks: Sequence[Resolved]) -> None:
        """Compiles what networks need for a price."""
        if len(self.whole_targets) < len(self.targets):
            self._book.fill(networks, self._progress)
        if self.by_forward:
            self._book.fill([self._base, *networks], self._progress, forward=True)
        if self.whole_targets:
            self.compile(networks, only=tuple(self.whole_targets))

    def price(self, one: Resolved) -> Times | None:
        """Returns seconds of one sample by target, composed or of whole compiles."""
        times = {}
        for target in self.targets:
            step_s = (
                self._whole_step_s(one, target)
                if target.name in self.whole_targets
                else self._composed_step_s(one, target)
            )
            if step_s is None or step_s <= 0:
                return None
            times[target.name] = step_s / one.samples
        return times

    def slow_forward(self, one: Resolved) -> float:
        """By how much, at worst, the forward pass misses its band."""
        worst = -1.0
        for target in self.targets if self.by_forward else ():
            own, base = (
                self._book.by_kind(network, target, forward=True) for network in (one, self._base)
            )
            if isinstance(own, str) or isinstance(base, str):
                continue
            ratio = sum(own.values()) / one.samples / (sum(base.values()) / self._base.samples)
            for band in self.by_forward:
                worst = max(worst, band["low"] - ratio, ratio - band["high"])
        return worst

    def bounds(self, one: Resolved) -> dict[str, float]:
        """Returns seconds of one sample below which it cannot come, by target."""
        return {
            target.name: lower_bound_s(one, target, cpu_peaks=self._peaks) / one.samples
            for target in self.targets
        }

    def is_bounded(self, one: Resolved) -> bool:
        """Whether even its analytic bounds are worse than the base on every target."""
        return all(bound > self.base_s[target] for target, bound in self.bounds(one).items())

    def compile(
        self,
        networks: Sequence[Resolved],
        *,
        measure: bool = False,
        only: Sequence[str] | None = None,
    ) -> None:
        """Compiles networks whole, on all targets or some; their records are kept."""
        requests = [
            _request(one, target, measure=measure)
            for one in networks
            for target in (attach(self.targets) if measure else self.targets)
            if only is None or target.name in only
        ]
        run(requests, self._out, self._limits, self._progress)
        wanted = {request.id for request in requests}
        for record in read_records(self._out):
            if record.id in wanted:
                self.records[record.candidate, record.target] = record

    def _whole_step_s(self, one: Resolved, target: Target) -> float | None:
        record = self.records.get((one.name, target.name))
        return record.prediction["step_s"] if record and record.prediction else None

    def _composed_step_s(self, one: Resolved, target: Target) -> float | None:
        by_kind = self._book.by_kind(one, target)
        if isinstance(by_kind, str):
            return None
        return self.compositions[target.name].step_s(by_kind)


def _request(one: Resolved, target: Target, *, measure: bool) -> Request:
    return Request(
        described=one.described,
        layout=resolve_layout(parse_layout(one.layout), target.num_devices).name,
        target=target,
        measured=measure and target.can_run,
        versions=versions_for(target),
    )
