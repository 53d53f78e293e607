"""A small space: two layers of a width each, with blocks, and a choice that breaks the network."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.candidate import Candidate, Input, Workload
from jaxbench.search import Array, Band, Block, Choice, Space

IN = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class PairConfig:
    """Widths of two hidden layers."""

    widths: tuple[int, int] = (128, 128)
    kind: str = "relu"

    def __post_init__(self) -> None:
        if self.kind == "broken":
            raise ValueError("kind='broken' is no activation: use relu or tanh.")


class Hidden(nnx.Module):
    """A layer and its activation."""

    def __init__(self, rngs: nnx.Rngs, *, num_in: int, num_out: int, kind: str) -> None:
        self.linear = nnx.Linear(num_in, num_out, rngs=rngs)
        self.kind = kind

    @jax.named_scope("hidden")
    def __call__(self, x: Any) -> Any:
        return {"relu": nnx.relu, "tanh": jnp.tanh}[self.kind](self.linear(x))


class Last(nnx.Module):
    """A layer and the loss."""

    def __init__(self, rngs: nnx.Rngs, *, num_in: int) -> None:
        self.linear = nnx.Linear(num_in, IN, rngs=rngs)

    @jax.named_scope("last")
    def __call__(self, x: Any) -> Any:
        return jnp.mean(jnp.square(self.linear(x)))


class Pair(nnx.Module):
    """All of it."""

    def __init__(self, config: PairConfig, rngs: nnx.Rngs) -> None:
        first, second = config.widths
        self.first = Hidden(rngs, num_in=IN, num_out=first, kind=config.kind)
        self.second = Hidden(rngs, num_in=first, num_out=second, kind=config.kind)
        self.last = Last(rngs, num_in=second)

    def __call__(self, x: Any) -> Any:
        return self.last(self.second(self.first(x)))


def loss(module: Pair, batch: dict[str, jax.Array]) -> jax.Array:
    """What the last block gives."""
    return module(batch["x"])


CANDIDATES = (
    Candidate(
        name="pair-cpu-base",
        family="pair",
        size="cpu",
        config=PairConfig(),
        build=Pair,
        loss=loss,
        workload=Workload(global_batch=32, inputs=(("x", Input(shape=(IN,))),), dtype="float32"),
        base="pair-cpu-base",
        source="made up for tests",
    ),
)


def blocks(candidate: Candidate) -> Iterator[Block]:
    """Three of them."""
    config, batch = candidate.config, candidate.workload.global_batch
    num_in = IN
    for at, width in enumerate(config.widths):
        yield Block(
            kind="hidden",
            build=Hidden,
            arguments={"num_in": num_in, "num_out": width, "kind": config.kind},
            inputs=(Array(shape=(batch, num_in), dtype="float32", gradient=at > 0),),
        )
        num_in = width
    yield Block(
        kind="last",
        build=Last,
        arguments={"num_in": num_in},
        inputs=(Array(shape=(batch, num_in), dtype="float32"),),
    )


SPACE = Space(
    name="pair",
    base=CANDIDATES[0],
    choices=(
        Choice("widths.0", (32, 64, 128, 192)),
        Choice("widths.1", (32, 64, 128, 192)),
        Choice("kind", ("relu", "tanh", "broken"), validity="T2"),
    ),
    bands=(Band("num_params", 0.2, 1.2),),
    blocks=blocks,
)
