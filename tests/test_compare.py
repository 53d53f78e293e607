"""Verdicts, flips and regrets from records made by hand, and the tables made of them."""

import dataclasses
from typing import Any

import pytest
from records import make_measurement, make_record

from jaxbench.compare import (
    Comparison,
    best_records,
    compare_pair,
    compare_records,
    compare_rivals,
    compare_to_first,
    find_flips,
    find_hints,
    regrets,
    rival_groups,
    signal_agreement,
)
from jaxbench.record import Record
from jaxbench.report.markdown import render_page
from jaxbench.report.tables import (
    agreement_table,
    flip_table,
    format_number,
    overhead_table,
    regret_table,
    signal_table,
    speed_table,
)
from jaxbench.signals import SIGNAL_ERROR
from jaxbench.stats import median_ratio

ONE, TWO = "net-cpu-one", "net-cpu-two"
HLO, COMPILER, MEASURED = (SIGNAL_ERROR[name] for name in ("hlo", "compiler", "measured"))
STEADY = (1.0, 1.001, 0.999, 1.0005, 0.9995)


def steady(step_s: float) -> list[float]:
    """Samples that spread by a thousandth."""
    return [step_s * factor for factor in STEADY]


def pair(target: str = "tpu-v5e", **second_over_first: float) -> tuple[Record, Record]:
    """Two rivals whose step times by each signal have the given ratios."""

    def make(name: str, scale: dict[str, float]) -> Record:
        signals: dict[str, Any] = {
            f"{signal}_s": scale[signal] for signal in ("hlo", "compiler") if signal in scale
        }
        if "measured" in scale:
            signals["samples_s"] = steady(scale["measured"])
        speed = 8 / (scale.get("measured") or scale.get("compiler") or scale["hlo"])
        return make_record(name, target, samples_per_s=speed, **signals)

    return make(ONE, dict.fromkeys(second_over_first, 1.0)), make(TWO, second_over_first)


def compare(target: str = "tpu-v5e", **second_over_first: float) -> Comparison:
    return compare_records(*pair(target, **second_over_first))


@pytest.mark.parametrize(
    ("ratios", "verdict", "reason"),
    [
        ({"hlo": 1.5, "compiler": 1.5}, "faster", "agree"),
        ({"hlo": 1 / 1.5, "compiler": 1 / 1.5}, "slower", "agree"),
        ({"hlo": 1.5, "compiler": 1 / 1.5}, "inconclusive", "disagree: hlo 1.50, compiler 0.67"),
        ({"hlo": HLO * 0.99, "compiler": 1.5}, "inconclusive", "is within its error of"),
        ({"hlo": 1.5, "compiler": 1.1}, "inconclusive", "compiler ratio 1.10 is within its"),
        ({"hlo": HLO * 1.01, "compiler": COMPILER * 1.01}, "faster", "agree"),
        ({"hlo": 3.0}, "inconclusive", "one signal only"),
        ({"hlo": 1.0, "measured": 1.5}, "faster", "measured 1.500"),
        ({"hlo": 3.0, "measured": 0.5}, "slower", "measured 0.500"),
        ({"hlo": 3.0, "compiler": 3.0, "measured": 1.0}, "tie", "measured 1.000"),
        ({"hlo": 1.0, "measured": MEASURED * 0.99}, "tie", "measured 1.0"),
        ({"hlo": 1.0, "measured": MEASURED * 1.01}, "faster", "measured 1.06"),
    ],
)
def test_compare_records_verdict_follows_the_evidence(
    ratios: dict[str, float], verdict: str, reason: str
) -> None:
    comparison = compare(**ratios)
    assert (comparison.verdict, comparison.first, comparison.second) == (verdict, ONE, TWO)
    assert reason in comparison.reason
    assert comparison.winner == {"faster": ONE, "slower": TWO}.get(verdict)


def test_compare_records_turned_round_gives_the_turned_verdict() -> None:
    opposite = {"faster": "slower", "slower": "faster"}
    for ratios in ({"hlo": 1.5, "compiler": 1.4}, {"hlo": 1.1, "compiler": 1.4}, {"measured": 2.0}):
        first, second = pair(**ratios)
        there, back = compare_records(first, second), compare_records(second, first)
        assert back.verdict == opposite.get(there.verdict, there.verdict)
        assert back.winner == there.winner
        for one, other in zip(there.ratios, back.ratios, strict=True):
            assert one.ratio * other.ratio == pytest.approx(1, rel=1e-12)  # rounding only


