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
        "drives": task.drive is not None,
        "data_digest": frames.digest,
        "train_frames": len(frames.train["scene"]),
        "test_frames": len(frames.test["scene"]),
    }


def output_shapes(*, described: Mapping[str, Any], data: str) -> list[list[int]]:
    """Returns the shapes of all arrays that a network puts out, on two key frames.

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

    outputs: list[list[int]] = []

    def run(state: Any, batch: Any) -> Any:
        module = nnx.merge(graph, state)
        return task.score(_Listened(module, outputs), batch), candidate.loss(module, batch)

    try:
        jax.eval_shape(run, state, batch)
    except (TypeError, ValueError) as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise DataError(
            f"What {candidate.name} puts out does not go with the labels of the task {task.name}: "
            f"{text}. Give a network with the base's output."
        ) from error
    return outputs


class _Listened:
    """A network whose outputs' shapes are kept when it is called."""

    def __init__(self, module: Any, outputs: list[list[int]]) -> None:
        self._module, self._outputs = module, outputs

    def __call__(self, *arguments: Any) -> Any:
        given = self._module(*arguments)
        self._outputs += [list(leaf.shape) for leaf in jax.tree.leaves(given)]
        return given

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
