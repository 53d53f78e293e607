"""Calibrations that find planted constants, and that say what they are where they are used."""

import json
import random
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jaxbench.cost import price_module
from jaxbench.errors import UsageError
from jaxbench.hlo import read_module
from jaxbench.ops import BETWEEN, OpRow, StepOps, list_ops
from jaxbench.ops.calibration import (
    MIN_SAMPLES,
    Calibration,
    Sample,
    calibrate_prediction,
    calibrate_rows,
    fit_calibration,
    held_out,
    keep_calibration,
    load_calibration,
)
from jaxbench.ops.opclass import broader, classify_ops, product_flops
from jaxbench.predict import predict_ops, predict_step
from jaxbench.target import parse_target

# Planted (seconds per execution, per FLOP, per byte).
PLANTED = {
    "product f32 large, library": (5e-6, 1e-11, 0.0),
    "elementwise": (1e-6, 0.0, 2e-10),
    "transpose": (2e-6, 0.0, 8e-10),
}
RARE = "sort"
PEAKS = {"float32": 1e11, "bfloat16": 1e11, "bytes_per_s": 1e10}


def planted_row(name: str, op_class: str, source: random.Random, noise: float) -> OpRow:
    start_s, flop_s, byte_s = PLANTED[op_class]
    count, flops, size = source.randint(1, 20), source.randint(0, 10**7), source.randint(1, 10**6)
    seconds = count * start_s + flops * flop_s + size * byte_s
    return OpRow(
        name=name,
        opcode="fusion",
        op_class=op_class,
        num_executions=count,
        flops=flops,
        hbm_bytes=size,
        predicted_s=size / 1e10,
        measured_s=seconds * source.uniform(1 - noise, 1 + noise),
    )


def planted_samples(num: int, noise: float = 0.0) -> list[Sample]:
    source = random.Random(0)
    samples = []
    for number in range(num):
        rows = [
            planted_row(f"{op_class}.{n}", op_class, source, noise)
            for op_class in PLANTED
            for n in range(source.randint(5, 60))
        ]
        rare = OpRow(name="sort.1", opcode="sort", op_class=RARE, predicted_s=1e-6, measured_s=3e-6)
        ops = StepOps(
            rows=(*rows, rare),
            step_s=sum(row.measured_s or 0.0 for row in (*rows, rare)),
            num_steps=5,
            num_dropped=1,
            platform="CPU",
            module="jit_train",
        )
        samples.append(Sample(name=f"net-cpu-{number}", ops=ops))
    return samples


def test_planted_constants_are_found() -> None:
    laws = {law.op_class: law for law in fit_calibration(planted_samples(4), fingerprint="f").laws}
    for op_class, constants in PLANTED.items():
        law = laws[op_class]
        # The solver's tolerance; constants that were not planted are nothing beside the others.
        found = (law.start_s, law.flop_s, law.byte_s)
        assert found == pytest.approx(constants, rel=1e-6, abs=1e-18)
        assert law.num_samples >= 4 * 5


def test_class_totals_are_met_under_noise() -> None:
    samples = planted_samples(8, noise=0.5)
    calibration = fit_calibration(samples, fingerprint="f")
    for op_class in PLANTED:
        # The condition of the fit: what is predicted of each step's share is what was measured.
        measured = predicted = 0.0
        for sample in samples:
            rows = [row for row in sample.ops.rows if row.op_class == op_class]
            measured += sum(row.measured_s or 0.0 for row in rows) / sample.ops.step_s
            predicted += sum(map(calibration.seconds, rows)) / sample.ops.step_s
        assert predicted == pytest.approx(measured, rel=1e-2)


def test_rare_classes_take_the_roofline_times_the_median_ratio() -> None:
    samples = planted_samples(MIN_SAMPLES - 1)
    calibration = fit_calibration(samples, fingerprint="f")
    row = samples[0].ops.rows[-1]
    assert row.op_class == RARE
    assert calibration.law_of(row) is None
    assert calibration.seconds(row) == pytest.approx(1e-6 * calibration.default_ratio)


def test_classes_with_few_samples_take_the_law_of_their_broader_class() -> None:
    calibration = fit_calibration(planted_samples(4), fingerprint="f")
    other = OpRow(name="a", opcode="b", op_class="product s8 small, library", flops=10**6)
    law = calibration.law_of(other)
    assert law is not None
    assert law.op_class == "any product, library"
    start_s, flop_s, _ = PLANTED["product f32 large, library"]
    assert calibration.seconds(other) == pytest.approx(start_s + 1e6 * flop_s)


def test_held_out_half_is_predicted_better_than_by_the_roofline() -> None:
    found = held_out(planted_samples(8, noise=0.2))
    assert len(found.fitted_on) == 4
    assert not {name for name, _ in found.after.ratios} & set(found.fitted_on)
    # Noise of 20 % in each of a hundred ops leaves about 2 % in their sum.
    assert found.after.median < 0.05 < found.before.median
    assert found.after.tau == pytest.approx(1.0)
    assert "Kendall's tau" in found.describe()


