"""Candidates whose difference is known: one product, repeated 100, 101, 102 or 105 times in a loop.

A candidate file for `benchmarks/protocol.py`. The loop is nearly all of the step, so that its trip
count is the ratio of step times; `repeat-cpu-100b` is the base again, under another name.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench import Candidate, Input, Workload

WIDTH = 256


@dataclasses.dataclass(frozen=True)
class Config:
    """How often the product is repeated; `twin` tells two equal ones apart."""

    repeats: int
    twin: int = 0


class Repeated(nnx.Module):
    """x -> tanh(x W), again and again."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.repeats = config.repeats
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    @jax.named_scope("repeated")
    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, self.repeats, lambda _, y: jnp.tanh(self.linear(y)), x)


def _loss(module: Repeated, batch: dict[str, jax.Array]) -> jax.Array:
    return jnp.mean((module(batch["x"]) - batch["x"]) ** 2)


CANDIDATES = tuple(
    Candidate(
        name=f"repeat-cpu-{config.repeats}{'b' * config.twin}",
        family="repeat",
        size="cpu",
        config=config,
        build=Repeated,
        loss=_loss,
        workload=Workload(global_batch=64, inputs=(("x", Input(shape=(WIDTH,))),), dtype="float32"),
        base="repeat-cpu-100",
        replaces="" if config == Config(repeats=100) else "another number of repeats",
        validity="base" if config == Config(repeats=100) else "T2",
        source="a known answer",
    )
    for config in (
        Config(repeats=100),
        Config(repeats=100, twin=1),
        Config(repeats=101),
        Config(repeats=102),
        Config(repeats=105),
    )
)
