"""Fits the constants of NCCL collectives to measured ones; by hand.

    python benchmarks/fit_collectives.py collectives_measured.csv

The table has a row a measurement: device_key, op, out_bytes, num_groups, devices_per_group,
permute_pairs, throughput_GBps. Throughput is the largest buffer over seconds. A row is for the fit
if the digest of its key is even, else it is held out. Prints what `jaxbench/network.toml` holds.
"""

import csv
import hashlib
import sys
from collections import defaultdict

import numpy as np
from scipy.optimize import least_squares

CHIPS = {"sm_90": "gpu-h100", "sm_100_B200": "gpu-b200", "sm_100_GB200": "gpu-gb200"}
LARGE = 2**20


def read(path):
    """Returns {(chip, op): rows of (buffer bytes, ranks, seconds, whether held out)}."""
    found = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["device_key"] not in CHIPS or not float(row["throughput_GBps"]):
                continue
            op, size = row["op"], float(row["out_bytes"])
            ranks = int(row["devices_per_group"] or 2)
            if op == "reduce-scatter":
                size *= ranks
            key = ",".join(row[name] for name in sorted(row) if name != "throughput_GBps")
            held_out = hashlib.sha256(key.encode()).digest()[0] % 2
            seconds = size / (float(row["throughput_GBps"]) * 1e9)
            found[CHIPS[row["device_key"]], op].append((size, ranks, seconds, held_out))
    return {key: np.array(rows) for key, rows in found.items()}


def predict(parameters, size, ranks):
    """t = (latency + root sqrt(size)) log2(ranks)^growth + size / (rate log2(ranks)^-decay)."""
    latency, growth, root, rate, decay = parameters
    scale = np.log2(ranks)
    return (np.exp(latency) + np.exp(root) * np.sqrt(size)) * scale ** max(growth, 0.0) + size / (
        np.exp(rate) * scale**-decay
    )


def fit(rows):
    size, ranks, seconds, _ = rows[rows[:, 3] == 0].T
    weight = np.where(size >= LARGE, 1.0, 0.3)

    def residual(parameters):
        return weight * (np.log(predict(parameters, size, ranks)) - np.log(seconds))

    start = [np.log(2e-5), 0.3, np.log(5e-9), np.log(5e11), 0.1]
    # Few rows of a kind leave the decay open; from 2 to 8 ranks no rate was seen to fall further.
    low, high = [-30, 0, -45, 20, -0.1], [0, 2, 0, 35, 0.3]
    found = least_squares(residual, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
    return found.x


def knots(rows):
    """Median (bytes, seconds) of the fitted rows by powers of four: permutes have plateaus."""
    rows = rows[rows[:, 3] == 0]
    step = np.round(np.log2(rows[:, 0]) / 2)
    bins = [rows[step == value] for value in np.unique(step)]
    return [(float(np.median(some[:, 0])), float(np.median(some[:, 2]))) for some in bins]


def errors(parameters, rows):
    size, ranks, seconds, _ = rows.T
    if isinstance(parameters, list):
        known, measured = np.log(np.array(parameters)).T
        return np.abs(np.exp(np.interp(np.log(size), known, measured)) / seconds - 1)
    return np.abs(predict(parameters, size, ranks) / seconds - 1)


def show(name, values):
    if not len(values):
        return f"{name} none"
    return f"{name} {np.median(values):.1%} (p90 {np.quantile(values, 0.9):.1%}, n {len(values)})"


def main():
    for (chip, op), rows in sorted(read(sys.argv[1]).items()):
        found = knots(rows) if op == "collective-permute" else fit(rows)
        large = rows[:, 0] >= LARGE
        cells = [
            show(name, errors(found, rows[mask & (rows[:, 3] == half)]))
            for name, mask, half in (
                ("large fitted", large, 0),
                ("large held out", large, 1),
                ("small held out", ~large, 1),
            )
        ]
        if isinstance(found, list):
            points = ", ".join(f"[{size:.4g}, {seconds:.3g}]" for size, seconds in found)
            print(f"{chip}.{op} = [{points}]")
            print("   #", "; ".join(cells))
            continue
        latency, growth, root, rate, decay = found
        print(
            f"{chip}.{op} = {{ latency_s = {np.exp(latency):.3g}, growth = {max(growth, 0):.3f}, "
            f"root = {np.exp(root):.3g}, bytes_per_s = {np.exp(rate):.4g}, decay = {decay:.3f} }}"
        )
        print("   #", "; ".join(cells))


if __name__ == "__main__":
    main()
