"""The gate: rules, pairs, verdicts and what a job's summary says, from records made by hand."""

import json
import math
from typing import Any

import pytest
from records import make_record

from jaxbench.errors import UsageError
from jaxbench.gate import GateResult, Pair, Rule, gate, parse_rules
from jaxbench.gate.change import Change
from jaxbench.gate.drift import session_ratio
from jaxbench.record import Record
from jaxbench.report.gate import gate_tables, headline, render_summary
from jaxbench.signals import SIGNAL_ERROR
from jaxbench.stats import median_ratio

SLOWER = parse_rules("slower:3%")
ONE, TWO = "net-cpu-one", "net-cpu-two"
STEADY = (1.0, 1.001, 0.999, 1.0005, 0.9995)
FAILURE = {"stage": "compile", "error": "XlaRuntimeError", "text": "no such op"}
MACHINE = {
    "fingerprint": "aaaa",
    "processor": "Fast 9000",
    "cores": 8,
    "memory_bytes": 16 * 2**30,
    "device": "cpu",
    "system": "Linux x86_64",
}


def steady(level: float) -> list[float]:
    """Times that spread by a thousandth."""
    return [level * factor for factor in STEADY]


def predicted(
    step_s: float = 1.0,
    name: str = ONE,
    target: str = "tpu-v5e",
    *,
    peak_bytes: int | None = 2**30,
    hlo_flops: int | None = 10**9,
    predictor: str | None = "timeline-1",
    cpu_peaks: dict[str, float] | None = None,
    **fields: Any,
) -> Record:
    """A record that was compiled, priced and predicted."""
    prediction = {"step_s": step_s, "predictor": predictor, "cpu_peaks": cpu_peaks}
    values: dict[str, Any] = {
        "prediction": prediction,
        "compiled": {"memory": {"peak_bytes": peak_bytes}},
        "cost": {"hlo_flops": hlo_flops},
    }
    return make_record(name, target, **{**values, **fields})


def measured(
    step_s: float = 1.0,
    name: str = ONE,
    *,
    samples_s: list[float] | None = None,
    yardstick_s: float | list[float] | None = None,
    environment: dict[str, Any] | None = MACHINE,
    protocol: str = "paired",
    **fields: Any,
) -> Record:
    """A record that was timed as well."""
    measurement: dict[str, Any] = {
        "samples_s": steady(step_s) if samples_s is None else samples_s,
        "protocol": protocol,
    }
    if environment is not None:
        measurement["environment"] = environment
    if yardstick_s is not None:
        times = yardstick_s if isinstance(yardstick_s, list) else steady(yardstick_s)
        measurement["yardstick_s"] = times
    return predicted(1.0, name, "cpu", **{"measurement": measurement, **fields})


def measured_like(record: Record) -> Record:
    """The same costs in a record that was timed."""
    return measured(yardstick_s=1.0, compiled=record.compiled, cost=record.cost)


def on_peaks(step_s: float) -> dict[str, Any]:
    """A prediction on peaks that are the same each time."""
    return {"step_s": step_s, "predictor": "timeline-1", "cpu_peaks": {"float32": 1e11}}


def one_pair(before: Record, after: Record, rules: str = "slower:3%", **options: Any) -> Pair:
    (pair,) = gate([before], [after], parse_rules(rules), **options).pairs
    return pair


# --- Rules ----------------------------------------------------------------------------------------


def test_parse_rules_reads_each_kind_in_the_order_given() -> None:
    assert parse_rules("slower:3%, memory:0.5%,flops:100%,failure") == (
        Rule(name="slower", share=0.03),
        Rule(name="memory", share=0.005),
        Rule(name="flops", share=1.0),
        Rule(name="failure"),
    )


