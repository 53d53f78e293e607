"""The command line: parses, calls one library function, prints. Imports late."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app

from jaxbench.arguments import parse
from jaxbench.errors import CandidateError, JaxbenchError, UsageError

_PROFILED_S = 10  # of timing before a measured profile


def main() -> None:
    """Runs the command line; exit code 0 done, 1 something failed, 2 wrong usage."""
    app.run(_command, flags_parser=parse)


def _command(arguments: argparse.Namespace) -> int:
    try:
        return _COMMANDS[arguments.command](arguments)
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
            limits=dataclasses.replace(_limits(arguments), measure_s=arguments.measure_s),
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
    from jaxbench.quality.judged import Plan, target_times
    from jaxbench.quality.protocol import judge_named
    from jaxbench.report.quality import quality_tables, write_quality_page
    from jaxbench.report.terminal import progress_line

    if arguments.base == "build-data":
        return _build_data(arguments)
    if not arguments.variants:
        raise UsageError("quality needs a base and at least one variant, BASE VARIANT...")
    with progress_line() as progress:
        ladder = judge_named(
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
                rollout=arguments.rollout,
            ),
            limits=_limits(arguments),
            progress=progress,
            scales=arguments.scales,
        )
    records = _read(arguments.records) if arguments.records else []
    main = next((judged for judged in ladder if judged.base == arguments.base), ladder[-1])
    times = target_times(main, records)
    if arguments.page:
        write_quality_page(arguments.page, ladder, times, arguments.data, main=main)
    values = {
        **main.to_json(),
        "times": times,
        "scales": sorted(set(arguments.scales)),
        "ladder": [judged.to_json() for judged in ladder],
    }
    _show(arguments, {"values": values, "tables": quality_tables(ladder, times, main=main)})
    return 0


def _build_data(arguments: argparse.Namespace) -> int:
    from jaxbench.quality.build import build_data, convert_nuscenes, convert_scenarionet
    from jaxbench.report.terminal import progress_line

    if len(arguments.variants) != 1:
        raise UsageError("build-data needs one folder: jaxbench quality build-data DIR.")
    folder = Path(arguments.variants[0])
    if arguments.scenarionet and arguments.nuscenes:
        raise UsageError("build-data reads one source: --scenarionet DIR or --nuscenes DIR.")
    with progress_line() as progress:
        if arguments.scenarionet:
            digest = convert_scenarionet(folder, arguments.scenarionet, progress=progress)
        elif arguments.nuscenes:
            digest = convert_nuscenes(folder, arguments.nuscenes, progress=progress)
        else:
            digest = build_data(folder, num_scenes=arguments.scenes, progress=progress)
    values = {"folder": str(folder), "digest": digest}
    print(json.dumps(values) if arguments.json else f"{folder}: data {digest}")
    return 0


def _profile(arguments: argparse.Namespace) -> int:
    from jaxbench.attached import why_not_attached
    from jaxbench.profile import profile_record
    from jaxbench.report.tables import speed_table
    from jaxbench.target import parse_target

    if why_not_attached(parse_target(arguments.target)) is None:
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


_COMMANDS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "run": _run,
    "compare": _compare,
    "measure": _measure,
    "calibrate": _calibrate,
    "flips": _flips,
    "validate": _validate,
    "profile": _profile,
    "search": _search,
    "quality": _quality,
    "report": _report,
}

if __name__ == "__main__":
    main()
