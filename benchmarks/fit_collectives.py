"""Fits the constants of NCCL collectives to measured ones; by hand.

    python benchmarks/fit_collectives.py collectives_measured.csv

The table has a row a measurement: device_key, op, out_bytes, num_groups, devices_per_group,
permute_pairs, throughput_GBps. Throughput is the largest buffer over seconds: that of an all-gather
is what it makes, that of a reduce-scatter is out_bytes times its ranks. All groups of a row ran at
once, inside one NVLink domain; no row crosses hosts. Prints what `jaxbench/network.toml` holds.

A row is held out if the digest of its key, all but the throughput, is odd. On GB200 ring and swap
are one measurement under two names: it counts once, else it would stand in both halves.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares

from jaxbench.network import Smooth, Steps, permute_pattern

CHIPS = {"sm_90": "gpu-h100", "sm_100_B200": "gpu-b200", "sm_100_GB200": "gpu-gb200"}
LARGE_BYTES = 2**20
# GB200 has one more plateau than the others, from 256 KiB to 1 MiB.
NUM_STEPS = {"gpu-h100": 2, "gpu-b200": 2, "gpu-gb200": 3}
# A permute of as many bytes that took the same to the last digit is the same measurement.
MEASURED = ("out_bytes", "throughput_GBps")
Model = Smooth | Steps
SMALL_WEIGHT = 0.3  # small collectives are noise of the host in good part


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured collective."""

    size_bytes: float
    ranks: int
    seconds: float
    is_held_out: bool


def read_rows(path: Path) -> dict[tuple[str, str], dict[str, list[Row]]]:
    """Returns the rows by chip and op, then by the pattern of a permute, else by an empty name."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    seen = set()
    with path.open() as file:
        for line in csv.DictReader(file):
            chip, op = CHIPS.get(line["device_key"]), line["op"]
            measured = (chip, op, *(line[name] for name in MEASURED))
            if chip is None or (op == "collective-permute" and measured in seen):
                continue
            seen.add(measured)
            pairs = tuple(ast.literal_eval(line["permute_pairs"] or "[]"))
            ranks = int(line["devices_per_group"] or len({one for pair in pairs for one in pair}))
            size = float(line["out_bytes"]) * (ranks if op == "reduce-scatter" else 1)
            row = Row(
                size_bytes=size,
                ranks=ranks,
                seconds=size / (float(line["throughput_GBps"]) * 1e9),
                is_held_out=_is_odd(line),
            )
            found[chip, op][permute_pattern(pairs) if pairs else ""].append(row)
    return dict(found)


def _is_odd(line: dict[str, str]) -> bool:
    key = ",".join(line[name] for name in sorted(line) if name != "throughput_GBps")
    return bool(hashlib.sha256(key.encode()).digest()[0] % 2)


def fit_smooth(rows: list[Row]) -> Smooth:
    """Fits the half that is not held out; residuals are of the logarithm of the seconds."""

    def build(x: np.ndarray) -> dict[str, Model]:
        return {
            "": Smooth(
                latency_s=float(np.exp(x[0])),
                growth=float(x[1]),
                rank_s=float(np.exp(x[2])),
                root=float(np.exp(x[3])),
                bytes_per_s=float(np.exp(x[4])),
                decay=float(x[5]),
            )
        }

    start = np.array([np.log(2e-5), 0.3, np.log(1e-7), np.log(5e-9), np.log(5e11), 0.1])
    # Few rows of a kind leave the decay open; none shows a rate that falls faster with the ranks.
    low, high = [-16, 0, -25, -26, 23, -0.1], [-8, 2, -12, -15, 30, 0.3]
    model = _solve(build, {"": rows}, [start], np.array(low), np.array(high))[""]
    assert isinstance(model, Smooth)
    return model


def fit_steps(rows: dict[str, list[Row]], num_steps: int) -> dict[str, Model]:
    """Fits the patterns of a permute together: start and last rate are the chip's, not theirs."""
    patterns = sorted(rows)
    width = 2 * num_steps - 2

    def build(x: np.ndarray) -> dict[str, Model]:
        latency, root, last, *rest = (float(value) for value in np.exp(x))
        found: dict[str, Model] = {}
        for index, pattern in enumerate(patterns):
            own = rest[index * width : (index + 1) * width]
            found[pattern] = Steps(
                latency_s=latency,
                root=root,
                bytes_per_s=(*own[: num_steps - 1], last),
                cap_s=tuple(own[num_steps - 1 :]),
            )
        return found

    # Where the rate steps is not known beforehand: the best of several starts is kept. Of three
    # steps the first is that of small messages.
    small = ([4e9], [5e-5]) if num_steps == 3 else ([], [])
    starts = [
        np.log([1.2e-5, 2e-9, 4e11, *([*small[0], rate, *small[1], cap] * len(patterns))])
        for rate, cap in ((2.5e10, 7e-4), (8e10, 9e-4), (1.2e11, 6e-4), (1.5e11, 4e-4))
    ]
    ends = ([1e9] * (num_steps - 1) + [5e-6] * (num_steps - 1)) * len(patterns)
    # A step is slower than what follows it; the fastest that was seen is 1.2e11.
    tops = ([1.6e11] * (num_steps - 1) + [5e-3] * (num_steps - 1)) * len(patterns)
    low, high = np.log([3e-6, 1e-11, 1e11, *ends]), np.log([5e-5, 2e-8, 2e12, *tops])
    return _solve(build, rows, starts, low, high)