@pytest.mark.parametrize("text", ["slower:3%", "memory:0.5%,failure", "flops:7%"])
def test_parse_rules_are_written_as_they_were_read(text: str) -> None:
    assert ",".join(map(str, parse_rules(text))) == text


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "''"),
        ("slower", "'slower'"),
        ("slower:3", "'slower:3'"),
        ("slower:-3%", "'slower:-3%'"),
        ("slower:0%", "'slower:0%'"),
        ("slower:nan%", "'slower:nan%'"),
        ("failure:3%", "'failure:3%'"),
        ("speed:3%", "'speed:3%'"),
        ("slower:3%,", "''"),
        ("slower:3%,slower:5%", "slower twice"),
    ],
)
def test_parse_rules_bad_input_is_named_in_one_line(text: str, culprit: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse_rules(text)
    assert culprit in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rule", "fields", "broken"),
    [
        ("memory:5%", {"peak_bytes": 1051}, True),
        ("memory:5%", {"peak_bytes": 1049}, False),
        ("memory:5%", {"peak_bytes": 500}, False),
        ("flops:1%", {"hlo_flops": 1011}, True),
        ("flops:1%", {"hlo_flops": 1009}, False),
    ],
)
def test_gate_memory_and_flops_break_their_rule_at_its_share(
    rule: str, fields: dict[str, int], broken: bool
) -> None:
    before = predicted(peak_bytes=1000, hlo_flops=1000)
    after = predicted(**{"peak_bytes": 1000, "hlo_flops": 1000, **fields})  # type: ignore[arg-type]
    for records in ((before, after), (measured_like(before), measured_like(after))):
        pair = one_pair(*records, rule)
        assert bool(pair.broken) is broken
        assert bool(pair.kept) is not broken
        assert pair.verdict == "same"


def test_gate_from_nothing_to_something_is_growth_without_bound() -> None:
    pair = one_pair(predicted(hlo_flops=0), predicted(hlo_flops=1), "flops:1%")
    assert (pair.broken, pair.hlo_flops.ratio) == (parse_rules("flops:1%"), math.inf)
    assert Change(before=0, after=0).ratio == 1


def test_gate_numbers_that_are_not_there_leave_their_rule_undecided() -> None:
    pair = one_pair(predicted(), predicted(peak_bytes=None, cost=None), "memory:5%,flops:1%")
    assert pair.undecided == parse_rules("memory:5%,flops:1%")
    assert not pair.broken


def test_gate_failure_of_what_had_a_result_breaks_only_its_rule() -> None:
    after = make_record(failure=FAILURE)
    pair = one_pair(predicted(), after, "slower:3%,failure")
    assert (pair.verdict, pair.broken) == ("not comparable", parse_rules("failure"))
    assert pair.step.reason == "fails now: compile: XlaRuntimeError: no such op"
    assert pair.undecided == SLOWER
    assert not one_pair(predicted(), after).broken


def test_gate_failure_that_was_there_before_breaks_nothing() -> None:
    failing = make_record(failure=FAILURE)
    for after, reason in ((failing, "fails as before"), (predicted(), "failed before")):
        pair = one_pair(failing, after, "slower:3%,failure")
        assert (pair.verdict, pair.broken, pair.undecided) == ("not comparable", (), ())
        assert pair.step.reason.startswith(reason)


def test_gate_missing_record_is_reported_and_breaks_only_failure() -> None:
    baseline, new = [predicted(), predicted(name=TWO)], [predicted()]
    for rules, broken in (("slower:3%", ()), ("slower:3%,failure", parse_rules("failure"))):
        gone = gate(baseline, new, parse_rules(rules)).pairs[0]
        assert (gone.candidate, gone.verdict, gone.broken) == (TWO, "missing", broken)
        assert gone.undecided == SLOWER


def test_gate_new_record_is_reported_and_breaks_nothing() -> None:
    cases: tuple[dict[str, Any], ...] = ({}, {"failure": FAILURE})
    for fields in cases:
        result = gate(
            [predicted()],
            [predicted(), predicted(name=TWO, **fields)],
            parse_rules("slower:3%,failure"),
        )
        assert [pair.verdict for pair in result.pairs] == ["same", "new"]
        assert not result.broken


