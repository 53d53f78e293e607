"""Errors of all published cases, as jaxbench/predict/interval.toml holds them; by hand.

    python benchmarks/fit_intervals.py [DIR] > jaxbench/predict/interval.toml

DIR holds what `jaxbench validate` made (default results/validate).
"""

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from jaxbench.published import published_cases
from jaxbench.run import Limits
from jaxbench.target import chip_table
from jaxbench.validate import validate

# A handful of cases of one or two programs cannot show that others lie closer.
SMALLEST = 1.15


def _scatter(outcomes, signal):
    """Factor within which nine of ten signals lie about the median of their family on their chip.

    That is what is left of a signal's error in a comparison of rivals.
    """
    logs = defaultdict(list)
    for outcome in outcomes:
        seconds = outcome.prediction and outcome.prediction[f"{signal}_s"]
        if seconds:
            logs[outcome.case.chip, outcome.case.candidate.split("-")[0]].append(
                np.log(seconds / outcome.case.step_s)
            )
    about = [abs(v - np.median(some)) for some in logs.values() if len(some) > 1 for v in some]
    return float(np.exp(np.quantile(about, 0.9)))


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "results/validate")
    outcomes = validate(published_cases(), folder, limits=Limits(), progress=lambda *_: None)
    rows = defaultdict(list)
    for outcome in outcomes:
        if outcome.prediction is None or outcome.case.group == "order":
            continue
        chip = outcome.case.chip
        size = abs(np.log(outcome.prediction["step_s"] / outcome.case.step_s))
        kind = outcome.prediction["kind"]
        for name in (chip, chip_table()[chip].kind):
            rows[name, kind].append(size)
            rows[name, "all"].append(size)
    print("# Factors within which nine of ten published steps lie, by chip or platform and kind.")
    print("# Made by benchmarks/fit_intervals.py from the cases of published.toml.")
    for signal in ("hlo", "compiler"):
        print(f"# {signal} alone, about its family on its chip: {_scatter(outcomes, signal):.2f}")
    for name in dict.fromkeys(name for name, _ in rows):
        print(f"\n[{name}]")
        for kind in ("products", "convolutions", "kernels", "all"):
            if sizes := rows.get((name, kind)):
                factor = max(SMALLEST, float(np.exp(np.quantile(sizes, 0.9))))
                print(f"{kind} = {{ factor = {factor:.3f}, cases = {len(sizes)} }}")


if __name__ == "__main__":
    main()