def test_compare_records_noisy_measurements_are_inconclusive() -> None:
    noisy = [0.5, 1.9, 1.0, 0.7, 1.4, 2.1]
    first = make_record(ONE, "cpu", samples_s=noisy)
    second = make_record(TWO, "cpu", samples_s=[1.1 * value for value in noisy])
    comparison = compare_records(first, second)
    assert comparison.verdict == "inconclusive"
    assert "holds 1" in comparison.reason


def test_compare_records_same_compiled_program_is_a_tie_whatever_was_measured() -> None:
    first = make_record(ONE, hlo_sha256="same", hlo_s=1.0, samples_s=steady(1.0))
    second = make_record(TWO, hlo_sha256="same", hlo_s=1.0, samples_s=steady(2.0))
    comparison = compare_records(first, second)
    assert (comparison.verdict, comparison.reason) == (
        "tie",
        "the compiler made the same program of both",
    )


def test_compare_records_without_any_program_is_no_tie() -> None:
    comparison = compare_records(
        make_record(ONE, hlo_sha256=None), make_record(TWO, hlo_sha256=None)
    )
    assert comparison.verdict != "tie"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"failure": {"stage": "fit", "error": "DoesNotFit", "text": "too large"}}, "too large"),
        ({"workload": {"kind": "train", "global_batch": 16}}, "differ in workload"),
        ({"layout": "fsdp=1"}, "differ in layout"),
        ({"target": "tpu-v5p"}, "differ in target"),
    ],
)
def test_compare_records_unlike_records_are_not_comparable(
    fields: dict[str, Any], reason: str
) -> None:
    first = make_record(ONE, hlo_s=1.0, compiler_s=1.0)
    second = make_record(TWO, **{"hlo_s": 2.0, "compiler_s": 2.0, **fields})
    for comparison in (compare_records(first, second), compare_records(second, first)):
        assert comparison.verdict == "not comparable"
        assert reason in comparison.reason
        assert comparison.winner is None


def test_compare_records_model_flops_alone_are_no_evidence() -> None:
    first = make_record(ONE, model_flops=1e9)
    second = make_record(TWO, model_flops=9e9)
    comparison = compare_records(first, second)
    assert comparison.verdict == "inconclusive"
    (ratio,) = comparison.ratios
    assert (ratio.signal, ratio.ratio, ratio.sign) == ("model", 9.0, 0)


def test_compare_records_measured_interval_is_the_bootstraps_widened_by_its_error() -> None:
    first, second = [1.0, 1.1, 0.9, 1.05, 1.2], [2.0, 2.1, 1.8, 2.2, 2.05]
    middle, low, high = median_ratio(second, first)
    comparison = compare_records(
        make_record(ONE, "cpu", samples_s=first), make_record(TWO, "cpu", samples_s=second)
    )
    ratio = comparison.ratio("measured")
    assert ratio is not None
    assert (ratio.ratio, ratio.low, ratio.high) == (middle, low / MEASURED, high * MEASURED)


# Two that were timed in one session.


def timed(name: str, step_s: float, *, seed: int = 0, **options: Any) -> Record:
    """A record of a session's measurement; two of different seeds have noise of their own."""
    return make_record(name, "cpu", measurement=make_measurement(step_s, seed=seed, **options))


def timed_pair(ratio: float, **options: Any) -> tuple[Record, Record]:
    """Two of one session, the second's step that many times the first's."""
    return timed(ONE, 0.01, seed=1, **options), timed(TWO, 0.01 * ratio, seed=2, **options)