def test_gate_nothing_in_common_is_refused() -> None:
    with pytest.raises(UsageError, match="nothing can be compared"):
        gate([predicted()], [predicted(name=TWO)], SLOWER)


# --- Predicted ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_s", "verdict", "broken"),
    [
        (1.0, "same", False),
        (1.029, "slower", False),
        (1.03, "slower", True),
        (2.0, "slower", True),
        (0.9999, "faster", False),
        (0.5, "faster", False),
    ],
)
def test_gate_predicted_ratio_is_exact(after_s: float, verdict: str, broken: bool) -> None:
    pair = one_pair(predicted(1.0), predicted(after_s))
    ratio = pair.step.ratio
    assert ratio is not None
    assert (pair.verdict, bool(pair.broken), pair.undecided) == (verdict, broken, ())
    assert (ratio.value, ratio.low, ratio.high) == (after_s, after_s, after_s)
    assert (pair.step.signal, pair.step.step_s) == ("predicted", Change(before=1.0, after=after_s))


@pytest.mark.parametrize(("one", "other"), [("timeline-1", "timeline-2"), (None, None)])
def test_gate_unlike_or_unknown_predictors_are_not_comparable(
    one: str | None, other: str | None
) -> None:
    pair = one_pair(predicted(predictor=one), predicted(2.0, predictor=other))
    assert (pair.verdict, pair.undecided, pair.step.ratio) == ("not comparable", SLOWER, None)
    assert pair.step.reason == f"predicted by {one} before, by {other} now"


def test_gate_predictions_for_a_cpu_are_compared_only_on_the_same_peaks() -> None:
    def verdict(*peaks: dict[str, float] | None) -> str:
        before, after = (predicted(target="cpu", cpu_peaks=one) for one in peaks)
        return one_pair(before, after).verdict

    assert verdict({"float32": 1e11}, {"float32": 1e11}) == "same"
    assert verdict({"float32": 1e11}, {"float32": 2e11}) == "not comparable"
    assert verdict(None, None) == "not comparable"


@pytest.mark.parametrize("what", ["workload", "config"])
def test_gate_another_workload_or_config_is_not_comparable(what: str) -> None:
    fields: list[dict[str, Any]] = [{what: {"kind": "train", "size": size}} for size in (8, 16)]
    pair = one_pair(predicted(**fields[0]), predicted(9.0, **fields[1]))
    assert (pair.verdict, pair.broken, pair.undecided) == ("not comparable", (), SLOWER)
    assert pair.step.reason == f"they differ in {what}: size"
    assert pair.peak_bytes == Change()


# --- Measured -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("after_s", "verdict", "broken"),
    [
        (1.0, "same", False),
        (1.02, "slower", False),
        (1.035, "slower", True),
        (0.98, "faster", False),
    ],
)
def test_gate_measured_with_yardsticks_is_known_to_a_thousandth(
    after_s: float, verdict: str, broken: bool
) -> None:
    pair = one_pair(measured(1.0, yardstick_s=1e-3), measured(after_s, yardstick_s=1e-3))
    assert (pair.verdict, bool(pair.broken), pair.step.signal) == (verdict, broken, "measured")
    assert pair.undecided == ()


@pytest.mark.parametrize(("change", "verdict"), [(1.0, "same"), (1.05, "slower"), (0.95, "faster")])
@pytest.mark.parametrize("drift", [1 / 1.1, 1.1])
def test_gate_yardstick_cancels_a_drift_of_a_tenth(
    drift: float, change: float, verdict: str
) -> None:
    before = measured(1.0, yardstick_s=1e-3)
    pair = one_pair(before, measured(change * drift, yardstick_s=drift * 1e-3))
    assert pair.step.ratio is not None
    assert pair.step.ratio.value == pytest.approx(change, rel=1e-12)  # rounding only
    assert (pair.verdict, bool(pair.broken)) == (verdict, change > 1)
    assert f"yardstick {drift - 1:+.1%}" in pair.step.reason


