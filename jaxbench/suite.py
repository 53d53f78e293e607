"""Suites: named sets of candidates, layouts and targets, one TOML file each in jaxbench/suites."""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from jaxbench.errors import UsageError

DEFAULT_TARGETS = ("cpu", "tpu-v5e", "tpu-v5p", "tpu-7x", "gpu-h100")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Candidates by name or pattern, all under one layout on the same targets."""

    candidates: tuple[str, ...]
    targets: tuple[str, ...]
    layout: str = "data"

    def select(self, described: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Returns the described candidates that the part names.

        Raises:
          UsageError: if a name or pattern matches none.
        """
        chosen = {}
        for pattern in self.candidates:
            found = [one for one in described if fnmatch.fnmatchcase(one["name"], pattern)]
            if not found:
                raise UsageError(
                    f"Unknown suite or candidate {pattern!r}. Suites: {', '.join(suite_names())}; "
                    "`jaxbench list candidates` shows candidates; a file's name ends in .py."
                )
            chosen.update({one["name"]: one for one in found})
        return list(chosen.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class Suite:
    """A named set of parts.

    Attributes:
      measure: Targets on which the suite times steps, where they are attached.
    """

    name: str
    about: str
    parts: tuple[Part, ...]
    measure: tuple[str, ...] = field(default=())


def suite_names() -> list[str]:
    """Returns the names of the suites that ship with jaxbench."""
    files = (item.name for item in resources.files("jaxbench.suites").iterdir())
    return sorted(name[: -len(".toml")] for name in files if name.endswith(".toml"))


def load_suite(name: str) -> Suite:
    """Reads a suite that ships with jaxbench, by one of `suite_names`."""
    row = tomllib.loads(
        resources.files("jaxbench.suites").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    )
    parts = tuple(
        Part(
            candidates=tuple(part["candidates"]),
            targets=tuple(part.get("targets", row.get("targets", DEFAULT_TARGETS))),
            layout=part["layout"],
        )
        for part in row["parts"]
    )
    return Suite(name=name, about=row["about"], parts=parts, measure=tuple(row.get("measure", ())))
