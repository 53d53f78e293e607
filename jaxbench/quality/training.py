"""One training run on frozen data: resumable, and paired with its base by seed.

Runs of one seed share the order of key frames, the frames they are judged on, and the initial
values of all parameters that their networks have in common, by name and shape. Runs in a worker.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxbench.cache import cache_dir
from jaxbench.candidate import Candidate
from jaxbench.discovery import load_described
from jaxbench.quality.rollout import drive_scenes
from jaxbench.quality.shards import Data, read_data
from jaxbench.quality.tasks import find_task, fit_to_data

TRAINING = "adamw-cosine-2"
_WARM_SHARE = 0.05
_SCORE_BATCH = 16
# Most of the time would go into optimising code that runs once.
_QUICK = {"xla_backend_optimization_level": 0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """How long and in which steps a network is trained.

    Attributes:
      steps: Optimiser steps.
      batch: Key frames of one step.
      checks: How often, over the run, the network is judged and a checkpoint kept.
    """

    steps: int
    batch: int
    checks: int = 4

    def points(self) -> list[int]:
        """Returns after how many steps the network is judged."""
        return sorted({max(1, self.steps * (at + 1) // self.checks) for at in range(self.checks)})


def train_network(
    *,
    described: Mapping[str, Any],
    base: Mapping[str, Any],
    data: str,
    seeds: Sequence[int],
    learning_rate: float,
    schedule: Mapping[str, int],
    checkpoints: str | None = None,
    rollout: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Trains a network once for each seed, side by side, and judges it.

    Args:
      described: The network, as `describe_candidates` or a search describes it.
      base: The network whose initial values it shares where shapes agree.
      data: Folder of the data set.
      learning_rate: Highest of the schedule: linear warm-up, then a cosine down to zero.
      schedule: Fields of `Schedule`.
      checkpoints: Folder for what a killed run goes on from; empty when the run ends.
      rollout: `python` and `num_scenes` of `drive_scenes`, where trained networks are to drive.

    Returns:
      For each seed `curve`, a list of (samples, metric); `metric`, the last of them; `losses`;
      `diverged`; `seconds`; and, if asked for, `rollout`.
    """
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    frames = read_data(Path(data))
    network, origin = (
        fit_to_data(load_described(one), frames.train, frames.about) for one in (described, base)
    )
    run = _Run(network, origin, frames, list(seeds), learning_rate, Schedule(**schedule))
    results = run.go(Path(checkpoints) if checkpoints else None)
    if rollout:
        for at, result in enumerate(results):
            result["rollout"] = None if result["diverged"] else run.drive(at, **rollout)
    return results