@pytest.mark.parametrize(
    ("ratio", "noise", "verdict", "reason"),
    [
        (1.03, 0.002, "faster", "measured 1.0"),
        (0.97, 0.002, "slower", "measured 0.9"),
        (1.0, 0.002, "tie", "within 2%"),
        (1.0, 0.2, "inconclusive", "holds 1"),
    ],
)
def test_compare_records_of_one_session_verdict_is_that_of_the_paired_interval(
    ratio: float, noise: float, verdict: str, reason: str
) -> None:
    first, second = timed_pair(ratio, noise=noise)
    comparison = compare_records(first, second)
    assert comparison.verdict == verdict
    assert reason in comparison.reason
    measured = comparison.ratio("measured")
    assert measured is not None
    assert measured.low < ratio < measured.high
    assert measured.high / measured.low < 1 + 5 * noise
    measured = comparison.ratio("measured")
    assert measured is not None
    assert measured.low < ratio < measured.high
    back = compare_records(second, first)
    assert back.winner == comparison.winner


def test_compare_records_of_one_session_have_no_factor_for_drift_between_processes() -> None:
    measured = compare_records(*timed_pair(1.03)).ratio("measured")
    assert measured is not None
    # 48 chains of 0.2 % each know the ratio to a thousandth.
    assert measured.high / measured.low < 1.005 < MEASURED


@pytest.mark.parametrize("second", ["another", None])
def test_compare_records_of_two_sessions_fall_back_to_medians_and_their_error(
    second: str | None,
) -> None:
    one, other = timed(ONE, 0.01), timed(TWO, 0.0103, session=second)
    comparison = compare_records(one, other)
    measured = comparison.ratio("measured")
    assert measured is not None
    assert measured.high / measured.low > MEASURED**2
    assert comparison.verdict == "tie"
    assert "within 1.10" in comparison.reason


def timed_later(ratio: float, **controls: float) -> tuple[Record, Record]:
    """A base, and a rival timed on a slower day, when the base took 1.5 times as long."""
    base = timed(ONE, 0.01, session="then")
    again = make_measurement(0.015, seed=3)
    base_again = {"id": base.id, "chains": again["chains"]}
    options: dict[str, Any] = {"session": "now", "base_again": base_again, **controls}
    return base, timed(TWO, 0.015 * ratio, seed=4, **options)


def test_compare_records_base_that_was_timed_again_is_compared_within_that_session() -> None:
    base, rival = timed_later(1.03)
    comparison, back = compare_records(base, rival), compare_records(rival, base)
    measured, inverse = comparison.ratio("measured"), back.ratio("measured")
    assert measured
    assert inverse
    assert measured.low < 1.03 < measured.high < 1.035
    assert inverse.low < 1 / 1.03 < inverse.high
    assert (comparison.verdict, back.verdict) == ("faster", "slower")


def test_compare_records_base_that_was_timed_again_controls_are_of_that_session() -> None:
    base, rival = timed_later(1.5, same=1.01)
    for one, two in ((base, rival), (rival, base)):
        assert "control failed" in compare_records(one, two).reason


def test_compare_records_base_of_another_record_is_not_that_which_was_timed_again() -> None:
    base, rival = timed_later(1.03)
    other = dataclasses.replace(base, id="another")
    assert "within 1.10" not in compare_records(base, rival).reason
    measured = compare_records(other, rival).ratio("measured")
    assert measured
    assert measured.high / measured.low > MEASURED**2


def test_compare_records_without_any_session_are_not_of_one_session() -> None:
    comparison = compare_records(
        timed(ONE, 0.01, session=None), timed(TWO, 0.0103, session=None, same=2.0)
    )
    assert comparison.verdict == "tie"


@pytest.mark.parametrize(
    ("controls", "reason"),
    [
        ({"same": 1.01}, "control failed: the base against itself gave 1.0"),
        ({"same": 0.99}, "control failed: the base against itself gave 0.9"),
        ({"planted": 1.0}, "control failed: 2% planted, 1.0"),
        ({"planted": 1.05}, "control failed: 2% planted, 1.05"),
    ],
)
def test_compare_records_of_a_session_whose_control_failed_are_inconclusive(
    controls: dict[str, float], reason: str
) -> None:
    comparison = compare_records(*timed_pair(1.5, **controls))
    assert (comparison.verdict, comparison.winner) == ("inconclusive", None)
    assert reason in comparison.reason


@pytest.mark.parametrize("control", ["same", "planted"])
def test_compare_records_of_a_session_without_its_controls_are_inconclusive(control: str) -> None:
    first, second = timed_pair(1.5)
    for record in (first, second):
        assert record.measurement
        record.measurement["controls"][control] = []
    comparison = compare_records(first, second)
    assert comparison.verdict == "inconclusive"
    assert "control" in comparison.reason