def test_gate_what_others_took_of_the_cores_widens_the_interval() -> None:
    quiet, loaded = measured(1.0, yardstick_s=1e-3), measured(1.3, yardstick_s=1e-3)
    assert one_pair(quiet, loaded).verdict == "slower"
    measurement = {**(loaded.measurement or {}), "usage": {"others_cores": 2.0, "cores": 8}}
    busy = measured(1.3, yardstick_s=1e-3, measurement=measurement)
    # A quarter of the cores gone: a step may take 4 / 3 of its time.
    pair = one_pair(quiet, busy)
    assert (pair.verdict, pair.broken) == ("inconclusive", ())
    assert "33% left for that" in pair.step.reason


def test_session_ratio_adds_both_intervals_in_logarithms() -> None:
    steps = [[1.0, 1.1, 0.9, 1.05, 1.2], [2.0, 2.1, 1.8, 2.2, 2.05]]
    sticks = [[3.0, 3.2, 2.9, 3.1], [3.3, 3.2, 3.6, 3.5]]
    before, after = (
        {"samples_s": step, "yardstick_s": stick} for step, stick in zip(steps, sticks, strict=True)
    )
    found = session_ratio(before, after, one_compiler=True).ratio
    value, low, high = median_ratio(steps[1], steps[0])
    drift, drift_low, drift_high = median_ratio(sticks[1], sticks[0])
    assert found.value == value / drift
    up, down = (math.log(found.high / found.value), math.log(found.value / found.low))
    # A yardstick that may have slowed less makes the ratio larger. Tolerances: rounding only.
    assert up**2 == pytest.approx(
        math.log(high / value) ** 2 + math.log(drift / drift_low) ** 2, rel=1e-9
    )
    assert down**2 == pytest.approx(
        math.log(value / low) ** 2 + math.log(drift_high / drift) ** 2, rel=1e-9
    )


@pytest.mark.parametrize("sticks", [(None, None), (1.0, None), (None, 1.0), ([], []), ([1.0], 1.0)])
def test_gate_without_both_yardsticks_the_known_error_widens_the_interval(sticks: Any) -> None:
    before, after = (measured(yardstick_s=stick) for stick in sticks)
    pair = one_pair(before, after)
    value, low, high = median_ratio(steady(1.0), steady(1.0))
    ratio, error = pair.step.ratio, SIGNAL_ERROR["measured"]
    assert ratio is not None
    assert (ratio.value, ratio.low, ratio.high) == (value, low / error, high * error)
    assert (pair.verdict, pair.broken, pair.undecided) == ("inconclusive", (), SLOWER)
    assert one_pair(before, after, "slower:10%").verdict == "same"


def test_gate_without_yardsticks_a_large_change_is_still_seen() -> None:
    pair = one_pair(measured(1.0), measured(1.2))
    assert (pair.verdict, pair.broken) == ("slower", SLOWER)
    assert one_pair(measured(1.0), measured(0.8)).verdict == "faster"


def test_gate_noise_in_which_the_slow_down_could_hide_is_inconclusive_and_counted() -> None:
    noisy = [0.8, 1.3, 1.0, 0.9, 1.2, 1.1]
    before = measured(samples_s=noisy, yardstick_s=1.0)
    result = gate([before], [measured(samples_s=noisy[::-1], yardstick_s=1.0)], SLOWER)
    assert (result.count("inconclusive"), result.broken) == (1, ())
    assert result.pairs[0].undecided == SLOWER


def test_gate_surely_slower_but_not_surely_by_the_share_is_undecided() -> None:
    before = measured(samples_s=[1.0, 1.01, 0.99, 1.0, 1.005], yardstick_s=1.0)
    after = measured(samples_s=[1.02 * t for t in (1.0, 1.012, 0.992, 1.0, 1.01)], yardstick_s=1.0)
    pair = one_pair(before, after)
    ratio = pair.step.ratio
    assert ratio is not None
    assert 1 < ratio.low < ratio.value < 1.03 <= ratio.high
    assert (pair.verdict, pair.broken, pair.undecided) == ("slower", (), SLOWER)


