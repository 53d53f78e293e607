"""What the command line takes. Imports nothing heavy: `jaxbench --help` answers at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl.flags import argparse_flags

_DESCRIPTION = """Which of several equally good networks trains faster, on which hardware, and why.

Candidates are compiled by the real XLA compilers for CPU, TPU and GPU targets that need not be
there, priced from the compiled program, and, on an attached device, timed."""


_EXAMPLES = """examples:
  jaxbench run quickstart                           the first table, in two to three minutes
  jaxbench run my_net.py --targets tpu-v6e:4x4      candidates of your own
  jaxbench compare bev-cpu-gather bev-cpu-product   head to head on the default targets
  jaxbench measure bev-cpu-gather bev-cpu-product   which is faster on this machine, timed
  jaxbench search bev --targets gpu-h100,cpu        faster networks around one of ours
  jaxbench flips out/quickstart                     choices whose winner changes with the target"""


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse_flags.ArgumentParser(
        prog="jaxbench",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_list(commands)
    _add_run(commands)
    _add_compare(commands)
    _add_measure(commands)
    _add_calibrate(commands)
    _add_flips(commands)
    _add_validate(commands)
    _add_profile(commands)
    _add_search(commands)
    _add_quality(commands)
    _add_report(commands)
    return parser.parse_args(argv[1:])


def _add(commands: Any, name: str, about: str) -> Any:
    parser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(command=name)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of tables"
    )
    return parser


def _add_list(commands: Any) -> None:
    parser = _add(commands, "list", "what there is: candidates, targets, suites, spaces")
    parser.add_argument(
        "what",
        nargs="?",
        choices=("candidates", "targets", "suites", "spaces"),
        help="all of them if left out",
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="candidates of these families only"
    )


def _add_run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "compile, price and, if asked, time candidates; only what is missing is done",
    )
    parser.add_argument(
        "what", nargs="+", metavar="SUITE_OR_FILE", help="a suite, a Python file, or a candidate"
    )
    _add_work(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also time steps on the targets attached here: cpu, an NVIDIA GPU",
    )
    _add_calibrated(parser)


def _add_work(parser: Any) -> None:
    parser.add_argument("--targets", metavar="T,T", help="such as tpu-v5e:4x4,gpu-h100:8,cpu")
    parser.add_argument("--layout", help="fsdp, data, or sizes such as data=2,fsdp=8")
    _add_limits(parser, "folder of records.jsonl (default out/NAME)")


def _add_limits(parser: Any, out: str) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help=out)
    parser.add_argument(
        "--jobs",
        type=positive_integer,
        default=2,
        metavar="N",
        help="compilers side by side (default 2)",
    )
    parser.add_argument(
        "--limit-s",
        type=positive_integer,
        default=1800,
        metavar="S",
        help="wall limit of one compile",
    )
    parser.add_argument(
        "--limit-gib",
        type=positive_integer,
        default=12,
        metavar="G",
        help="memory limit of one compile",
    )


def positive_integer(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    return tuple(float(one) for one in text.split(","))


def _add_compare(commands: Any) -> None:
    parser = _add(
        commands, "compare", "two candidates head to head, or two runs before and after a change"
    )
    parser.add_argument("first", nargs="?", metavar="A")
    parser.add_argument("second", nargs="?", metavar="B")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold A or B"
    )
    _add_work(parser)
    parser.add_argument(
        "--measure",
        action="store_true",
        help="also time both on the targets attached here: cpu, an NVIDIA GPU",
    )
    gate = parser.add_argument_group("two runs", "records before and after a change, for scripts")
    gate.add_argument("--baseline", type=Path, metavar="DIR", help="records before")
    gate.add_argument("--new", type=Path, metavar="DIR", help="records now")
    gate.add_argument(
        "--fail-if",
        default="slower:3%",
        metavar="RULES",
        help="exit code 1 if a pair breaks one: slower:3%%,memory:5%%,flops:1%%,failure",
    )
    gate.add_argument(
        "--signal",
        choices=("auto", "measured", "predicted"),
        default="auto",
        help="by which step times (default: measured where both were)",
    )
    gate.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write a summary for a CI job"
    )


def _add_measure(commands: Any) -> None:
    parser = _add(
        commands, "measure", "candidates timed against the first of them on the attached device"
    )
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold them"
    )
    parser.add_argument(
        "--target",
        default="cpu",
        metavar="T",
        help="an attached one, cpu or an NVIDIA GPU (default cpu)",
    )
    parser.add_argument("--layout", help="fsdp, data, or sizes such as data=2,fsdp=8")
    _add_session(parser)
    parser.add_argument(
        "--profile",
        type=Path,
        metavar="DIR",
        help="also profile each, op by op beside the prediction; raw profiles stay in DIR",
    )
    _add_calibrated(parser)
    _add_limits(parser, "folder of records.jsonl (default out/NAMES)")


def _add_session(parser: Any, budget_s: int = 60) -> None:
    parser.add_argument(
        "--budget-s",
        type=positive_integer,
        default=budget_s,
        metavar="S",
        help=f"wall seconds of timing (default {budget_s})",
    )
    parser.add_argument(
        "--precision",
        type=percentage,
        default=0.005,
        metavar="P",
        help="half a ratio's interval at which it ends before (default 0.5%%)",
    )


def _add_calibrated(parser: Any) -> None:
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="correct predictions for this machine by what `jaxbench calibrate` kept",
    )


def _add_calibrate(commands: Any) -> None:
    parser = _add(
        commands, "calibrate", "fit op times of this machine, from profiled steps, for --calibrated"
    )
    parser.add_argument(
        "candidates",
        nargs="*",
        metavar="CANDIDATE",
        help="what is profiled; the bases of size cpu if left out",
    )
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold them"
    )
    _add_limits(parser, "folder of the profiled steps (default out/calibrate)")


def percentage(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / 100
    except ValueError:
        value = math.nan
    if not (text.endswith("%") and 0 < value < 1):
        raise argparse.ArgumentTypeError(f"{text!r} is no share such as 0.5%")
    return value


def _add_flips(commands: Any) -> None:
    parser = _add(
        commands, "flips", "choices whose winner changes with the target, and what they cost"
    )
    parser.add_argument("dir", type=Path, metavar="DIR")


def _add_validate(commands: Any) -> None:
    parser = _add(commands, "validate", "predictions against published step times, case by case")
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="parts of ids, or chips; all cases if left out"
    )
    parser.add_argument(
        "--recompile",
        action="store_true",
        help="compile here what other versions of the compilers made",
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a Markdown page and a plot beside it"
    )
    _add_limits(parser, "folder of records and HLO (default results/validate where it exists)")


def _add_profile(commands: Any) -> None:
    parser = _add(
        commands,
        "profile",
        "a step for XProf and Perfetto: measured where attached, else predicted",
    )
    parser.add_argument("candidate", metavar="CANDIDATE")
    parser.add_argument("--target", required=True, metavar="T", help="such as tpu-v5p:4x4x4")
    parser.add_argument("--logdir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--layout", help="fsdp, data, or sizes such as data=2,fsdp=8")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold it"
    )
    _add_limits(parser, "folder of records.jsonl (default out/CANDIDATE)")


def _add_search(commands: Any) -> None:
    parser = _add(
        commands, "search", "faster networks of a space, composed from blocks, then whole"
    )
    parser.add_argument(
        "space", metavar="SPACE", help="a shipped space, or a Python file with a SPACE"
    )
    parser.add_argument("--targets", metavar="T,T", default="tpu-v5e,gpu-h100,cpu")
    parser.add_argument(
        "--budget",
        type=positive_integer,
        default=500,
        metavar="N",
        help="different networks priced (default 500)",
    )
    parser.add_argument("--sampler", choices=("nsga2", "tpe", "random"), default="nsga2")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampler")
    parser.add_argument(
        "--sample",
        type=positive_integer,
        default=12,
        metavar="N",
        help="random networks compiled whole, to check the composition (default 12)",
    )
    parser.add_argument(
        "--whole",
        type=positive_integer,
        default=8,
        metavar="N",
        help="networks of the front compiled whole (default 8)",
    )
    parser.add_argument(
        "--bound",
        type=percentage,
        default=0.05,
        metavar="P",
        help="median composition error above which a target is compiled whole (default 5%%)",
    )
    parser.add_argument(
        "--measure", action="store_true", help="also time the front on the targets attached here"
    )
    parser.add_argument(
        "--measure-s",
        type=positive_integer,
        default=10,
        metavar="S",
        help="seconds of timing for each network and control (default 10)",
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a Markdown page and a plot"
    )
    _add_limits(parser, "folder of journal, records and winners (default out/search-SPACE)")


def _add_quality(commands: Any) -> None:
    parser = _add(
        commands,
        "quality",
        "do variants drive as well as their base? paired training runs and a verdict",
    )
    parser.add_argument(
        "base", metavar="BASE", help="a candidate; or build-data, to make a data set in DIR"
    )
    parser.add_argument("variants", nargs="*", metavar="VARIANT", help="candidates, or DIR")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold them"
    )
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="a data set (default: the small one that ships)"
    )
    parser.add_argument("--pairs", type=positive_integer, default=6, metavar="N")
    parser.add_argument("--steps", type=positive_integer, default=300, metavar="N")
    parser.add_argument("--batch", type=positive_integer, default=8, metavar="N")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="M",
        help="of the metric (default: a quarter of the damage of half the width)",
    )
    parser.add_argument(
        "--together",
        type=positive_integer,
        default=1,
        metavar="N",
        help="seeds trained side by side in one program",
    )
    parser.add_argument(
        "--rollout",
        type=positive_integer,
        default=0,
        metavar="N",
        help="scenes that each confirmed planner also drives in MetaDrive (default 0)",
    )
    parser.add_argument(
        "--scales",
        type=numbers,
        default=(1.0,),
        metavar="X,X",
        help="judge at all these multiples of every width, and say how the damage goes (default 1)",
    )
    parser.add_argument(
        "--records", type=Path, metavar="DIR", help="records of these networks, for time to target"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a Markdown page with pictures"
    )
    parser.add_argument(
        "--scenes", type=positive_integer, default=80, metavar="N", help="of build-data"
    )
    parser.add_argument(
        "--scenarionet",
        type=Path,
        metavar="DIR",
        help="build-data from scenes of your own, without images; unpickles: trust the files",
    )
    parser.add_argument(
        "--nuscenes",
        type=Path,
        metavar="DIR",
        help="build-data from a folder laid out as nuScenes, cameras turned to our rig",
    )
    _add_limits(parser, "folder of the runs (default out/quality-BASE)")


def _add_report(commands: Any) -> None:
    parser = _add(commands, "report", "one page of everything that a folder of records says")
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--markdown", type=Path, required=True, metavar="FILE")
