"""Blocks: what networks are made of, each compiled once for all networks that have it.

A block is a module called on arrays, with its part of the training step: forward, backward, and the
optimiser's update of its own parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxbench.cache import key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """An array that goes into a block; its first dim is the batch's.

    Attributes:
      gradient: Whether the backward pass goes on beyond it; never where the dtype is integer.
    """

    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    gradient: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """A part of a network.

    Attributes:
      kind: What it is, such as `camera block`; prices of a kind share one correction.
      build: `build(rngs, **arguments)` returns the module; it is called on `inputs`, and gives
        arrays, or a scalar, which is a loss.
      arguments: JSON-ready; with kind and inputs they are the block's identity.
      count: How many of it a network has; a part of one where it stands for a loop of some trips.
    """

    kind: str
    build: Callable[..., Any]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Array, ...]
    count: float = 1.0

    @property
    def key(self) -> str:
        """Identity among the blocks of one source."""
        inputs = [[list(one.shape), one.dtype, one.gradient] for one in self.inputs]
        return key_of(self.kind, dict(self.arguments), inputs)


def merge_blocks(blocks: Iterable[Block]) -> dict[str, tuple[Block, float]]:
    """Returns each different block once, with how often it is there."""
    merged: dict[str, tuple[Block, float]] = {}
    for block in blocks:
        count = merged[block.key][1] if block.key in merged else 0.0
        merged[block.key] = (block, count + block.count)
    return merged