def test_gate_few_samples_say_nothing() -> None:
    before = measured(samples_s=[1.0] * 3, yardstick_s=1.0)
    pair = one_pair(before, measured(samples_s=[2.0] * 3, yardstick_s=1.0))
    assert (pair.verdict, pair.broken) == ("inconclusive", ())
    assert pair.step.ratio is not None
    assert (pair.step.ratio.low, pair.step.ratio.high) == (0, math.inf)
    empty = one_pair(before, measured(samples_s=[]))
    assert (empty.verdict, empty.step.reason) == ("not comparable", "no step was timed now")


@pytest.mark.parametrize(
    ("step", "stick", "verdict", "broken"),
    [
        (1.05, 1.0, "slower", True),  # both readings say so
        (1.05, 1.05, "inconclusive", False),  # the machine's drift, or the compiler's change
        (1.2, 1.05, "slower", True),
        (1.0, 0.95, "inconclusive", False),
    ],
)
def test_gate_changed_compiler_makes_the_yardstick_doubtful(
    step: float, stick: float, verdict: str, broken: bool
) -> None:
    before = measured(1.0, yardstick_s=1.0, versions={"jaxlib": "1", "flax": "1"})
    after = measured(step, yardstick_s=stick, versions={"jaxlib": "2", "flax": "1"})
    pair = one_pair(before, after)
    assert (pair.verdict, bool(pair.broken)) == (verdict, broken)
    assert "by the machine or by the changed compiler" in pair.step.reason


def test_gate_changed_library_leaves_the_yardstick_what_it_was() -> None:
    before = measured(1.0, yardstick_s=1.0, versions={"jaxlib": "1", "flax": "1"})
    after = measured(1.05, yardstick_s=1.05, versions={"jaxlib": "1", "flax": "2"})
    assert one_pair(before, after).verdict == "same"


def test_gate_two_machines_are_refused_with_what_differs_and_what_to_do() -> None:
    other = {**MACHINE, "fingerprint": "bbbb", "processor": "Slow 1", "memory_bytes": 8 * 2**30}
    before, after = measured(1.0, yardstick_s=1.0), measured(1.0, environment=other)
    for signal in ("auto", "measured"):
        with pytest.raises(UsageError) as raised:
            gate([before], [after], SLOWER, signal=signal)  # type: ignore[arg-type]
        text = str(raised.value)
        assert "processor Fast 9000 before, Slow 1 now; memory 16 GiB before, 8 GiB now." in text
        assert "cores" not in text
        assert "on one machine, or compare predictions only (signal predicted)" in text


def test_gate_two_fingerprints_alone_are_refused_too() -> None:
    other = {**MACHINE, "fingerprint": "bbbb"}
    with pytest.raises(UsageError, match="fingerprint aaaa before, bbbb now"):
        gate([measured()], [measured(environment=other)], SLOWER)


def test_gate_two_machines_can_be_compared_by_prediction() -> None:
    other = {**MACHINE, "fingerprint": "bbbb"}
    before = measured(1.0, prediction=on_peaks(1.0))
    after = measured(9.0, environment=other, prediction=on_peaks(1.04))
    pair = one_pair(before, after, signal="predicted")
    assert (pair.verdict, pair.step.signal, pair.broken) == ("slower", "predicted", SLOWER)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"environment": None}, "the machine that measured now is not recorded"),
        ({"protocol": "other"}, "timed by protocol paired before, other now"),
    ],
)
def test_gate_measurements_of_unknown_machine_or_other_protocol_are_not_comparable(
    fields: dict[str, Any], reason: str
) -> None:
    pair = one_pair(measured(), measured(**fields))
    assert (pair.verdict, pair.step.reason, pair.undecided) == ("not comparable", reason, SLOWER)


# --- Pairing --------------------------------------------------------------------------------------


