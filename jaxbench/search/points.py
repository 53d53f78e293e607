"""The points of a space, from the worker that holds it: resolved once, refused, drawn at random."""

from __future__ import annotations

import collections
import random
from collections.abc import Mapping
from typing import Any

from jaxbench.errors import CandidateError, Failure
from jaxbench.run import Progress
from jaxbench.search.resolved import Resolved
from jaxbench.search.space import point_digest
from jaxbench.worker import Conversation

_DRAWS = 20_000  # until a space is held to be empty
_CHANGED = 0.3  # of a sample's choices, in every second draw


class Points:
    """The networks of a space.

    Attributes:
      space: As `SpaceServer.describe` gives it.
    """

    def __init__(self, server: Conversation) -> None:
        self._server = server
        self.space: dict[str, Any] = _answer(server.ask("describe"))
        self._resolved: dict[str, Resolved | str] = {}
        self.base = self._require(self.space["base_point"])

    def resolve(self, point: Mapping[str, Any]) -> Resolved | str:
        """Returns a point's network, or why it is refused."""
        digest = point_digest(point)
        if digest not in self._resolved:
            answer = _answer(self._server.ask("resolve", point=dict(point)))
            refused = answer.get("refused")
            self._resolved[digest] = refused or Resolved.from_answer(point, answer)
        return self._resolved[digest]

    def _require(self, point: Mapping[str, Any]) -> Resolved:
        found = self.resolve(point)
        if isinstance(found, str):
            raise CandidateError(f"The base of space {self.space['name']!r} cannot be: {found}")
        return found

    def refusal(self, found: Resolved | str) -> str | None:
        """Says why a network is none of the space, or None."""
        if isinstance(found, str):
            return found
        bands = [band for band in self.space["bands"] if band["quantity"] != "forward_s"]
        for band, violation in zip(bands, found.violations, strict=True):
            if violation > 0:
                return f"{band['quantity']} out of band"
        return None

    def draw(self, num: int, progress: Progress) -> list[Resolved]:
        """Draws different valid networks at random, half of them near the base."""
        generator = random.Random(self.space["digest"])
        found: dict[str, Resolved] = {}
        refusals: collections.Counter[str] = collections.Counter()
        for draw in range(_DRAWS):
            share = 1.0 if draw % 2 else _CHANGED
            point = {
                choice["name"]: generator.choice(choice["values"])
                if generator.random() < share
                else self.base.point[choice["name"]]
                for choice in self.space["choices"]
            }
            one = self.resolve(point)
            why = self.refusal(one)
            if why:
                refusals[why] += 1
            elif isinstance(one, Resolved) and one.name != self.base.name:
                found[one.name] = one
                progress("drawing valid networks", len(found), num)
            if len(found) == num:
                break
        if not found:
            why = ", ".join(f"{what} ({n})" for what, n in refusals.most_common(3))
            raise CandidateError(
                f"Space {self.space['name']!r} has no valid point among {_DRAWS} drawn: {why}. "
                "Widen a band, or add values."
            )
        return list(found.values())


def _answer(given: Any) -> Any:
    if isinstance(given, Failure):
        raise CandidateError(f"The space's process failed: {given.text}")
    return given
