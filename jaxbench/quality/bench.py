"""Where networks are trained against one base on one data set: each run once, in workers."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxbench import cache
from jaxbench.compiler import versions_for
from jaxbench.errors import DataError, Failure
from jaxbench.quality.judged import Plan
from jaxbench.quality.runs import Runs
from jaxbench.quality.simulator import simulator_python
from jaxbench.run import Limits, Progress
from jaxbench.target import parse_target
from jaxbench.worker import Job, run_jobs

TRAINING = "paired-noninferiority-1"

Described = Mapping[str, Any]
Curve = tuple[tuple[int, float], ...]


class Bench:
    """Trains what is asked for and was not trained before.

    Attributes:
      about: The base's task, and the data's digest.
      rates: Each network's learning rate, by name, once it is chosen.
    """

    def __init__(
        self,
        base: Described,
        *,
        data: Path,
        out: Path,
        plan: Plan,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self._base, self._data, self._plan = base, data, plan
        self._limits, self._progress = limits, progress
        self.about = self.ask("jaxbench.quality.protocol_worker:describe_task", base)
        self._python = self._simulator(progress) if plan.rollout else ""
        self._runs = Runs(out, self.about["data_digest"])
        self.rates: dict[str, float] = {}

    def ask(self, function: str, network: Described, **arguments: Any) -> Any:
        """Calls a function of a network and the data in a worker.

        Raises:
          DataError: with what it failed of.
        """
        given = {"described": dict(network), "data": str(self._data), **arguments}
        ((_, result),) = run_jobs([self._limited(function, function, given)], num_workers=1)
        if isinstance(result, Failure):
            raise DataError(result.text)
        return result

    def _simulator(self, progress: Progress) -> str:
        if not self.about["drives"]:
            raise DataError(
                f"--rollout asks networks that plan to drive, and the task of {self._base['name']} "
                f"is {self.about['task']}. Leave it out, or give a planner."
            )
        return str(simulator_python(progress))

    def train(
        self, wanted: Iterable[tuple[Described, float, int]], what: str, *, drive: bool = False
    ) -> None:
        """Does those runs, (network, learning rate, seed), that are missing.

        Args:
          drive: Whether trained networks also drive the plan's scenes, if there are any.

        Raises:
          DataError: if a worker ends without a result; the runs before it are kept.
        """
        wanted = list(wanted)
        scenes = self._plan.rollout if drive else 0
        missing = [asked for asked in wanted if not _holds(self._run(*asked), scenes)]
        done, jobs = len(wanted) - len(missing), {}
        for one, rate, seeds in _grouped(missing, self._plan.together):
            job = self._job(one, rate, seeds, scenes)
            jobs[id(job)] = (job, one, rate)
        queue = [job for job, _, _ in jobs.values()]
        for job, result in run_jobs(queue, num_workers=self._limits.num_workers):
            _, one, rate = jobs[id(job)]
            if isinstance(result, Failure):
                raise DataError(f"Training {job.name} failed: {result.text}")
            for run in result:
                kept = {
                    "run": self._key(one, rate, run["seed"]),
                    "data": self.about["data_digest"],
                    "network": one["name"],
                    "learning_rate": rate,
                    "scenes": scenes,
                }
                self._runs.keep({**kept, **self._schedule(), **run})
            done += len(result)
            self._progress(f"{what} {one['name']}", done, len(wanted))

    def metric(self, one: Described, rate: float, seed: int) -> float | None:
        """Returns a run's metric; None where it diverged.

        Raises:
          KeyError: if it was not done.
        """
        return self._done(one, rate, seed)["metric"]

    def metrics(self, one: Described, seeds: Sequence[int]) -> tuple[float | None, ...]:
        """Returns metrics at the network's own rate."""
        return tuple(self.metric(one, self.rates[one["name"]], seed) for seed in seeds)

    def rollouts(self, one: Described, seeds: Sequence[int]) -> tuple[Any, ...]:
        """Returns what came of driving, at the network's own rate; None where it diverged."""
        if not self._plan.rollout:
            return ()
        rate = self.rates[one["name"]]
        return tuple(self._done(one, rate, seed)["rollout"] for seed in seeds)

    def curves(self, one: Described, seeds: Sequence[int]) -> tuple[Curve, ...]:
        """Returns learning curves at the network's own rate; empty where a run diverged."""
        return tuple(
            tuple((int(samples), metric) for samples, metric in run["curve"])
            for run in (self._done(one, self.rates[one["name"]], seed) for seed in seeds)
        )

    def _run(self, one: Described, rate: float, seed: int) -> dict[str, Any] | None:
        return self._runs.find(self._key(one, rate, seed))

    def _done(self, one: Described, rate: float, seed: int) -> dict[str, Any]:
        run = self._run(one, rate, seed)
        if run is None:
            raise KeyError(f"{one['name']} was not trained with seed {seed} at rate {rate:g}")
        return run

    def _schedule(self) -> dict[str, int]:
        return {name: getattr(self._plan, name) for name in ("steps", "batch", "checks")}

    def _key(self, one: Described, rate: float, seed: int) -> str:
        networks = [
            [which[name] for name in ("config", "workload", "source_sha256")]
            for which in (one, self._base)
        ]
        asked = [networks, self.about["data_digest"], rate, seed, self._schedule()]
        versions = versions_for(parse_target("cpu"))
        return cache.key_of(TRAINING, asked, self._plan.together, versions)[:16]

    def _job(self, one: Described, rate: float, seeds: list[int], scenes: int) -> Job:
        group = cache.key_of([self._key(one, rate, seed) for seed in seeds])[:16]
        return self._limited(
            f"{one['name']} with seeds {seeds}",
            "jaxbench.quality.training:train_network",
            {
                "described": dict(one),
                "base": dict(self._base),
                "data": str(self._data),
                "seeds": seeds,
                "learning_rate": rate,
                "schedule": self._schedule(),
                "checkpoints": str(self._runs.folder / "checkpoints" / group),
                "rollout": {"python": self._python, "num_scenes": scenes} if scenes else None,
            },
        )

    def _limited(self, name: str, function: str, arguments: dict[str, Any]) -> Job:
        return Job(
            name=name,
            function=function,
            arguments=arguments,
            limit_s=self._limits.limit_s,
            limit_bytes=self._limits.limit_bytes,
        )


def _holds(run: Mapping[str, Any] | None, scenes: int) -> bool:
    """Whether a run was done, and with so many scenes driven."""
    return run is not None and (not scenes or run.get("scenes") == scenes)


def mean_curve(curves: Iterable[Curve]) -> Curve:
    """Returns the mean of curves that were judged after the same samples; empty ones left out."""
    return tuple(
        (points[0][0], statistics.fmean(metric for _, metric in points))
        for points in zip(*(curve for curve in curves if curve), strict=True)
    )


def _grouped(
    wanted: Iterable[tuple[Described, float, int]], size: int
) -> list[tuple[Described, float, list[int]]]:
    """Seeds of one network at one rate, `size` at a time."""
    seeds: dict[tuple[str, float], tuple[Described, list[int]]] = {}
    for one, rate, seed in wanted:
        seeds.setdefault((one["name"], rate), (one, []))[1].append(seed)
    return [
        (one, rate, own[start : start + size])
        for (_, rate), (one, own) in seeds.items()
        for start in range(0, len(own), size)
    ]