class _Run:
    def __init__(
        self,
        network: Candidate,
        origin: Candidate,
        frames: Data,
        seeds: list[int],
        learning_rate: float,
        schedule: Schedule,
    ) -> None:
        self._network, self._seeds, self._schedule = network, seeds, schedule
        self._task, self._about = find_task(network), frames.about
        self._frame_ids = {name: frames.test[name] for name in ("scene", "frame")}
        self._train = self._task.prepare(frames.train, frames.about, network)
        self._test = self._task.prepare(frames.test, frames.about, network)
        size = len(next(iter(self._train.values())))
        self._order = [_order(size, schedule.batch, seed) for seed in seeds]
        # The rate is an argument of the step, so that all rates share one program: an update of
        # AdamW is its rate times what does not depend on it.
        self._rate = optax.warmup_cosine_decay_schedule(
            0.0, learning_rate, max(1, int(schedule.steps * _WARM_SHARE)), schedule.steps
        )
        self._optimizer = optax.adamw(1.0)
        starts = [initial_parameters(network, origin, seed) for seed in seeds]
        self._graph = starts[0][0]
        self._state = _stacked(
            [
                {"params": params, "rest": rest, "optimizer": self._optimizer.init(params)}
                for _, params, rest in starts
            ]
        )
        many = len(seeds) > 1
        self._step = jax.jit(_over(self._one_step, many, (0, 0, None)), donate_argnums=0)
        self._score = jax.jit(_over(self._one_score, many, (0, 0)))

    def go(self, folder: Path | None) -> list[dict[str, Any]]:
        """Trains to the end, from the last checkpoint where there is one."""
        started, keeper = time.monotonic(), _Keeper(folder)
        done, losses, curve = 0, [], []
        if kept := keeper.restore(self._state):
            self._state, done, losses, curve = kept
        points = self._schedule.points()
        while done < self._schedule.steps:
            rate = np.float32(self._rate(done + 1))
            self._state, loss = self._step(self._state, self._batch(done), rate)
            losses.append(np.atleast_1d(np.asarray(loss, np.float64)).tolist())
            done += 1
            if not any(map(math.isfinite, losses[-1])):
                break  # every seed has diverged
            if done in points:
                curve.append([done * self._schedule.batch, self._judge()])
                if done < self._schedule.steps:
                    keeper.save(self._state, done, losses, curve)
        keeper.clear()
        seconds = time.monotonic() - started
        return [self._result(at, losses, curve, seconds) for at in range(len(self._seeds))]

    def drive(self, at: int, *, python: str, num_scenes: int) -> dict[str, float]:
        """Lets the network of seed number `at` drive scenes."""
        state = self._state
        if len(self._seeds) > 1:
            state = jax.tree.map(lambda leaf: leaf[at], state)
        plan, about = jax.jit(self._one_plan), self._about
        names = {name: array[:1] for name, array in self._frame_ids.items()}

        def path(arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, float]:
            frame = {**names, **{name: array[None] for name, array in arrays.items()}}
            batch = self._task.prepare(frame, about, self._network)
            places, speed = jax.device_get(plan(state, batch))
            return places[0], float(speed[0])

        return drive_scenes(path, python=python, num_scenes=num_scenes, about=about)

    def _result(self, at: int, losses: Any, curve: Any, seconds: float) -> dict[str, Any]:
        own = [[samples, metrics[at]] for samples, metrics in curve]
        diverged = not math.isfinite(losses[-1][at]) or not own or not math.isfinite(own[-1][1])
        return {
            "seed": self._seeds[at],
            "curve": [] if diverged else own,
            "metric": None if diverged else own[-1][1],
            "losses": [] if diverged else _thinned([row[at] for row in losses]),
            "diverged": diverged,
            "seconds": seconds / len(self._seeds),
        }

    def _batch(self, step: int) -> Any:
        rows = [order[step] for order in self._order]
        batches = [{name: array[row] for name, array in self._train.items()} for row in rows]
        return _stacked(batches)

    def _judge(self) -> list[float]:
        """Returns the metric on the test frames, one a seed.

        Of whole batches: one program for all; what is left over at the end, fewer frames than a
        batch, is not looked at by any network.
        """
        size = len(next(iter(self._test.values())))
        sums: list[Any] = []
        for start in range(0, size - size % _SCORE_BATCH or size, _SCORE_BATCH):
            part = {name: array[start : start + _SCORE_BATCH] for name, array in self._test.items()}
            sums.append(self._score(self._state, _stacked([part] * len(self._seeds))))
        totals = jax.tree.map(lambda *parts: np.sum(np.stack(parts), axis=0), *sums)
        if len(self._seeds) == 1:
            return [self._task.finish(totals)]
        return [
            self._task.finish(jax.tree.map(lambda total, at=at: total[at], totals))
            for at in range(len(self._seeds))
        ]

    def _one_step(self, state: Any, batch: Any, rate: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> tuple[Any, Any]:
            # Variables can be changed only at the trace level that made them.
            rest = jax.tree.map(lambda leaf: leaf, state["rest"])
            module = nnx.merge(self._graph, params, rest)
            value = self._network.loss(module, batch)
            return value.astype(jnp.float32), nnx.split(module, nnx.Param, ...)[2]

        (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(state["params"])
        updates, moments = self._optimizer.update(gradient, state["optimizer"], state["params"])
        updates = jax.tree.map(lambda update: rate * update, updates)
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "rest": rest, "optimizer": moments}, value

    def _one_plan(self, state: Any, batch: Any) -> Any:
        assert self._task.drive
        rest = jax.tree.map(lambda leaf: leaf, state["rest"])
        return self._task.drive(nnx.merge(self._graph, state["params"], rest), batch)

    def _one_score(self, state: Any, batch: Any) -> Any:
        rest = jax.tree.map(lambda leaf: leaf, state["rest"])
        return self._task.score(nnx.merge(self._graph, state["params"], rest), batch)


def initial_parameters(network: Candidate, origin: Candidate, seed: int) -> tuple[Any, Any, Any]:
    """Returns graph, parameters and other state of a seed; what `origin` has too is as there."""
    graph, params, rest = _build(network, seed)
    if network.config != origin.config:
        _, theirs, _ = _build(origin, seed)
        known = dict(nnx.to_flat_state(theirs))
        params = nnx.from_flat_state(
            [
                (path, known[path] if _fits(leaf, known.get(path)) else leaf)
                for path, leaf in nnx.to_flat_state(params)
            ]
        )
    return graph, params, rest


def _fits(leaf: Any, other: Any) -> bool:
    return other is not None and leaf.shape == other.shape


def _build(candidate: Candidate, seed: int) -> tuple[Any, Any, Any]:
    def make(key: Any) -> tuple[Any, Any]:
        with nnx.use_eager_sharding(False):
            module = candidate.build(candidate.config, nnx.Rngs(params=key))
        _, params, rest = nnx.split(module, nnx.Param, ...)
        return params, rest

    with nnx.use_eager_sharding(False):
        abstract = nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))
    graph = nnx.split(abstract, nnx.Param, ...)[0]
    params, rest = jax.jit(make, compiler_options=_QUICK)(jax.random.key(seed))
    return graph, params, rest