def test_compare_records_of_one_session_with_one_program_are_a_tie() -> None:
    first, second = timed_pair(1.5)
    first, second = (dataclasses.replace(record, hlo_sha256="same") for record in (first, second))
    assert compare_records(first, second).verdict == "tie"


def test_compare_to_first_compares_it_with_each_other_in_their_order() -> None:
    records = [timed(name, 0.01 + 0.001 * place, seed=place) for place, name in enumerate("abc")]
    found = [(one.first, one.second, one.verdict) for one in compare_to_first(records)]
    assert found == [("a", "b", "faster"), ("a", "c", "faster")]
    assert compare_to_first(records[:1]) == []


def test_find_flips_needs_evidence_on_both_sides() -> None:
    won = compare("tpu-v5e", hlo=1.5, compiler=1.5)
    lost = compare("cpu", measured=0.5)
    weak = compare("gpu-h100", hlo=0.3)
    (flip,) = find_flips([won, lost, weak])
    assert (flip.first, flip.second) == (ONE, TWO)
    assert (flip.first_wins_on, flip.second_wins_on) == (("tpu-v5e",), ("cpu",))
    assert find_flips([won, weak]) == []
    assert find_flips([lost, weak]) == []
    assert find_flips([won, compare("tpu-v5p", hlo=1.5, compiler=1.5)]) == []


def test_find_hints_takes_the_best_signal_however_small_its_ratio() -> None:
    won = compare("tpu-v5e", hlo=1.5, compiler=1.5)
    (hint,) = find_hints([won, compare("gpu-h100", hlo=0.9)])
    assert (hint.first_wins_on, hint.second_wins_on) == (("tpu-v5e",), ("gpu-h100",))
    # The compiler's word counts before ours; the measured one before both.
    assert find_hints([won, compare("tpu-v4", hlo=0.5, compiler=1.01)]) == []
    assert find_hints([won, compare("cpu", hlo=0.5, measured=1.3)]) == []


def test_find_hints_ties_and_incomparable_pairs_lean_nowhere() -> None:
    won = compare("tpu-v5e", hlo=1.5, compiler=1.5)
    tie = compare("cpu", measured=0.999)
    assert tie.verdict == "tie"
    failed = compare_records(
        make_record(ONE, "tpu-v4", hlo_s=2.0),
        make_record(
            TWO, "tpu-v4", hlo_s=1.0, failure={"stage": "fit", "error": "DoesNotFit", "text": "no"}
        ),
    )
    assert find_hints([won, tie]) == []
    assert find_hints([won, failed]) == []


def test_signal_agreement_counts_pairs_with_both_signals_and_leaves_flops_out() -> None:
    comparisons = [
        compare("tpu-v5e", hlo=1.5, compiler=1.1),
        compare("tpu-v4", hlo=1.5, compiler=0.9),
        compare("gpu-h100", hlo=1.5),
        compare("cpu", hlo=0.9, measured=0.5),
    ]
    assert signal_agreement(comparisons) == {
        ("hlo", "compiler"): (1, 2),
        ("hlo", "measured"): (1, 1),
    }


def test_regrets_are_the_time_lost_by_the_other_targets_winner() -> None:
    records = [*pair("tpu-v5e", hlo=1.5, compiler=1.5), *pair("cpu", measured=0.5)]
    found = {(one.chosen_on, one.used_on): one for one in regrets(records)}
    assert found.keys() == {("tpu-v5e", "cpu"), ("cpu", "tpu-v5e")}
    assert found["tpu-v5e", "cpu"].worst == pytest.approx(1.0)  # 1 s where 0.5 s would do
    assert found["cpu", "tpu-v5e"].worst == pytest.approx(0.5)
    assert found["cpu", "tpu-v5e"].worst_group == ONE