def test_gate_several_targets_and_layouts_are_pairs_of_their_own_the_worst_first() -> None:
    def run(**step_s: float) -> list[Record]:
        return [
            predicted(step_s["fast"], target="tpu-v5e"),
            predicted(step_s["slow"], target="tpu-v6e:4x4"),
            predicted(step_s["slow"] * 2, target="gpu-h100:8", layout="fsdp=8"),
            predicted(step_s["fast"], target="gpu-h100:8", layout="data=8"),
            measured(1.0, yardstick_s=1.0),
        ]

    result = gate(run(fast=1.0, slow=1.0), run(fast=0.9, slow=1.1), SLOWER)
    assert [(pair.target, pair.layout, pair.verdict) for pair in result.pairs] == [
        ("gpu-h100:8", "fsdp=8", "slower"),
        ("tpu-v6e:4x4", "data=1", "slower"),
        ("cpu", "data=1", "same"),
        ("gpu-h100:8", "data=8", "faster"),
        ("tpu-v5e", "data=1", "faster"),
    ]
    assert result.broken == result.pairs[:2]


def test_gate_measured_and_unmeasured_records_are_kept_apart() -> None:
    plain = predicted(target="cpu")
    result = gate([plain, measured(yardstick_s=1.0)], [measured(2.0, yardstick_s=1.0)], SLOWER)
    assert [(pair.measured, pair.verdict) for pair in result.pairs] == [
        (True, "slower"),
        (False, "missing"),
    ]
    (pair,) = gate([plain], [measured(2.0)], SLOWER, signal="predicted").pairs
    assert (pair.verdict, pair.step.reason) == (
        "not comparable",
        "predictions for a CPU rest on peaks that were measured apart for each run",
    )


def test_gate_early_failure_stands_for_measured_and_unmeasured_alike() -> None:
    baseline = [predicted(target="cpu"), measured()]
    failing = make_record(ONE, "cpu", failure=FAILURE)
    for before, verdicts in ((baseline, 2), (baseline[1:], 1)):
        result = gate(before, [failing], parse_rules("failure"))
        assert len(result.broken) == len(result.pairs) == verdicts


def test_gate_failure_after_the_prediction_is_that_of_the_measured_record() -> None:
    unmeasurable = predicted(target="cpu", failure={**FAILURE, "stage": "measure"})
    plain = predicted(target="cpu")
    result = gate([plain, measured()], [plain, unmeasurable], parse_rules("failure"))
    assert [(pair.measured, bool(pair.broken)) for pair in result.pairs] == [
        (True, True),
        (False, False),
    ]


def test_gate_last_of_several_records_counts() -> None:
    old, recent = predicted(5.0, id="old"), predicted(1.0, id="recent")
    (pair,) = gate([predicted()], [old, recent], SLOWER).pairs
    assert pair.step.step_s.after == 1.0
    (pair,) = gate([predicted()], [recent, make_record(failure=FAILURE)], SLOWER).pairs
    assert pair.step.reason.startswith("fails now")


def test_gate_signal_measured_leaves_predictions_undecided() -> None:
    pair = one_pair(predicted(), predicted(2.0), signal="measured")
    assert (pair.verdict, pair.step.reason) == ("not comparable", "not measured")
    assert pair.undecided == SLOWER


def test_gate_changed_versions_are_listed_once() -> None:
    def run(jax: str, **more: str) -> list[Record]:
        return [predicted(name=name, versions={"jax": jax, "optax": "1", **more}) for name in "ab"]

    result = gate(run("0.1"), run("0.2", libtpu="7"), SLOWER)
    assert [(one.name, one.before, one.after) for one in result.versions] == [
        ("jax", "0.1", "0.2"),
        ("libtpu", None, "7"),
    ]
    assert gate(run("0.1"), run("0.1"), SLOWER).versions == ()


# --- Reports --------------------------------------------------------------------------------------


