"""What the candidate files beside this one share: one layer, its making or its loss replaced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.candidate import Candidate, Input, Workload


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerConfig:
    """Features in, and out."""

    features: int = 32


def build(config: LayerConfig, rngs: nnx.Rngs) -> nnx.Module:
    """One square layer."""
    return nnx.Linear(config.features, config.features, rngs=rngs)


def loss(module: nnx.Module, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean square of what comes out."""
    return jnp.mean(jnp.square(module(batch["x"])))


def candidate(
    name: str, *, build: Callable = build, loss: Callable = loss, features: int = 32
) -> Candidate:
    """A candidate that is its own base."""
    config: Any = LayerConfig(features=features)
    return Candidate(
        name=name,
        family="parts",
        size="cpu",
        config=config,
        build=build,
        loss=loss,
        workload=Workload(
            global_batch=16, inputs=(("x", Input(shape=(features,))),), dtype="float32"
        ),
        base=name,
        source="made up for tests",
    )
