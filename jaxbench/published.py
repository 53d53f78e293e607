"""Published step times as requests: what others measured, built again from its configuration."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from jaxbench.compiler import versions_for
from jaxbench.errors import UsageError
from jaxbench.layout import parse_layout, resolve_layout
from jaxbench.run import Request
from jaxbench.target import parse_target


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One published training step.

    Attributes:
      config, inputs: What differs from the candidate's own: fields, and shapes of a sample.
      batch: Global batch.
      step_s: Published seconds of one step.
      half: Whether constants were fitted on the row.
      group: Which goal it counts for; `flash` are Pallas kernels and host offload on TPUs; of
        `order`, whose scale is not known, only the order of rivals counts.
      rivals: Name of the set of models that one publication timed on one chip; empty for none.
      differs: What could not be reproduced.
      options: Compiler options that were given.
    """

    id: str
    candidate: str
    layout: str
    target: str
    batch: int
    step_s: float
    half: Literal["fit", "check"]
    group: Literal["plain", "flash", "gpu", "order"]
    source: str
    differs: str
    rivals: str = ""
    config: tuple[tuple[str, Any], ...] = ()
    inputs: tuple[tuple[str, tuple[int, ...]], ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def chip(self) -> str:
        """Name of the chip in chips.toml."""
        return parse_target(self.target).chip

    def request(self, described: Mapping[str, Mapping[str, Any]]) -> Request:
        """Returns the case as a request, from the descriptions of all candidates by name."""
        target = dataclasses.replace(parse_target(self.target), options=self.options)
        return Request(
            described=self._describe(described[self.candidate]),
            layout=resolve_layout(parse_layout(self.layout), target.num_devices).name,
            target=target,
            measured=False,
            versions=versions_for(target),
        )

    def _describe(self, described: Mapping[str, Any]) -> dict[str, Any]:
        workload, shapes = described["workload"], dict(self.inputs)
        inputs = tuple(
            (name, {**given, "shape": shapes.get(name, given["shape"])})
            for name, given in workload["inputs"]
        )
        return {
            **described,
            "config": {**described["config"], **dict(self.config)},
            "workload": {**workload, "global_batch": self.batch, "inputs": inputs},
        }


@functools.cache
def published_cases() -> tuple[Case, ...]:
    """Reads published.toml: a row's own fields stand before its series'."""
    text = resources.files("jaxbench").joinpath("published.toml").read_text(encoding="utf-8")
    return tuple(
        _case({**{key: value for key, value in series.items() if key != "rows"}, **row})
        for series in tomllib.loads(text)["series"]
        for row in series["rows"]
    )


def _case(row: dict[str, Any]) -> Case:
    row["options"] = tuple(row.get("options", {}).items())
    row["config"] = tuple(row.get("config", {}).items())
    row["inputs"] = tuple((name, tuple(shape)) for name, shape in row.get("inputs", {}).items())
    return Case(**row)


def select_cases(patterns: Sequence[str]) -> list[Case]:
    """Returns the cases whose id or chip contains one of the patterns; all if there are none.

    Raises:
      UsageError: if a pattern matches none.
    """
    cases = published_cases()
    for pattern in patterns:
        if not any(_matches(case, pattern) for case in cases):
            chips = ", ".join(sorted({case.chip for case in cases}))
            raise UsageError(
                f"No published case {pattern!r}. Give a part of an id such as "
                f"{cases[0].id!r}, or a chip: {chips}."
            )
    return [
        case for case in cases if not patterns or any(_matches(case, part) for part in patterns)
    ]


def _matches(case: Case, pattern: str) -> bool:
    return pattern in case.id or pattern == case.chip
