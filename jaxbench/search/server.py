"""A space in a worker of its own: it loads the user's Python and answers in plain data."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxbench import cache
from jaxbench.candidate import Candidate
from jaxbench.discovery import (
    describe_candidates,
    family_modules,
    load_module,
    source_digest,
    space_modules,
)
from jaxbench.errors import CandidateError, Failure
from jaxbench.search.block import Block, merge_blocks
from jaxbench.search.blockstep import Weight, price_block, weigh_block
from jaxbench.search.prices import find_price, keep_price
from jaxbench.search.space import Point, Space
from jaxbench.worker import failure_of


class SpaceServer:
    """What the search asks of a space. Every answer is JSON-ready."""

    def __init__(self, source: str) -> None:
        module = load_module(source)
        self.space, self.digest = space_of(module, source), source_digest(module)
        self._described = _describe_base(self.space, source, getattr(module, "CANDIDATES", ()))
        self._weights: dict[str, Weight] = {}
        self._base: dict[str, float] | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the space as values."""
        space = self.space
        return {
            "name": space.name,
            "digest": cache.key_of(self.digest, self._described["source_sha256"]),
            "base": self._described,
            "base_point": space.base_point(),
            "layout": space.layout,
            "choices": [
                {"name": choice.name, "values": choice.values, "validity": choice.validity}
                for choice in space.choices
            ],
            "bands": [dataclasses.asdict(band) for band in space.bands],
            "num_points": space.num_points,
            "has_blocks": space.blocks is not None,
            "base_quantities": self._base_quantities(),
        }

    def resolve(self, point: Point) -> dict[str, Any]:
        """Returns a point's network: description, quantities, blocks; or why it is refused.

        Returns:
          `described`, `layout`, `changes`, `quantities` and `blocks` (key, kind, count), and
          `violations`, one for each band, positive where it is broken; or `refused`, in words.
        """
        try:
            candidate = self.space.candidate(point)
            _check_question(self.space.base, candidate)
            blocks = self._blocks(candidate)
            quantities = self._quantities(candidate, blocks)
        except Exception as error:  # whatever a user's code does, it refuses one point
            text = (str(error).splitlines() or [""])[0][:300]
            name = "" if isinstance(error, CandidateError) else f"{type(error).__name__}: "
            return {"refused": f"{name}{text}"}
        return {
            "described": self._describe(candidate),
            "layout": point.get("layout", self.space.layout),
            "validity": candidate.validity,
            "changes": self.space.words(point),
            "quantities": quantities,
            "violations": self._violations(quantities),
            "blocks": [[key, block.kind, count] for key, (block, count) in blocks.items()],
        }

    def _blocks(self, candidate: Candidate) -> dict[str, tuple[Block, float]]:
        return merge_blocks(self.space.blocks(candidate)) if self.space.blocks else {}

    def _describe(self, candidate: Candidate) -> dict[str, Any]:
        kept = {key: self._described[key] for key in ("module", "source_sha256")}
        return {**candidate.describe(), **kept, "of": self.space.base.name}

    def _base_quantities(self) -> dict[str, float]:
        if self._base is None:
            base = self.space.base
            self._base = self._quantities(base, self._blocks(base))
        return self._base

    def _quantities(
        self, candidate: Candidate, blocks: Mapping[str, tuple[Block, float]]
    ) -> dict[str, float]:
        """Counts what bands speak of, but for seconds."""
        samples = candidate.workload.global_batch
        found = self._composed(blocks) if blocks else _whole(candidate)
        found["forward_flops"] /= samples
        found["activation_bytes"] /= samples
        return {**found, **{name: of(candidate) for name, of in self.space.measures.items()}}

    def _composed(self, blocks: Mapping[str, tuple[Block, float]]) -> dict[str, float]:
        totals = {"num_params": 0.0, "forward_flops": 0.0, "activation_bytes": 0.0}
        for key, (block, count) in blocks.items():
            weight = self._weight(key, block)
            for name in totals:
                totals[name] += getattr(weight, name) * count
        return totals

    def _weight(self, key: str, block: Block) -> Weight:
        if key not in self._weights:
            entry = cache.key_of(key, self.digest, self._described["source_sha256"])
            known = cache.read_entry("weights", entry)
            weight = Weight(**json.loads(known)) if known else weigh_block(block)
            if known is None:
                cache.write_entry("weights", entry, json.dumps(dataclasses.asdict(weight)).encode())
            self._weights[key] = weight
        return self._weights[key]

    def _violations(self, quantities: Mapping[str, float]) -> list[float]:
        base = self._base_quantities()
        found = []
        for band in self.space.bands:
            if band.quantity == "forward_s":
                continue
            ratio = quantities[band.quantity] / base[band.quantity]
            found.append(max(band.low - ratio, ratio - band.high))
        return found


