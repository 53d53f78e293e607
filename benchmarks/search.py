"""Tests the search itself: networks an hour, hypervolume against random, the front recovered.

    python benchmarks/search.py speed --space bev --targets gpu-h100,gpu-b200,cpu --budget 2000
    python benchmarks/search.py hypervolume --space bev --targets ... --budget 300 --seeds 10
    python benchmarks/search.py recovery --space bev --targets ... --sample 200

`--out` keeps what was compiled: started again, only what is missing is done. `speed` is of a warm
block cache if it is run twice. `recovery` compiles every sampled network whole: hours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from jaxbench.report.search import search_values
from jaxbench.report.terminal import progress_line
from jaxbench.run import Limits
from jaxbench.search.engine import Plan, search
from jaxbench.search.front import coverage, pareto_front

_REFERENCE = 1.5  # times the base: what is slower than that adds nothing to the hypervolume
_CORNERS = 200_000  # points by which it is measured, the same for all


def main() -> None:
    """Runs one of the tests and prints what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "hypervolume", "recovery"))
    parser.add_argument("--space", default="bev")
    parser.add_argument("--targets", default="gpu-h100,gpu-b200,cpu")
    parser.add_argument("--budget", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--sample", type=int, default=12)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    {"speed": _speed, "hypervolume": _hypervolume, "recovery": _recovery}[arguments.what](arguments)


def _search(arguments: argparse.Namespace, folder: str, **plan: Any) -> dict[str, Any]:
    out, records = arguments.out / folder, arguments.out / "records.jsonl"
    if records.exists() and not out.exists():  # whole compiles are the same for all
        out.mkdir(parents=True)
        shutil.copy(records, out)
    with progress_line() as progress:
        found = search(
            arguments.space,
            arguments.targets.split(","),
            out=out,
            plan=Plan(**{"num_sample": arguments.sample, "num_whole": 0, "bound": 1.0, **plan}),
            limits=Limits(),
            progress=progress,
        )
    shutil.copy(out / "records.jsonl", records)
    return search_values(found)


def _speed(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    values = _search(arguments, f"speed-{time.time_ns()}", budget=arguments.budget, seed=1)
    seconds = time.monotonic() - started
    num = len(values["networks"]) - 1
    print(f"{num} networks, {values['blocks_compiled']} blocks compiled, {seconds:.0f} s")
    print(f"{num / seconds * 3600:.0f} networks an hour")


def _hypervolume(arguments: argparse.Namespace) -> None:
    found: dict[str, list[float]] = {}
    for sampler in ("nsga2", "tpe", "random"):
        for seed in range(arguments.seeds):
            values = _search(
                arguments,
                f"{sampler}-{seed}",
                budget=arguments.budget,
                seed=seed,
                sampler=sampler,
            )
            found.setdefault(sampler, []).append(_volume(values))
        print(sampler, json.dumps([round(volume, 5) for volume in found[sampler]]), flush=True)
    for sampler in ("nsga2", "tpe"):
        test = stats.mannwhitneyu(found[sampler], found["random"], alternative="greater")
        print(
            f"{sampler}: median {statistics.median(found[sampler]):.4f}, random "
            f"{statistics.median(found['random']):.4f}, one-sided p {test.pvalue:.4f}"
        )


def _volume(values: Mapping[str, Any]) -> float:
    """Hypervolume of the composed times over the base's, up to the reference point."""
    base, *others = values["networks"]
    points = np.array(
        [
            [one["composed_s"][t] / base["composed_s"][t] for t in values["targets"]]
            for one in others
        ]
    )
    corners = np.random.default_rng(0).uniform(0, _REFERENCE, (_CORNERS, points.shape[1]))
    beaten = np.zeros(_CORNERS, bool)
    for point in points:
        beaten |= (point <= corners).all(axis=1)
    return float(beaten.mean() * _REFERENCE ** points.shape[1])


def _recovery(arguments: argparse.Namespace) -> None:
    """Whole compiles of random points against the same points composed from blocks."""
    values = _search(arguments, "recovery", budget=1, seed=1)
    whole, composed = _sampled(arguments.out / "recovery", values["targets"])
    truth = pareto_front(whole)
    print(f"{len(whole)} networks compiled whole, {len(truth)} on their front")
    for slack in (0.0, 0.01, 0.02, 0.03, 0.05):
        kept = pareto_front(composed, slack=slack)
        print(f"slack {slack:.2f}: {len(kept)} kept, {coverage(truth, kept):.0%} of the front")
    for target, one in values["composition"].items():
        print(f"{target}: median error {statistics.median(one['errors']):.2%}")


def _sampled(folder: Path, targets: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    sample = json.loads((folder / "sample.json").read_text())
    pairs = ({}, {})
    for kind, found in zip(("whole_s", "composed_s"), pairs, strict=True):
        for name, times in sample[kind].items():
            if set(times) == set(targets):
                found[name] = times
    return pairs


if __name__ == "__main__":
    main()