def test_regrets_over_groups_give_worst_and_mean() -> None:
    records = []
    for base, ratio in (("a-one", 2.0), ("b-one", 4.0)):
        for target, speeds in (("cpu", (8.0, 8.0 / ratio)), ("tpu-v5e", (1.0, ratio))):
            for name, speed in zip((base, f"{base}-other"), speeds, strict=True):
                records.append(
                    make_record(name, target, base=base, hlo_s=8 / speed, samples_per_s=speed)
                )
    found = {(one.chosen_on, one.used_on): one for one in regrets(records)}
    assert found["cpu", "tpu-v5e"].worst == pytest.approx(3.0)
    assert found["cpu", "tpu-v5e"].mean == pytest.approx(2.0)
    assert found["cpu", "tpu-v5e"].worst_group == "b-one"


def test_regrets_of_one_target_or_one_candidate_are_none() -> None:
    assert regrets(pair("tpu-v5e", hlo=1.5)) == []
    assert (
        regrets([make_record(ONE, target, samples_per_s=1.0) for target in ("cpu", "tpu-v4")]) == []
    )


def test_best_records_measured_goes_before_predicted_and_any_before_a_failure() -> None:
    failed = make_record(ONE, "cpu", failure={"stage": "worker", "error": "Crash", "text": "no"})
    predicted = make_record(ONE, "cpu", hlo_s=1.0)
    measured = make_record(ONE, "cpu", hlo_s=1.0, samples_s=steady(1.0))
    unmeasurable = make_record(
        ONE, "cpu", hlo_s=1.0, failure={"stage": "measure", "error": "MeasureError", "text": "no"}
    )
    assert best_records([predicted, measured]) == [measured]
    assert best_records([measured, predicted]) == [measured]
    assert best_records([failed, predicted]) == [predicted]
    assert best_records([predicted, unmeasurable]) == [predicted]
    assert best_records([unmeasurable, predicted]) == [predicted]
    assert best_records([failed]) == [failed]


def test_rival_groups_hold_one_base_on_one_target_base_first() -> None:
    records = [
        make_record("net-cpu-aaa", "cpu"),
        make_record(ONE, "cpu"),
        make_record(ONE, "tpu-v5e"),
        make_record("other-cpu-one", "cpu", base="other-cpu-one"),
    ]
    groups = {
        key: [record.candidate for record in group] for key, group in rival_groups(records).items()
    }
    assert groups == {
        (ONE, "cpu"): [ONE, "net-cpu-aaa"],
        (ONE, "tpu-v5e"): [ONE],
        ("other-cpu-one", "cpu"): ["other-cpu-one"],
    }


def test_compare_rivals_compares_every_two_of_a_group() -> None:
    names = (ONE, "net-cpu-b", "net-cpu-c")
    records = [make_record(name, "cpu", hlo_s=1.0) for name in names]
    found = [(one.first, one.second) for one in compare_rivals(records)]
    assert found == [(ONE, names[1]), (ONE, names[2]), (names[1], names[2])]


def test_compare_pair_keeps_the_order_that_was_asked_for() -> None:
    records = [*pair("tpu-v5e", hlo=1.5, compiler=1.5), make_record(ONE, "cpu", hlo_s=1.0)]
    (comparison,) = compare_pair(records, TWO, ONE)
    assert (comparison.first, comparison.verdict, comparison.target) == (TWO, "slower", "tpu-v5e")


def found_records() -> list[Record]:
    """A flip between two targets, a leaning on a third, and a network that does not fit."""
    failure = {
        "stage": "fit",
        "error": "DoesNotFit",
        "text": "Needs 3 GiB",
        "needed_bytes": 3 * 2**30,
        "available_bytes": 2**30,
    }
    timings = {"trace_s": 1.0, "lower_s": 0.5, "compile_s": 2.0, "price_s": 0.5, "worker_s": 5.0}
    return [
        *pair("tpu-v5e", hlo=1.5, compiler=1.5),
        *pair("gpu-h100", hlo=0.9),
        *pair("cpu", hlo=1.1, measured=0.5),
        make_record("net-cpu-three", "cpu", failure=failure, timings=timings),
    ]


def test_speed_table_rows_are_candidates_and_columns_targets_of_the_table_of_chips() -> None:
    table = speed_table(found_records())
    assert table.header == ("candidate", "tpu-v5e", "gpu-h100", "cpu")
    assert table.rows == (
        (ONE, "8", "8", "8*"),
        ("  net-cpu-three", "-", "-", "needs 3.0 of 1.0 GiB"),
        (f"  {TWO}", "5.33 (0.67x)", "8.89 (1.11x)", "16* (2.00x)"),
    )


