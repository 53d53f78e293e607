"""A regression by two layers, wide or deep: small enough to compile in a second for any target.

Letters: `B` batch, `D` features, `F` hidden features.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.candidate import Candidate, Input, Workload

FEATURES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class TinyConfig:
    """Hidden features, and how many hidden layers."""

    hidden: int
    depth: int


class Tiny(nnx.Module):
    """Hidden layers with a ReLU, then one output."""

    def __init__(self, config: TinyConfig, rngs: nnx.Rngs):
        sizes = [FEATURES, *[config.hidden] * config.depth]
        self.hidden = nnx.List(
            [
                nnx.Linear(one, two, rngs=rngs)
                for one, two in zip(sizes[:-1], sizes[1:], strict=True)
            ]
        )
        self.out = nnx.Linear(config.hidden, 1, rngs=rngs)

    @jax.named_scope("tiny")
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.out(x)[:, 0]


def loss(module: Tiny, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean squared error."""
    return jnp.mean(jnp.square(module(batch["x"]) - batch["y"]))


def _candidate(change: str, config: TinyConfig, replaces: str = "") -> Candidate:
    return Candidate(
        name=f"tiny-cpu-{change}",
        family="tiny",
        size="cpu",
        config=config,
        build=Tiny,
        loss=loss,
        workload=Workload(
            global_batch=16,
            inputs=(("x", Input(shape=(FEATURES,))), ("y", Input(shape=()))),
            dtype="float32",
        ),
        base="tiny-cpu-wide",
        replaces=replaces,
        validity="T1" if replaces else "base",
        source="made up for tests",
    )


CANDIDATES = (
    _candidate("wide", TinyConfig(hidden=256, depth=1)),
    _candidate("deep", TinyConfig(hidden=64, depth=3), replaces="one wide layer by three"),
)
