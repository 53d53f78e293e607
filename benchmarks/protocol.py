"""Tests the timing protocol itself: false alarms, planted differences, and other tools beside it.

    python benchmarks/protocol.py same --runs 100 --budget-s 20 --out same.jsonl
    python benchmarks/protocol.py planted --percent 2 --runs 20 --budget-s 60 --load --out two.jsonl
    python benchmarks/protocol.py tools --percent 2 --runs 10 --budget-s 40 --load --out tools.jsonl

`--load` keeps one core busy off and on beside it, half to four seconds each. A line is written
after every run; started again, only missing runs are done. `tools` needs pyperf
(`uv run --with pyperf`) and hyperfine on the path. Run by hand, on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxbench.compare import read_controls
from jaxbench.measure.paired import compare_rows
from jaxbench.measure.session import time_together
from jaxbench.run import describe
from jaxbench.stats import median_ratio
from jaxbench.worker import Job, call_in_worker

FILE = str(Path(__file__).parent / "planted.py")
PEAKS = {"float32": 1e11, "bfloat16": 1e11, "bytes_per_s": 1e10}  # prices are not looked at
Interval = tuple[float, float, float]


def main() -> None:
    """Does the missing runs and prints what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("same", "planted", "tools"))
    parser.add_argument("--percent", type=int, default=0, choices=(0, 1, 2, 5))
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--budget-s", type=float, default=60)
    parser.add_argument("--load", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    names = ("repeat-cpu-100", _other(arguments))
    jobs = [_job(one) for one in _described(names)]
    done = len(arguments.out.read_text().splitlines()) if arguments.out.exists() else 0
    with _load() if arguments.load else contextlib.nullcontext():
        for _ in range(done, arguments.runs):
            line = (_by_tools if arguments.what == "tools" else _by_us)(jobs, arguments.budget_s)
            with arguments.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    lines = [json.loads(text) for text in arguments.out.read_text().splitlines()]
    if arguments.what == "tools":
        _print_tools(lines, 1 + arguments.percent / 100)
    else:
        _print_ours(lines)


def _other(arguments: argparse.Namespace) -> str:
    return f"repeat-cpu-{100 + arguments.percent}" if arguments.percent else "repeat-cpu-100b"


def _described(names: tuple[str, str]) -> list[dict[str, Any]]:
    by_name = {one["name"]: one for one in describe([FILE])}
    for name in names:
        call_in_worker(
            "jaxbench.evaluate:evaluate", **_request(by_name[name]), cpu_peaks=PEAKS, keep=True
        )
    return [by_name[name] for name in names]


def _request(described: dict[str, Any]) -> dict[str, Any]:
    return {"described": described, "layout": "data=1", "target": "cpu"}


def _job(described: dict[str, Any]) -> Job:
    return Job(
        name=described["name"],
        function="jaxbench.evaluate:open_stepper",
        arguments=_request(described),
    )


@contextlib.contextmanager
def _load() -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_burn, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()


def _burn() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        until = time.monotonic() + random.uniform(0.5, 4)
        while time.monotonic() < until:
            pass
        time.sleep(random.uniform(0.5, 4))


def _by_us(jobs: list[Job], budget_s: float) -> dict[str, Any]:
    """One session: the interval, what the controls say, and where the time went."""
    started = time.monotonic()
    (one, two), _ = time_together(jobs, budget_s=budget_s, precision=0.003)
    if not (one.measurement and two.measurement):
        sys.exit(f"nothing was measured: {one.failure or two.failure}")
    found = compare_rows(one.measurement["chains"], two.measurement["chains"])
    return {
        "interval": [found.value, found.low, found.high],
        "chains": [one.measurement["chains"], two.measurement["chains"]],
        "complaint": read_controls(one.measurement["controls"]).complaint,
        "controls": one.measurement["controls"],
        "samples_s": one.measurement["samples_s"],
        "yardstick_s": one.measurement["yardstick_s"],
        "timed_s": one.measurement["timed_s"],
        "wall_s": one.measurement["wall_s"],
        "whole_s": time.monotonic() - started,
        "ended": one.measurement["ended"],
        "others_cores": one.measurement["usage"]["others_cores"],
        "doubts": sorted(
            {doubt["kind"] for part in (one, two) for doubt in (part.measurement or {})["doubts"]}
        ),
    }


def _print_ours(lines: list[dict[str, Any]]) -> None:
    intervals = [line["interval"] for line in lines]
    called = [not low <= 1 <= high for _, low, high in intervals]
    verdicts = [one and not line["complaint"] for one, line in zip(called, lines, strict=True)]
    slower = [low > 1 for _, low, _ in intervals]
    widths = [(high - low) / 2 for _, low, high in intervals]
    print(f"{len(lines)} runs, {statistics.median(line['whole_s'] for line in lines):.1f} s each")
    print(f"interval without 1: {sum(called)}, of them after controls passed: {sum(verdicts)}")
    print(f"second found slower: {sum(slower)}")
    print(f"controls failed: {sum(bool(line['complaint']) for line in lines)}")
    print(f"ratio, median {statistics.median(value for value, _, _ in intervals):.4f}")
    print(f"half width, median {statistics.median(widths):.4f}, worst {max(widths):.4f}")
    shares = [line["timed_s"] / line["wall_s"] for line in lines]
    print(f"timed share of wall, median {statistics.median(shares):.3f}, worst {min(shares):.3f}")
    print(f"others' cores, median {statistics.median(line['others_cores'] for line in lines):.2f}")


# --- Other tools ----------------------------------------------------------------------------------


def _by_tools(jobs: list[Job], budget_s: float) -> dict[str, Any]:
    """The same pair and budget for each tool, in random order."""
    tools: dict[str, Callable[[list[Job], float], Interval]] = {
        "jaxbench": lambda jobs, budget_s: tuple(_by_us(jobs, budget_s)["interval"]),
        "timeit": _timeit,
        "pyperf": _pyperf,
        "hyperfine": _hyperfine,
    }
    order = random.sample(sorted(tools), len(tools))
    found = {}
    for name in order:
        started = time.monotonic()
        found[name] = [*tools[name](jobs, budget_s), time.monotonic() - started]
    return found


_STEP = """
import json, sys, time
sys.path.insert(0, {folder!r})
from jaxbench.compiler import apply_environment
apply_environment()
import jax
from jaxbench.evaluate import open_stepper
stepper = open_stepper(**json.loads(open({request!r}).read()))
def step():
    stepper.chain(steps=1)
for _ in range(5):
    step()
"""


def _script(job: Job, folder: str, rest: str) -> str:
    """A Python file that makes the step and then does what `rest` says."""
    request = Path(folder) / f"{job.name}.json"
    request.write_text(json.dumps(job.arguments))
    file = Path(folder) / f"{job.name}.py"
    root = str(Path(__file__).parent.parent)
    file.write_text(_STEP.format(folder=root, request=str(request)) + rest)
    return str(file)


def _timeit(jobs: list[Job], budget_s: float) -> Interval:
    """Half of the budget for each, one after the other: repeats of about a tenth of a second."""
    rest = (
        "import timeit\n"
        f"until = time.monotonic() + {budget_s / 2 - 4}\n"
        "times = []\n"
        "while time.monotonic() < until:\n"
        "    times.append(timeit.timeit(step, number=3) / 3)\n"
        "print(json.dumps(times))\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        one, two = (json.loads(_output(_script(job, folder, rest))) for job in jobs)
    return median_ratio(two, one)


def _pyperf(jobs: list[Job], budget_s: float) -> Interval:
    """Four processes for each; mean and standard deviation by pyperf, Welch's interval."""
    num_values = max(2, int((budget_s / 2 / 4 - 4) / 0.15))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs:
            kept = Path(folder) / f"{job.name}-pyperf.json"
            rest = (
                "import pyperf\n"
                f"runner = pyperf.Runner(processes=4, values={num_values}, warmups=1, loops=3)\n"
                "runner.bench_func('step', step)\n"
            )
            _output(
                _script(job, folder, rest),
                "-q",
                "-o",
                str(kept),
                "--inherit-environ=JAXBENCH_CACHE",
            )
            runs = json.loads(kept.read_text())["benchmarks"][0]["runs"]
            found.append([value for run in runs for value in run.get("values", ())])
    return _welch(found[1], found[0])


def _hyperfine(jobs: list[Job], budget_s: float) -> Interval:
    """Whole commands, as hyperfine times them: start, load, forty steps; its mean and deviation."""
    num_runs = max(3, int(budget_s / 2 / 5))
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "hyperfine.json"
        commands = [
            f"{sys.executable} {_script(job, folder, 'stepper.chain(steps=40)')}" for job in jobs
        ]
        subprocess.run(
            ["hyperfine", "-w", "1", "-r", str(num_runs), "--export-json", str(kept), *commands],
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        one, two = json.loads(kept.read_text())["results"]
    return _welch(two["times"], one["times"])


def _output(*command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], check=True, capture_output=True, text=True, env=os.environ
    )
    return ran.stdout.strip().splitlines()[-1] if ran.stdout.strip() else ""


def _welch(first: list[float], second: list[float]) -> Interval:
    """Ratio of means with the 95 % interval that their standard errors give."""
    means = [statistics.mean(values) for values in (first, second)]
    relative = [
        statistics.stdev(values) / len(values) ** 0.5 / mean
        for values, mean in zip((first, second), means, strict=True)
    ]
    ratio = means[0] / means[1]
    half = 1.96 * (relative[0] ** 2 + relative[1] ** 2) ** 0.5
    return ratio, ratio * (1 - half), ratio * (1 + half)


def _print_tools(lines: list[dict[str, Any]], truth: float) -> None:
    """Wrong: the interval does not hold the truth. Open: it holds 1. Right: the rest."""
    print("tool        right  wrong  open  half width  seconds")
    for name in lines[0]:
        rows = [line[name] for line in lines]
        wrong = sum(not low - 0.002 <= truth <= high + 0.002 for _, low, high, _ in rows)
        still = sum(low <= 1 <= high for _, low, high, _ in rows)
        right = sum(low > 1 and truth <= high + 0.002 for _, low, high, _ in rows)
        width = statistics.median((high - low) / 2 for _, low, high, _ in rows)
        seconds = statistics.median(row[3] for row in rows)
        print(f"{name:12s}{right:5d}{wrong:7d}{still:6d}{width:12.4f}{seconds:9.1f}")


if __name__ == "__main__":
    main()