def _check_question(base: Candidate, candidate: Candidate) -> None:
    """Refuses a network that answers another question: integer inputs are what it is judged by."""
    before = {name: given.shape for name, given in base.workload.inputs if "int" in given.dtype}
    for name, given in candidate.workload.inputs:
        if name in before and given.shape != before[name]:
            raise CandidateError(
                f"{name} has the shape {given.shape} and {before[name]} in the base: a network "
                "that answers another question cannot be held equal. Leave that shape alone."
            )


def _whole(candidate: Candidate) -> dict[str, float]:
    from jaxbench.program import count_activations, count_forward

    counted = count_forward(candidate)
    return {
        "num_params": counted["num_params"],
        "forward_flops": counted["forward_flops"] * candidate.workload.global_batch,
        "activation_bytes": count_activations(candidate),
    }


def space_of(module: Any, source: str) -> Space:
    """Returns the `SPACE` of a module, checked.

    Raises:
      CandidateError: if there is none, or it contradicts itself.
    """
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise CandidateError(
            f"{source} has no space. Give it a module-level SPACE of jaxbench.search.Space."
        )
    space.check()
    return space


def describe_spaces() -> list[dict[str, Any]]:
    """Returns what the shipped spaces are, JSON-ready."""
    found = []
    for source in space_modules().values():
        space = space_of(load_module(source), source)
        found.append(
            {
                "name": space.name,
                "base": space.base.name,
                "num_points": space.num_points,
                "choices": [choice.name for choice in space.choices],
            }
        )
    return found


def _describe_base(space: Space, source: str, own: Sequence[Candidate]) -> dict[str, Any]:
    """Finds the base among the file's own candidates or those of its shipped family."""
    family = f"jaxbench.models.{space.base.family}"
    if space.base.name in {one.name for one in own}:
        places = [source]
    else:
        places = [family] if family in family_modules() else []
    for place in places:
        for described in describe_candidates([place]):
            if described["name"] == space.base.name:
                return described
    raise CandidateError(
        f"The base {space.base.name!r} of {source} is neither in its CANDIDATES nor a shipped "
        "candidate. Put it into CANDIDATES."
    )


def price_in_worker(
    *,
    source: str,
    wanted: Sequence[Mapping[str, Any]],
    target: str,
    cpu_peaks: Mapping[str, float] | None,
    forward_only: bool,
) -> dict[str, dict[str, Any] | Failure]:
    """Prices blocks, each unless another process did meanwhile, and keeps each at once.

    Args:
      source: Module or file of the space.
      wanted: `block`, the `point` of a network that has it, its resolved `layout`, and its `key`.

    Returns:
      A price or a failure for each key.
    """
    space = space_of(load_module(source), source)
    prices: dict[str, dict[str, Any] | Failure] = {}
    for one in wanted:
        try:
            prices[one["key"]] = _price(space, one, target, cpu_peaks, forward_only)
        except Exception as error:  # one block that does not compile is no reason to stop
            prices[one["key"]] = failure_of(error, stage="compile")
    return prices


def _price(
    space: Space,
    wanted: Mapping[str, Any],
    target: str,
    cpu_peaks: Mapping[str, float] | None,
    forward_only: bool,
) -> dict[str, Any]:
    key = wanted["key"]
    with cache.locked("blocks", key):
        known = find_price(key)
        if known is not None:
            return known
        candidate = space.candidate(_as_tuples(space, wanted["point"]))
        blocks = merge_blocks((space.blocks or (lambda _: ()))(candidate))
        price = price_block(
            blocks[wanted["block"]][0],
            workload=candidate.workload,
            layout=wanted["layout"],
            target=target,
            cpu_peaks=cpu_peaks,
            forward_only=forward_only,
        )
        keep_price(key, price)
        return price


def _as_tuples(space: Space, point: Point) -> dict[str, Any]:
    """JSON turned tuples into lists."""
    return {choice.name: _tuple(point[choice.name]) for choice in space.choices}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list | tuple) else value
