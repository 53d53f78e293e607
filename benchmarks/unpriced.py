"""Compiles many candidates for many targets and adds up the bytes that have no price. Run by hand.

    python benchmarks/unpriced.py compile --size cpu --targets cpu,tpu-v5e,gpu-h100 --out DIR
    python benchmarks/unpriced.py show DIR...

`compile` is `jaxbench run` over every shipped candidate of a size, so that it goes on where it was
stopped. `show` prints one line a target: programs, how many have a price for every byte, the
largest share of bytes without one (goal: below 1 %), the ops that they belong to, and what failed.
"""

from __future__ import annotations

import argparse
import collections
import subprocess
import sys
from pathlib import Path

from jaxbench.discovery import describe_candidates, family_modules
from jaxbench.record import Record, read_records

GOAL = 0.01


def compile_all(size: str, targets: str, out: Path, jobs: int) -> int:
    """Runs the command line over every candidate of a size; returns its exit code."""
    names = [
        one["name"]
        for one in describe_candidates(family_modules())
        if one["size"] in size.split(",")
    ]
    command = ["run", *names, "--targets", targets, "--out", str(out), "--jobs", str(jobs)]
    return subprocess.run([sys.executable, "-m", "jaxbench", *command]).returncode


def show(records: list[Record]) -> None:
    """Prints what of the records' programs has no price."""
    by_target = collections.defaultdict(list)
    for record in records:
        by_target[record.target].append(record)
    for target, group in sorted(by_target.items()):
        priced = [record for record in group if record.cost]
        shares = [record.cost["unpriced_share"] for record in priced]
        ops = collections.Counter(op for record in priced for op in record.cost["unpriced"])
        above = sum(share >= GOAL for share in shares)
        print(
            f"{target:16} {len(priced):4} programs, {shares.count(0):4} wholly priced, "
            f"at most {max(shares, default=0):.2g}, {above} at {GOAL:.0%} or more; "
            f"without a price: {dict(ops) or 'nothing'}"
        )
        for share, record in sorted(
            ((record.cost["unpriced_share"], record) for record in priced),
            key=lambda pair: -pair[0],
        )[:3]:
            if share:
                print(f"    {record.candidate:48} {share:.2g} {record.cost['unpriced']}")
        failures = collections.Counter(
            f"{record.failure['stage']}: {record.failure['error']}"
            for record in group
            if record.failure
        )
        for failure, count in failures.items():
            print(f"    {count} ended in {failure}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("compile")
    making.add_argument("--size", default="cpu", help="cpu, drive, paper, fleet, or several")
    making.add_argument("--targets", required=True)
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--jobs", type=int, default=2)
    showing = commands.add_parser("show")
    showing.add_argument("folders", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "compile":
        code = compile_all(given.size, given.targets, given.out, given.jobs)
        show(read_records(given.out))
        sys.exit(code)
    show([record for folder in given.folders for record in read_records(folder)])


if __name__ == "__main__":
    main()
