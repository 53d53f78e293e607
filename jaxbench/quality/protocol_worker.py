"""What the protocol asks of networks and data before it trains. Runs in workers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.discovery import load_described
from jaxbench.errors import DataError
from jaxbench.quality.shards import read_data
from jaxbench.quality.tasks import find_task, fit_to_data


def describe_task(*, described: Mapping[str, Any], data: str) -> dict[str, Any]:
    """Returns the task of a network and the version of the data."""
    frames = read_data(Path(data))
    task = find_task(load_described(described))
    return {
        "task": task.name,
        "metric": task.metric,
        "data_digest": frames.digest,
        "train_frames": len(frames.train["scene"]),
        "test_frames": len(frames.test["scene"]),
    }


def output_shapes(*, described: Mapping[str, Any], data: str) -> list[list[int]]:
    """Returns the shapes of a network's loss, of its score's sums and of the labels.

    Raises:
      DataError: if its output does not go with the task's labels.
    """
    frames = read_data(Path(data))
    candidate = fit_to_data(load_described(described), frames.train, frames.about)
    task = find_task(candidate)
    few = {name: array[:2] for name, array in frames.train.items()}
    batch = {
        name: jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))
        for name, array in task.prepare(few, frames.about, candidate).items()
    }
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))
    graph, state = nnx.split(module)

    def run(state: Any, batch: Any) -> Any:
        return task.score(nnx.merge(graph, state), batch)

    def lose(state: Any, batch: Any) -> Any:
        return candidate.loss(nnx.merge(graph, state), batch)

    try:
        sums = jax.eval_shape(run, state, batch)
        loss = jax.eval_shape(lose, state, batch)
    except (TypeError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"What {candidate.name} puts out does not go with the labels of the task {task.name}: "
            f"{text}. Give a network with the base's output."
        ) from error
    wanted = [array.shape for _, array in sorted(batch.items()) if "int" in str(array.dtype)]
    return [
        list(shape) for shape in (loss.shape, *(s.shape for s in jax.tree.leaves(sums)), *wanted)
    ]