def _solve(
    build: Callable[[np.ndarray], dict[str, Model]],
    rows: dict[str, list[Row]],
    starts: list[np.ndarray],
    low: np.ndarray,
    high: np.ndarray,
) -> dict[str, Model]:
    fitted = [(name, row) for name, some in rows.items() for row in some if not row.is_held_out]
    weights = np.array(
        [1.0 if row.size_bytes >= LARGE_BYTES else SMALL_WEIGHT for _, row in fitted]
    )
    measured = np.log([row.seconds for _, row in fitted])

    def residual(x: np.ndarray) -> np.ndarray:
        models = build(x)
        seconds = [models[name].seconds(row.size_bytes, ranks=row.ranks) for name, row in fitted]
        return weights * (np.log(seconds) - measured)

    tried = [
        least_squares(residual, start, bounds=(low, high), loss="soft_l1", f_scale=0.1)
        for start in starts
    ]
    return build(min(tried, key=lambda one: one.cost).x)


def errors(model: Model, rows: list[Row]) -> np.ndarray:
    """Returns |predicted / measured - 1| of each row."""
    return np.array(
        [abs(model.seconds(row.size_bytes, ranks=row.ranks) / row.seconds - 1) for row in rows]
    )


def describe(values: np.ndarray) -> str:
    """Writes median, 90th percentile and count."""
    if not len(values):
        return "none"
    return f"{np.median(values):.1%} (p90 {np.quantile(values, 0.9):.1%}, n {len(values)})"


def write_model(model: Model) -> str:
    """Writes the rows of network.toml."""
    if isinstance(model, Smooth):
        return (
            f"latency_s = {model.latency_s:.3g}\ngrowth = {model.growth:.3f}\n"
            f"rank_s = {model.rank_s:.3g}\n"
            f"root = {model.root:.3g}\nbytes_per_s = {model.bytes_per_s:.4g}\n"
            f"decay = {model.decay:.3f}"
        )
    rates = ", ".join(f"{rate:.4g}" for rate in model.bytes_per_s)
    caps = ", ".join(f"{cap:.3g}" for cap in model.cap_s)
    return (
        f"latency_s = {model.latency_s:.3g}\nroot = {model.root:.3g}\n"
        f"bytes_per_s = [{rates}]\ncap_s = [{caps}]"
    )


def split_errors(model: Model, rows: list[Row]) -> dict[str, np.ndarray]:
    """Returns the errors of large and small rows of both halves, by name."""
    found = {}
    for size, is_large in (("large", True), ("small", False)):
        for half, is_held_out in (("fitted", False), ("held out", True)):
            some = [
                row
                for row in rows
                if row.is_held_out == is_held_out and (row.size_bytes >= LARGE_BYTES) == is_large
            ]
            found[f"{size} {half}"] = errors(model, some)
    return found


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("Give the path of the table: python benchmarks/fit_collectives.py TABLE.csv")
    for (chip, op), patterns in sorted(read_rows(Path(sys.argv[1])).items()):
        models = (
            fit_steps(patterns, NUM_STEPS[chip])
            if op == "collective-permute"
            else {"": fit_smooth(patterns[""])}
        )
        split = {name: split_errors(models[name], rows) for name, rows in patterns.items()}
        pooled = {
            part: np.concatenate([one[part] for one in split.values()])
            for part in ("large fitted", "large held out", "small fitted", "small held out")
        }
        print("#", "; ".join(f"{part} {describe(found)}" for part, found in pooled.items()))
        for name, model in models.items():
            print(f"[{'.'.join(part for part in (chip, op, name) if part)}]")
            print(write_model(model))
        print()


if __name__ == "__main__":
    main()