def test_what_the_profiler_takes_is_not_between_the_ops() -> None:
    (sample,) = planted_samples(1)
    between = OpRow(name=BETWEEN, opcode="", num_executions=100, measured_s=5e-3)
    ops = replace(sample.ops, rows=(*sample.ops.rows, between), step_s=sample.ops.step_s + 5e-3)
    plain = Sample(name="net", ops=ops, plain_step_s=ops.step_s - 3e-3)
    found = {row.name: row.measured_s for row in plain.rows}
    assert found[BETWEEN] == pytest.approx(2e-3)
    assert sum(filter(None, found.values())) == pytest.approx(plain.step_s)


def test_one_candidate_cannot_be_halved() -> None:
    with pytest.raises(UsageError, match="Measure two or more"):
        held_out(planted_samples(1))


def test_nothing_measured_is_no_calibration() -> None:
    with pytest.raises(UsageError, match="No op was measured"):
        fit_calibration([], fingerprint="f")


def test_calibration_is_kept_for_its_machine_and_compiler() -> None:
    calibration = fit_calibration(planted_samples(2), fingerprint="this", jaxlib="1.2.3")
    assert Calibration.from_json(json.loads(json.dumps(calibration.to_json()))) == calibration
    keep_calibration(calibration)
    assert load_calibration("this", "1.2.3") == calibration
    assert load_calibration("this", "1.2.4") is None
    assert load_calibration("other", "1.2.3") is None


# --- On a real program ----------------------------------------------------------------------------


def step(x, w, tokens):
    h = jnp.take(w, tokens, axis=0) + jnp.tanh(x @ w)
    h, _ = jax.lax.scan(lambda c, _: (jnp.sin(c @ w).T, None), h, None, length=3)
    return jnp.sort(h), h.sum()


@pytest.fixture(scope="module")
def module():
    shapes = (jnp.ones((256, 256)), jnp.ones((256, 256)), jnp.zeros(256, jnp.int32))
    executable = jax.jit(step).lower(*shapes).compile().runtime_executable()
    assert executable is not None
    (hlo,) = executable.hlo_modules()
    return read_module(hlo.as_serialized_hlo_module_proto())


def test_ops_of_a_real_program_have_their_classes(module) -> None:
    classes = classify_ops(module)
    kinds = set(classes.values())
    assert {"loop overhead", "sort"} <= kinds
    assert any(kind.startswith("product f32 large") for kind in kinds)
    assert not any(kind.startswith("convolution") for kind in kinds)
    products = [op for op in module.entry.ops if classes[op.name].startswith("product")]
    assert {product_flops(op) for op in products} == {2 * 256**3}


def test_loops_have_their_iterations_as_rows(module) -> None:
    cost = price_module(module)
    rows = list_ops(predict_ops(cost, parse_target("cpu"), cpu_peaks=PEAKS), module)
    (loop,) = (row for row in rows if row.opcode == "while")
    assert (loop.num_executions, loop.predicted_s) == (3, None)
    assert rows[-1].op_class == "between ops"


def test_calibrated_prediction_says_what_it_is(module) -> None:
    cost, target = price_module(module), parse_target("cpu")
    rows = list_ops(predict_ops(cost, target, cpu_peaks=PEAKS), module)
    plain = predict_step(cost, target, model_flops=1e6, dtype="float32", cpu_peaks=PEAKS)
    calibration = fit_calibration(planted_samples(4), fingerprint="this", jaxlib="1.2.3")
    found = calibrate_prediction(plain, rows, calibration)
    assert found.step_s == pytest.approx(sum(map(calibration.seconds, rows)))
    assert found.high_s / found.step_s == pytest.approx(plain.high_s / plain.step_s)
    assert sum(seconds for _, seconds in found.terms) == pytest.approx(found.step_s)
    assert found.hlo_s == plain.hlo_s
    assert "calibrated" in found.status
    assert "jaxlib 1.2.3, 4 steps measured on this" in found.built_from
    calibrated = {row.name: row.predicted_s for row in calibrate_rows(rows, calibration)}
    assert sum(filter(None, calibrated.values())) == pytest.approx(found.step_s)


@pytest.mark.parametrize(
    ("op_class", "expected"),
    [
        ("product bf16 large, library", "any product, library"),
        ("convolution input gradient, grouped, XLA", "any convolution, grouped, XLA"),
        ("convolution forward, XLA", "any convolution, XLA"),
        ("reduction, XLA", "any reduction, XLA"),
        ("elementwise", "XLA's loops"),
        ("sort", ""),
        ("between ops", ""),
    ],
)
def test_broader_classes(op_class: str, expected: str) -> None:
    assert broader(op_class) == expected


def test_grouped_convolutions_are_apart_from_plain_ones() -> None:
    def convolve(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", feature_group_count=8, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (jnp.ones((2, 8, 8, 8)), jnp.ones((3, 3, 1, 8)))
    executable = jax.jit(convolve).lower(*shapes).compile().runtime_executable()
    assert executable is not None
    (hlo,) = executable.hlo_modules()
    classes = set(classify_ops(read_module(hlo.as_serialized_hlo_module_proto())).values())
    assert any(one.startswith("convolution forward, grouped") for one in classes)
