"""Spaces: a base network, the places where it may change, and what must stay equal.

A space is Python: a file with a module-level `SPACE`.

    SPACE = Space(
        name="mynet",
        base=CANDIDATES[0],
        choices=(
            Choice("width", (256, 320, 384), validity="T1"),
            Choice("stages.1", (2, 3, 4), validity="T1"),
            Choice("inputs.images", ((6, 48, 128, 3), (6, 32, 96, 3)), validity="T2"),
        ),
        bands=(Band("num_params", 0.9, 1.1),),
    )

A point of it is one value for each choice. With `blocks` a network's step is composed from blocks
that are compiled once for all networks that have them; without, every network is compiled whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxbench.cache import key_of
from jaxbench.candidate import Candidate, Validity
from jaxbench.errors import CandidateError
from jaxbench.search.block import Block

CLASSES: tuple[Validity, ...] = ("base", "T0", "T1", "T2")
QUANTITIES = ("num_params", "forward_flops", "activation_bytes", "forward_s")

Point = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Choice:
    """One place where the networks of a space differ.

    Attributes:
      name: A config field; `field.2`, one entry of a tuple field; `inputs.NAME`, the shape of one
        sample; `global_batch`; `layout`; or any word, with `change`.
      values: What may stand there, each JSON-ready or a tuple. The base's own value must be among
        them, unless there is a `change`: then it is the first.
      validity: Class of a network that has another value here than the base.
      change: `change(config, value)` returns the changed config.
    """

    name: str
    values: tuple[Any, ...]
    validity: Validity = "T1"
    change: Callable[[Any, Any], Any] | None = None


@dataclass(frozen=True, slots=True)
class Band:
    """What must stay equal: a quantity, as a multiple of the base's, within [low, high].

    Attributes:
      quantity: `num_params`; `forward_flops` of one sample; `activation_bytes`, what the backward
        pass keeps of the forward one; `forward_s`, predicted seconds of the forward pass on each
        target; or a name in the space's `measures`.
    """

    quantity: str
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class Space:
    """Networks around a base.

    Attributes:
      name: Of the space; its networks are called `FAMILY-NAME-DIGEST`.
      base: A candidate of the same file or of a shipped family.
      blocks: `blocks(candidate)` lists the blocks of its step.
      measures: Further quantities for bands, such as a receptive field: functions of a candidate.
    """

    name: str
    base: Candidate
    choices: tuple[Choice, ...]
    bands: tuple[Band, ...] = ()
    layout: str = "data"
    blocks: Callable[[Candidate], Iterable[Block]] | None = None
    measures: Mapping[str, Callable[[Candidate], float]] = field(default_factory=dict)

    @property
    def num_points(self) -> int:
        """Networks before the bands."""
        return math.prod(len(choice.values) for choice in self.choices)

    def base_point(self) -> dict[str, Any]:
        """Returns the point that the base is."""
        return {choice.name: self._base_value(choice) for choice in self.choices}

    def candidate(self, point: Point) -> Candidate:
        """Returns the network at a point.

        Raises:
          CandidateError: if a value is not among its choice's, or its config refuses it.
        """
        config, workload = self.base.config, self.base.workload
        changed = self.changed(point)
        for choice in changed:
            value = point[choice.name]
            if choice.change is not None:
                config = _configured(choice, choice.change, config, value)
            elif choice.name == "global_batch":
                workload = dataclasses.replace(workload, global_batch=value)
            elif choice.name.startswith("inputs."):
                workload = _with_shape(workload, choice.name.removeprefix("inputs."), value)
            elif choice.name != "layout":
                config = _configured(choice, partial(_set, choice.name), config, value)
        if not changed:
            return self.base
        return dataclasses.replace(
            self.base,
            name=f"{self.base.family}-{self.name}-{point_digest(point)}",
            config=config,
            workload=workload,
            base=self.base.name,
            replaces=self.words(point),
            validity=max((choice.validity for choice in changed), key=CLASSES.index),
        )

    def changed(self, point: Point) -> list[Choice]:
        """Returns the choices in which a point differs from the base."""
        for choice in self.choices:
            if point.get(choice.name) not in choice.values:
                raise CandidateError(
                    f"{choice.name}={point.get(choice.name)!r} is not in space {self.name!r}. "
                    f"Allowed: {', '.join(map(repr, choice.values))}."
                )
        base = self.base_point()
        return [choice for choice in self.choices if point[choice.name] != base[choice.name]]

    def words(self, point: Point) -> str:
        """Says what a point changes against the base."""
        base = self.base_point()
        return "; ".join(
            f"{choice.name} {_text(base[choice.name])} -> {_text(point[choice.name])}"
            for choice in self.changed(point)
        )

    def check(self) -> None:
        """Raises CandidateError if the space contradicts itself."""
        names = [choice.name for choice in self.choices]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise CandidateError(
                f"Space {self.name!r} has the choice {twice[0]!r} twice. Join them."
            )
        if not names:
            raise CandidateError(
                f"Space {self.name!r} has no choices. Give it at least one Choice."
            )
        for choice in self.choices:
            base = self._base_value(choice)
            if base not in choice.values or len(set(map(repr, choice.values))) < len(choice.values):
                raise CandidateError(
                    f"Choice {choice.name!r} of space {self.name!r} has the values "
                    f"{choice.values!r}: each once, and the base's own, {base!r}, among them."
                )
        self._check_bands()

    def _check_bands(self) -> None:
        known = (*QUANTITIES, *self.measures)
        kept: dict[str, tuple[float, float]] = {}
        for band in self.bands:
            if band.quantity not in known:
                raise CandidateError(
                    f"Space {self.name!r} has a band on {band.quantity!r}. Known: "
                    f"{', '.join(known)}; others are functions in its `measures`."
                )
            low, high = kept.get(band.quantity, (0.0, math.inf))
            low, high = max(low, band.low), min(high, band.high)
            if low > high:
                raise CandidateError(
                    f"The bands on {band.quantity} of space {self.name!r} contradict each other: "
                    f"no value is at least {low:g} and at most {high:g} times the base's. Widen "
                    "one."
                )
            kept[band.quantity] = (low, high)

    def _base_value(self, choice: Choice) -> Any:
        if choice.change is not None:
            return choice.values[0]
        if choice.name == "layout":
            return self.layout
        if choice.name == "global_batch":
            return self.base.workload.global_batch
        if choice.name.startswith("inputs."):
            shapes = {name: given.shape for name, given in self.base.workload.inputs}
            return _found(shapes, choice.name.removeprefix("inputs."), choice, self.name)
        field_name, _, index = choice.name.partition(".")
        fields = {item.name for item in dataclasses.fields(self.base.config)}
        value = _found(
            {name: getattr(self.base.config, name) for name in fields},
            field_name,
            choice,
            self.name,
        )
        return value[int(index)] if index else value


def _found(known: Mapping[str, Any], name: str, choice: Choice, space: str) -> Any:
    if name not in known:
        raise CandidateError(
            f"Choice {choice.name!r} of space {space!r} changes nothing that is there. Known: "
            f"{', '.join(sorted(known))}."
        )
    return known[name]


def choices_from_variants(base: Candidate, candidates: Sequence[Candidate]) -> tuple[Choice, ...]:
    """Returns one choice for each config field in which a base's declared variants differ from it.

    Only variants that change a single field are taken; the class is the worst that one declares.
    """
    own = dataclasses.asdict(base.config)
    found: dict[str, tuple[list[Any], list[Validity]]] = {}
    for one in candidates:
        if one.base != base.name or one.name == base.name or one.workload != base.workload:
            continue
        changed = [
            name for name, value in dataclasses.asdict(one.config).items() if value != own[name]
        ]
        if len(changed) == 1:
            values, classes = found.setdefault(changed[0], ([getattr(base.config, changed[0])], []))
            values.append(getattr(one.config, changed[0]))
            classes.append(one.validity)
    return tuple(
        Choice(name, tuple(dict.fromkeys(values)), validity=max(classes, key=CLASSES.index))
        for name, (values, classes) in found.items()
    )


def point_digest(point: Point) -> str:
    """Returns eight digits by which a point is told from others."""
    return key_of(sorted((name, _plain(value)) for name, value in point.items()))[:8]


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "x".join(map(_text, value)) or "none"
    return str(value)


def _configured(choice: Choice, change: Callable[[Any, Any], Any], config: Any, value: Any) -> Any:
    try:
        return change(config, value)
    except (ValueError, TypeError, IndexError) as error:
        raise CandidateError(f"{choice.name}: {error}") from error


def _set(name: str, config: Any, value: Any) -> Any:
    name, _, index = name.partition(".")
    if index:
        items = list(getattr(config, name))
        items[int(index)] = value
        value = tuple(items)
    return dataclasses.replace(config, **{name: value})


def _with_shape(workload: Any, name: str, shape: tuple[int, ...]) -> Any:
    inputs = tuple(
        (key, dataclasses.replace(given, shape=tuple(shape)) if key == name else given)
        for key, given in workload.inputs
    )
    return dataclasses.replace(workload, inputs=inputs)