def _order(size: int, batch: int, seed: int) -> Any:
    """Indices of each step's key frames: all of them once, in random order, then anew."""
    return grain.MapDataset.range(size).seed(seed).shuffle().repeat().batch(batch)


def _stacked(parts: Sequence[Any]) -> Any:
    """Stacks trees along a new first dim, one entry a seed; one seed alone has no such dim."""
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def _over(function: Callable, many: bool, axes: tuple[int | None, ...]) -> Callable:
    return jax.vmap(function, in_axes=axes) if many else function


def _thinned(values: list[float], most: int = 50) -> list[float]:
    stride = max(1, len(values) // most)
    return [round(value, 6) for value in values[::stride]]


class _Keeper:
    """Orbax checkpoints of a run; none without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._manager: Any = None
        if folder is not None:
            import orbax.checkpoint as ocp

            folder.mkdir(parents=True, exist_ok=True)
            self._ocp = ocp
            self._manager = ocp.CheckpointManager(
                folder.resolve(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1, enable_async_checkpointing=False
                ),
            )

    def save(self, state: Any, done: int, losses: Any, curve: Any) -> None:
        if self._manager is None:
            return
        self._manager.save(
            done,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardSave(_leaves(state)),
                progress=self._ocp.args.JsonSave({"losses": losses, "curve": curve}),
            ),
        )

    def restore(self, state: Any) -> tuple[Any, int, Any, Any] | None:
        done = self._manager.latest_step() if self._manager else None
        if done is None:
            return None
        kept = self._manager.restore(
            done,
            args=self._ocp.args.Composite(
                state=self._ocp.args.StandardRestore(_leaves(state)),
                progress=self._ocp.args.JsonRestore(),
            ),
        )
        leaves = [kept["state"][key] for key in sorted(kept["state"])]
        state = jax.tree.unflatten(jax.tree.structure(state), leaves)
        return state, done, kept["progress"]["losses"], kept["progress"]["curve"]

    def clear(self) -> None:
        if self._manager is not None:
            self._manager.close()
            shutil.rmtree(self._folder or "", ignore_errors=True)


def _leaves(state: Any) -> dict[str, Any]:
    return {f"{index:05d}": leaf for index, leaf in enumerate(jax.tree.leaves(state))}
