"""The command line: parses, calls one library function, prints. Imports late."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import app
from absl.flags import argparse_flags

from jaxbench.errors import CandidateError, JaxbenchError, UsageError

_DESCRIPTION = """Which of several equally good networks trains faster, on which hardware, and why.

Candidates are compiled by the real XLA compilers for CPU, TPU and GPU targets that need not be
there,
priced from the compiled program, and, on an attached device, timed."""

_PROFILED_S = 10  # of timing before a measured profile

_EXAMPLES = """examples:
  jaxbench run quickstart                           the first table, in two to three minutes
  jaxbench run my_net.py --targets tpu-v6e:4x4      candidates of your own
  jaxbench compare bev-cpu-gather bev-cpu-product   head to head on the default targets
  jaxbench measure bev-cpu-gather bev-cpu-product   which is faster on this machine, timed
  jaxbench flips out/quickstart                     choices whose winner changes with the target"""


def main() -> None:
    """Runs the command line; exit code 0 done, 1 something failed, 2 wrong usage."""
    app.run(_command, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
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


def _add(
    commands: Any, name: str, about: str, function: Callable[[argparse.Namespace], int]
) -> Any:
    parser = commands.add_parser(
        name, help=about, description=f"{about[0].upper()}{about[1:]}.", allow_abbrev=False
    )
    parser.set_defaults(function=function)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document instead of tables"
    )
    return parser


def _add_list(commands: Any) -> None:
    parser = _add(commands, "list", "what there is: candidates, targets, suites", _list)
    parser.add_argument(
        "what", nargs="?", choices=("candidates", "targets", "suites"), help="all three if left out"
    )
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help="candidates of these families only"
    )


def _add_run(commands: Any) -> None:
    parser = _add(
        commands,
        "run",
        "compile, price and, if asked, time candidates; only what is missing is done",
        _run,
    )
    parser.add_argument(
        "what", nargs="+", metavar="SUITE_OR_FILE", help="a suite, a Python file, or a candidate"
    )
    _add_work(parser)
    parser.add_argument(
        "--measure", action="store_true", help="also time steps on the targets attached here (cpu)"
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


def _add_compare(commands: Any) -> None:
    parser = _add(
        commands,
        "compare",
        "two candidates head to head, or two runs before and after a change",
        _compare,
    )
    parser.add_argument("first", nargs="?", metavar="A")
    parser.add_argument("second", nargs="?", metavar="B")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold A or B"
    )
    _add_work(parser)
    parser.add_argument(
        "--measure", action="store_true", help="also time both on the targets attached here (cpu)"
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
        commands,
        "measure",
        "candidates timed against the first of them on the attached device",
        _measure,
    )
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE")
    parser.add_argument(
        "--from", dest="files", nargs="+", default=[], metavar="FILE", help="files that hold them"
    )
    parser.add_argument(
        "--target", default="cpu", metavar="T", help="an attached one (default cpu)"
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
        commands,
        "calibrate",
        "fit op times of this machine, from profiled steps, for --calibrated",
        _calibrate,
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
        commands,
        "flips",
        "choices whose winner changes with the target, and what they cost",
        _flips,
    )
    parser.add_argument("dir", type=Path, metavar="DIR")


def _add_validate(commands: Any) -> None:
    parser = _add(
        commands, "validate", "predictions against published step times, case by case", _validate
    )
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
        "a step for XProf and Perfetto: measured on cpu, predicted elsewhere",
        _profile,
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
        commands, "search", "faster networks of a space, composed from blocks, then whole", _search
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
        "--page", type=Path, metavar="FILE", help="also write a Markdown page and a plot"
    )
    _add_limits(parser, "folder of journal, records and winners (default out/search-SPACE)")


def _add_quality(commands: Any) -> None:
    parser = _add(
        commands,
        "quality",
        "do variants drive as well as their base? paired training runs and a verdict",
        _quality,
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
    parser.add_argument("--steps", type=positive_integer, default=200, metavar="N")
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
        "--records", type=Path, metavar="DIR", help="records of these networks, for time to target"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="also write a Markdown page with pictures"
    )
    parser.add_argument(
        "--scenes", type=positive_integer, default=80, metavar="N", help="of build-data"
    )
    _add_limits(parser, "folder of the runs (default out/quality-BASE)")


def _add_report(commands: Any) -> None:
    parser = _add(
        commands, "report", "one page of everything that a folder of records says", _report
    )
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("--markdown", type=Path, required=True, metavar="FILE")


def _command(arguments: argparse.Namespace) -> int:
    try:
        return arguments.function(arguments)
    except (UsageError, CandidateError) as error:
        print(f"jaxbench: {error}", file=sys.stderr)
        return 2
    except JaxbenchError as error:
        print(f"jaxbench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "jaxbench: interrupted; what was finished is kept, the same command goes on from there",
            file=sys.stderr,
        )
        return 1


def _list(arguments: argparse.Namespace) -> int:
    from jaxbench.listing import list_everything
    from jaxbench.report.terminal import progress_line

    with progress_line() as progress:
        found = list_everything(arguments.what, arguments.families, progress)
    _show(arguments, found)
    return 0


def _show(arguments: argparse.Namespace, tables: dict[str, Any]) -> None:
    """Prints tables, or the values behind them."""
    if arguments.json:
        print(json.dumps(_finite(tables["values"]), allow_nan=False))
        return
    from jaxbench.report.terminal import print_tables

    print_tables(tables["tables"])


def _finite(value: Any) -> Any:
    """Returns JSON-ready values; JSON has no infinity, so an open bound is null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _finite(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _run(arguments: argparse.Namespace) -> int:
    from jaxbench.compare import compare_rivals
    from jaxbench.report.tables import run_tables

    records = _evaluate(
        arguments, arguments.what, "-".join(Path(what).stem for what in arguments.what)
    )
    comparisons = compare_rivals(records)
    values = {"records": [record.to_json() for record in records], "comparisons": comparisons}
    _show(arguments, {"values": values, "tables": run_tables(records)})
    return _report_failures(records)


def _limits(arguments: argparse.Namespace) -> Any:
    from jaxbench.run import Limits

    limits = Limits(
        num_workers=arguments.jobs,
        limit_s=arguments.limit_s,
        limit_bytes=arguments.limit_gib * 2**30,
    )
    limits = dataclasses.replace(limits, calibrated=getattr(arguments, "calibrated", False))
    if "budget_s" not in arguments:
        return limits
    return dataclasses.replace(
        limits,
        budget_s=arguments.budget_s,
        precision=arguments.precision,
        logdir=arguments.profile,
    )


def _evaluate(arguments: argparse.Namespace, what: Sequence[str], name: str) -> list[Any]:
    from jaxbench.report.terminal import progress_line
    from jaxbench.run import run_named

    with progress_line() as progress:
        return run_named(
            what,
            out=arguments.out or Path("out") / name,
            targets=None if arguments.targets is None else arguments.targets.split(","),
            layout=arguments.layout,
            measure=arguments.measure,
            limits=_limits(arguments),
            progress=progress,
            together="budget_s" in arguments,
        )


def _report_failures(records: Sequence[Any]) -> int:
    """A network that does not fit is a finding; anything else that failed is said in one line."""
    failed = [record for record in records if record.failure and record.failure["stage"] != "fit"]
    if not failed:
        return 0
    first = failed[0]
    print(
        f"jaxbench: {len(failed)} of {len(records)} failed, the first: {first.candidate} on "
        f"{first.target}: "
        f"{first.failure['stage']}: {first.failure['error']}: {first.failure['text']}",
        file=sys.stderr,
    )
    return 1


def _compare(arguments: argparse.Namespace) -> int:
    from jaxbench.compare import compare_pair
    from jaxbench.report.tables import signal_table, speed_table

    if arguments.baseline or arguments.new:
        return _gate(arguments)
    if not (arguments.first and arguments.second):
        raise UsageError(
            "compare needs two candidates, A and B, or two runs, --baseline DIR and --new DIR."
        )
    what = [*arguments.files, arguments.first, arguments.second]
    records = _evaluate(arguments, what, f"{arguments.first}-{arguments.second}")
    comparisons = compare_pair(records, arguments.first, arguments.second)
    tables = [speed_table(records), signal_table(comparisons)]
    _show(arguments, {"values": {"comparisons": comparisons}, "tables": tables})
    return _report_failures(records)


def _gate(arguments: argparse.Namespace) -> int:
    from jaxbench.cache import storage_errors
    from jaxbench.gate import gate, parse_rules
    from jaxbench.report.gate import gate_tables, headline, render_summary

    if not (arguments.baseline and arguments.new) or arguments.first:
        raise UsageError("Two runs are compared by --baseline DIR and --new DIR, without A and B.")
    result = gate(
        _read(arguments.baseline),
        _read(arguments.new),
        parse_rules(arguments.fail_if),
        signal=arguments.signal,
    )
    if arguments.markdown:
        with storage_errors(arguments.markdown):
            arguments.markdown.write_text(render_summary(result), encoding="utf-8")
    _show(arguments, {"values": result.to_json(), "tables": gate_tables(result)})
    if result.broken:
        print(f"jaxbench: {headline(result)}", file=sys.stderr)
    return 1 if result.broken else 0


def _measure(arguments: argparse.Namespace) -> int:
    from jaxbench.compare import compare_to_first
    from jaxbench.report.measured import measured_tables

    arguments.targets, arguments.measure = arguments.target, True
    names = arguments.candidates
    records = _evaluate(arguments, [*arguments.files, *names], "-".join(["measure", *names]))
    records = sorted(
        (record for record in records if record.candidate in names),
        key=lambda record: names.index(record.candidate),
    )
    comparisons = compare_to_first(records)
    values = {"records": [record.to_json() for record in records], "comparisons": comparisons}
    _show(arguments, {"values": values, "tables": measured_tables(records, comparisons)})
    if arguments.profile and not arguments.json:
        print(f"XProf: xprof --logdir {arguments.profile / names[0]}")
    return _report_failures(records)


def _calibrate(arguments: argparse.Namespace) -> int:
    from jaxbench.calibrate import calibrate
    from jaxbench.report.calibration import calibration_tables
    from jaxbench.report.terminal import progress_line

    with progress_line() as progress:
        found = calibrate(
            [*arguments.files, *arguments.candidates],
            out=arguments.out or Path("out") / "calibrate",
            limits=_limits(arguments),
            progress=progress,
        )
    _show(arguments, {"values": found.to_json(), "tables": calibration_tables(found)})
    if found.failures:
        name, text = found.failures[0]
        print(
            f"jaxbench: {len(found.failures)} could not be profiled, the first: {name}: {text}",
            file=sys.stderr,
        )
    return 1 if found.failures else 0


def _flips(arguments: argparse.Namespace) -> int:
    from jaxbench.compare import compare_rivals, find_flips, find_hints, regrets, signal_agreement
    from jaxbench.report.tables import flips_tables

    records = _read(arguments.dir)
    comparisons = compare_rivals(records)
    agreement = {
        " and ".join(pair): counts for pair, counts in signal_agreement(comparisons).items()
    }
    values = {
        "flips": find_flips(comparisons),
        "leaning": find_hints(comparisons),
        "inconclusive": sum(comparison.verdict == "inconclusive" for comparison in comparisons),
        "comparisons": comparisons,
        "agreement": agreement,
        "regrets": regrets(records),
    }
    _show(arguments, {"values": values, "tables": flips_tables(records)})
    return 0


def _validate(arguments: argparse.Namespace) -> int:
    from jaxbench.published import select_cases
    from jaxbench.report.terminal import progress_line
    from jaxbench.report.validation import outcome_table, summary_table, write_page
    from jaxbench.validate import default_folder, summarise, validate

    cases = select_cases(arguments.cases)
    with progress_line() as progress:
        outcomes = validate(
            cases,
            arguments.out or default_folder(),
            limits=_limits(arguments),
            progress=progress,
            recompile=arguments.recompile,
        )
    summaries = summarise(outcomes)
    if arguments.page:
        write_page(arguments.page, outcomes, summaries)
    values = {"cases": [outcome.to_json() for outcome in outcomes], "summaries": summaries}
    tables = [outcome_table(outcomes), summary_table(summaries)]
    _show(arguments, {"values": values, "tables": tables})
    failed = [outcome for outcome in outcomes if outcome.prediction is None]
    if failed:
        first = failed[0]
        print(
            f"jaxbench: {len(failed)} of {len(outcomes)} cases have no prediction, the first: "
            f"{first.case.id}: {first.failure}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def _search(arguments: argparse.Namespace) -> int:
    from jaxbench.report.search import search_tables, search_values, write_search_page
    from jaxbench.report.terminal import progress_line
    from jaxbench.search.engine import Plan, search

    with progress_line() as progress:
        found = search(
            arguments.space,
            arguments.targets.split(","),
            out=arguments.out or Path("out") / f"search-{Path(arguments.space).stem}",
            plan=Plan(
                budget=arguments.budget,
                sampler=arguments.sampler,
                seed=arguments.seed,
                num_sample=arguments.sample,
                num_whole=arguments.whole,
                bound=arguments.bound,
                measure=arguments.measure,
            ),
            limits=_limits(arguments),
            progress=progress,
        )
    if arguments.page:
        write_search_page(arguments.page, found)
    _show(arguments, {"values": search_values(found), "tables": search_tables(found)})
    if not arguments.json:
        for file in found.files:
            print(file)
    return _report_failures(found.records)


def _quality(arguments: argparse.Namespace) -> int:
    from jaxbench.quality.protocol import Plan, judge_named, target_times
    from jaxbench.report.quality import quality_tables, write_quality_page
    from jaxbench.report.terminal import progress_line

    if arguments.base == "build-data":
        return _build_data(arguments)
    if not arguments.variants:
        raise UsageError("quality needs a base and at least one variant, BASE VARIANT...")
    with progress_line() as progress:
        judged = judge_named(
            arguments.base,
            arguments.variants,
            files=arguments.files,
            data=arguments.data,
            out=arguments.out or Path("out") / f"quality-{arguments.base}",
            plan=Plan(
                pairs=arguments.pairs,
                steps=arguments.steps,
                batch=arguments.batch,
                margin=arguments.margin,
                together=arguments.together,
            ),
            limits=_limits(arguments),
            progress=progress,
        )
    times = target_times(judged, _read(arguments.records) if arguments.records else [])
    if arguments.page:
        write_quality_page(arguments.page, judged, times, arguments.data)
    values = {**judged.to_json(), "times": times}
    _show(arguments, {"values": values, "tables": quality_tables(judged, times)})
    return 0


def _build_data(arguments: argparse.Namespace) -> int:
    from jaxbench.quality.build import build_data
    from jaxbench.report.terminal import progress_line

    if len(arguments.variants) != 1:
        raise UsageError("build-data needs one folder: jaxbench quality build-data DIR.")
    folder = Path(arguments.variants[0])
    with progress_line() as progress:
        digest = build_data(folder, num_scenes=arguments.scenes, progress=progress)
    values = {"folder": str(folder), "digest": digest}
    print(json.dumps(values) if arguments.json else f"{folder}: data {digest}")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from jaxbench.profile import profile_record
    from jaxbench.report.tables import speed_table

    if arguments.target.partition(":")[0] == "cpu":
        arguments.candidates, arguments.profile = [arguments.candidate], arguments.logdir
        arguments.budget_s, arguments.precision = _PROFILED_S, 0.005
        return _measure(arguments)
    arguments.targets, arguments.measure = arguments.target, False
    records = _evaluate(arguments, [*arguments.files, arguments.candidate], arguments.candidate)
    failures = _report_failures(records)
    made = [record for record in records if record.candidate == arguments.candidate]
    if failures or not made or made[0].failure:
        if made and made[0].failure and not failures:
            print(f"jaxbench: {made[0].failure['text']}", file=sys.stderr)
        return 1
    written = profile_record(made[0], arguments.logdir)
    values = {name: str(path) for name, path in written.items()}
    _show(arguments, {"values": values, "tables": [speed_table(made)]})
    if not arguments.json:
        print(f"XProf: xprof --logdir {arguments.logdir}")
        print(f"Perfetto: open {written['trace']} at ui.perfetto.dev")
    return 0


def _read(folder: Path) -> list[Any]:
    from jaxbench.record import FILE_NAME, read_records

    records = read_records(folder)
    if not records:
        raise UsageError(
            f"{folder} holds no {FILE_NAME} with records. `jaxbench run SUITE --out {folder}` "
            f"makes one."
        )
    return records


def _report(arguments: argparse.Namespace) -> int:
    from jaxbench.cache import storage_errors
    from jaxbench.report.markdown import render_page

    records = _read(arguments.dir)
    with storage_errors(arguments.markdown):
        arguments.markdown.write_text(
            render_page(arguments.dir.name, "", records), encoding="utf-8"
        )
    if arguments.json:
        print(json.dumps({"markdown": str(arguments.markdown), "records": len(records)}))
    return 0


if __name__ == "__main__":
    main()