def small_result() -> GateResult:
    """One of each kind: slower and larger, inconclusive, missing, same."""
    baseline = [
        predicted(0.010, versions={"jax": "0.1"}),
        measured(name=TWO, samples_s=[0.1] * 5),
        predicted(0.010, "net-cpu-gone"),
        predicted(0.010, target="tpu-v6e:4x4"),
    ]
    new = [
        predicted(0.0105, versions={"jax": "0.2"}, peak_bytes=3 * 2**29, hlo_sha256="other"),
        measured(name=TWO, samples_s=[0.1] * 5),
        predicted(0.010, target="tpu-v6e:4x4"),
    ]
    return gate(baseline, new, parse_rules("slower:3%,memory:10%"))


_SUMMARY = """# Gate failed: 1 of 4 break slower:3% by 1, memory:10% by 1. Undecided: slower:3% for 2, memory:10% for 1.

## Changed versions

| package | before | now |
| --- | --- | --- |
| jax | 0.1 | 0.2 |

## Before and now, the worst first

| candidate | target | layout | signal | ms before | ms now | step time | GiB now | memory | FLOPs | verdict | breaks |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| net-cpu-one | tpu-v5e | data=1 | predicted | 10 | 10.5 | +5.0% | 1.5 | +50.0% | +0.0% | slower | slower:3%, memory:10% |
| net-cpu-two | cpu | data=1 | measured | 100 | 100 | +0.0% (-4.8% to +5.0%) | 1 | +0.0% | +0.0% | inconclusive: no yardstick, 5% left for drift; same program |  |
| net-cpu-gone | tpu-v5e | data=1 | - | - | - | - | - | - | - | missing: the new run has no record of it |  |
| net-cpu-one | tpu-v6e:4x4 | data=1 | predicted | 10 | 10 | +0.0% | 1 | +0.0% | +0.0% | same: same program |  |

Step time: change, with its interval where it was measured. Memory: peak of one device. FLOPs: of the compiled program, one device.

## Rules

| rule | broken by | undecided for | kept by |
| --- | --- | --- | --- |
| slower:3% | 1 | 2 | 1 |
| memory:10% | 1 | 1 | 2 |

Of 4: 1 slower, 1 inconclusive, 1 missing, 1 same. Inconclusive: the interval holds no change as well as the slow-down looked for.
"""  # noqa: E501


def test_render_summary_is_the_golden_text() -> None:
    assert render_summary(small_result()) == _SUMMARY


def test_gate_tables_have_rows_as_wide_as_their_header() -> None:
    tables = gate_tables(small_result())
    assert [len(table.rows) for table in tables] == [1, 4, 2]
    for table in tables:
        assert {len(row) for row in table.rows} == {len(table.header)}


def test_headline_of_a_passed_gate_names_its_rules_and_what_it_left_open() -> None:
    passed = gate([predicted()], [predicted()], parse_rules("slower:3%,failure"))
    assert headline(passed) == "Gate passed: none of 1 breaks slower:3%, failure."
    blind = gate([predicted(predictor="a")], [predicted(predictor="b")], SLOWER)
    assert headline(blind) == (
        "Gate passed, but nothing was decided about any of 1. Undecided: slower:3% for 1."
    )


def test_render_summary_open_interval_and_pipe_in_a_failure_are_readable() -> None:
    few = measured(samples_s=[1.0])
    failed = make_record(TWO, failure={**FAILURE, "text": "a | b"})
    page = render_summary(gate([few, predicted(name=TWO)], [few, failed], SLOWER))
    assert "+0.0% (unknown)" in page
    assert "a \\| b" in page
    assert "inf" not in page
    assert "nan" not in page


def test_to_json_says_what_scripts_ask_for() -> None:
    values = json.loads(json.dumps(small_result().to_json()))
    assert (values["passed"], values["rules"]) == (False, ["slower:3%", "memory:10%"])
    assert values["verdicts"]["inconclusive"] == 1
    worst = values["pairs"][0]
    assert worst["broken"] == ["slower:3%", "memory:10%"]
    assert worst["step"]["ratio"]["value"] == pytest.approx(1.05, rel=1e-12)  # rounding only
    assert worst["peak_bytes"] == {"before": 2**30, "after": 3 * 2**29}