def test_speed_table_other_failure_names_the_error() -> None:
    failure = {"stage": "compile", "error": "XlaRuntimeError", "text": "no"}
    assert speed_table([make_record(ONE, failure=failure)]).rows == (
        (ONE, "failed: XlaRuntimeError"),
    )


def test_flip_table_proven_first_then_leaning_with_the_counts() -> None:
    comparisons = compare_rivals(found_records())
    table = flip_table(comparisons)
    assert table.rows == (("flip", f"{ONE} on tpu-v5e", f"{TWO} on cpu"),)
    hinted = flip_table([one for one in comparisons if one.target != "cpu"])
    assert hinted.rows == (("inconclusive", f"{ONE} on tpu-v5e", f"{TWO} on gpu-h100"),)
    assert "0 proven, 1 leaning" in " ".join(hinted.notes)
    assert "Of 2 comparisons 1 are inconclusive" in " ".join(hinted.notes)


def test_signal_and_agreement_and_regret_tables_show_every_cell() -> None:
    records = found_records()
    comparisons = [one for one in compare_rivals(records) if one.second == TWO]
    rows = {row[1]: row for row in signal_table(comparisons).rows if row[0] == f"{ONE} / {TWO}"}
    assert rows["tpu-v5e"][2:] == ("1.00", "1.50", "1.50", "-", f"{ONE} is faster")
    assert rows["cpu"][2:] == ("1.00", "1.10", "-", "0.50", f"{TWO} is faster")
    assert rows["gpu-h100"][2:6] == ("1.00", "0.90", "-", "-")
    assert rows["gpu-h100"][6].startswith("inconclusive: one signal only")
    assert agreement_table(comparisons).rows == (
        ("hlo and compiler", "1 of 1"),
        ("hlo and measured", "0 of 1"),
    )
    assert regret_table(records).rows == (
        ("tpu-v5e", "", "11%", "100%"),
        ("gpu-h100", "50%", "", "0%"),
        ("cpu", "50%", "0%", ""),
    )


def test_overhead_table_shares_add_up() -> None:
    table = overhead_table(found_records())
    assert table.rows == (
        ("trace", "1.0", "20.0%"),
        ("lower", "0.5", "10.0%"),
        ("compile", "2.0", "40.0%"),
        ("read and price", "0.5", "10.0%"),
        ("measure", "0.0", "0.0%"),
        ("rest", "1.0", "20.0%"),
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (1.0, "1"), (99.96, "100"), (123.4, "123"), (1234567, "1,230,000")],
)
def test_format_number_has_three_digits(value: float, text: str) -> None:
    assert format_number(value) == text


_PAGE = """# small

Two networks.

2 records. Made with jax 0.0.1.

## Training samples/s on the whole target

| candidate | tpu-v5e |
| --- | --- |
| net-cpu-one | 8 |
| net-cpu-two | 5.33 (0.67x) |

* measured on this machine; the others are predicted (`jaxbench validate`: how well). Bracket: against the base above it.

## Choices whose winner changes with the target

None.

0 proven, 0 leaning so without enough evidence. Of 1 comparisons 0 are inconclusive. Proof on a target is a measurement, or hlo and compiler agreeing beyond their known errors.

## Agreement of signals on who is faster

| signals | agree |
| --- | --- |
| hlo and compiler | 1 of 1 |
"""  # noqa: E501


def test_render_page_small_folder_is_the_golden_text() -> None:
    page = render_page("small", "Two networks.", pair("tpu-v5e", hlo=1.5, compiler=1.5))
    assert page.startswith(_PAGE), page
    assert page.count("\n## ") == 6


def test_render_page_every_table_has_rows_of_one_width() -> None:
    page = render_page("small", "", found_records())
    for block in page.split("\n\n"):
        rows = [line for line in block.splitlines() if line.startswith("| ")]
        assert len({row.replace("\\|", "").count("|") for row in rows}) <= 1
    assert "nan" not in page


def test_render_page_pipe_in_a_cell_is_escaped() -> None:
    failure = {"stage": "compile", "error": "A|B", "text": "no"}
    assert "failed: A\\|B" in render_page("small", "", [make_record(ONE, failure=failure)])
