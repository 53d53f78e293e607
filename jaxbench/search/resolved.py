"""A network of a space as plain values, the way the space's worker describes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolved:
    """One network.

    Attributes:
      point: Its values, by choice.
      described: As `describe_candidates` describes a candidate.
      validity: The worst class among its changes; `base` for the base.
      changes: Against the base, in words.
      quantities: Those that bands may speak of, seconds left out; of one sample where they grow
        with the batch.
      violations: By how much of the base's value each band is missed; positive where it is.
      blocks: (key, kind, count) of each different block.
    """

    point: Mapping[str, Any]
    described: Mapping[str, Any]
    layout: str
    validity: str
    changes: str
    quantities: Mapping[str, float]
    violations: tuple[float, ...]
    blocks: tuple[tuple[str, str, float], ...]

    @property
    def name(self) -> str:
        """The candidate's name."""
        return self.described["name"]

    @property
    def samples(self) -> int:
        """Samples of one step."""
        return self.described["workload"]["global_batch"]

    @classmethod
    def from_answer(cls, point: Mapping[str, Any], answer: Mapping[str, Any]) -> Resolved:
        """Reads what `SpaceServer.resolve` answered, where it refused nothing."""
        return cls(
            point=point,
            described=answer["described"],
            layout=answer["layout"],
            validity=answer["validity"],
            changes=answer["changes"],
            quantities=answer["quantities"],
            violations=tuple(answer["violations"]),
            blocks=tuple((key, kind, count) for key, kind, count in answer["blocks"]),
        )
