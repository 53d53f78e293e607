"""Fits the constants of library matrix products on GPUs to measured ones; by hand.

    python benchmarks/fit_gemm.py gemm_measured.csv

The table has a row a product: device_key, b, m, n, k, dtypes, tflops_measured. A row is for the fit
if the digest of its key is even, else it is held out. Prints what `jaxbench/predict/gemm.toml`
holds.
"""

import csv
import hashlib
import sys
from collections import defaultdict

import numpy as np
from scipy.optimize import minimize

from jaxbench.predict.gemm import Fit, fitted_s
from jaxbench.target import chip_table

CHIPS = {"sm_90": "gpu-h100", "sm_100_B200": "gpu-b200"}
DTYPES = {"bf16xbf16->bf16": "bfloat16", "f32xf32->f32": "float32"}
LARGE = 512


def read(path):
    """Returns {(chip, dtype): [((batch, m, n, k), seconds, whether held out)]}."""
    found = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(file):
            if row["device_key"] not in CHIPS or row["dtypes"] not in DTYPES:
                continue
            sizes = tuple(int(row[name]) for name in "bmnk")
            seconds = 2 * np.prod(sizes, dtype=float) / (float(row["tflops_measured"]) * 1e12)
            key = f"{row['device_key']} {row['dtypes']} {sizes}"
            held_out = hashlib.sha256(key.encode()).digest()[0] % 2
            found[CHIPS[row["device_key"]], DTYPES[row["dtypes"]]].append(
                (sizes, seconds, held_out)
            )
    return found


def errors(fit, rows, chip, dtype):
    predicted = [
        fitted_s(m, n, k, batch=b, fit=fit, chip=chip, dtype=dtype) for (b, m, n, k), _, _ in rows
    ]
    return np.array(predicted) / np.array([seconds for _, seconds, _ in rows]) - 1


def fit(rows, chip, dtype):
    names = ("start_s", "rate", "bandwidth", "depth_start", "overlap")
    start = np.array([4e-6, 0.8, 0.6, 100.0, 0.3])

    def made(values):
        return Fit(**dict(zip(names, np.abs(values) * start, strict=True)))

    def loss(values):
        return float(np.mean(np.abs(np.log1p(errors(made(values), rows, chip, dtype)))))

    best = min(
        (
            minimize(loss, first, method="Nelder-Mead", options={"maxiter": 800})
            for first in (np.ones(5), np.array([1.3, 1.0, 1.5, 0.5, 2.0]))
        ),
        key=lambda result: result.fun,
    )
    return made(best.x)


def show(name, values):
    if not len(values):
        return f"{name} none"
    size = np.abs(values)
    return f"{name} {np.median(size):.1%} (p90 {np.quantile(size, 0.9):.1%}, n {len(size)})"


def main():
    for (name, dtype), rows in read(sys.argv[1]).items():
        chip = chip_table()[name]
        found = fit([row for row in rows if not row[2]], chip, dtype)
        print(f"\n[{name}.{dtype}]")
        for field in ("start_s", "rate", "bandwidth", "depth_start", "overlap"):
            print(f"{field} = {getattr(found, field):.4g}")
        cells = []
        for label, half in (("fitted", 0), ("held out", 1)):
            some = [row for row in rows if row[2] == half]
            large = [row for row in some if min(row[0][1:]) > LARGE]
            cells.append(show(f"{label}, above 512", errors(found, large, chip, dtype)))
            cells.append(show(f"{label}, all", errors(found, some, chip, dtype)))
        print("#", "; ".join(cells))


if __name__ == "__main__":
    main()
