"""Measured ops joined with their cost: what is unknown or unseen stays, passes and modules."""

import json

import pytest

from jaxbench.cost import Cost, Loop, OpCost
from jaxbench.ops import BETWEEN, StepOps, join_ops, list_ops, module_path, pass_of
from jaxbench.predict import predict_ops
from jaxbench.report.ops import format_seconds, ops_tables
from jaxbench.target import parse_target
from jaxbench.trace import MeasuredOp, MeasuredStep

PEAKS = {"float32": 1e9, "bfloat16": 1e9, "bytes_per_s": 1e9}
CPU = parse_target("cpu")


def cost_of(name: str, scope: str, opcode: str = "fusion", **fields) -> OpCost:
    return OpCost(name=name, opcode=opcode, scope=scope, **fields)


PRODUCT = {
    "flops": (("f32", 4_000_000),),
    "matmul_flops": 4_000_000,
    "padded_flops": 4_000_000,
    "product_dtype": "f32",
}
COST = Cost(
    steps=(
        cost_of("dot.1", "jvp(net)/layer/mlp", "dot", **PRODUCT),
        Loop(
            trips=3,
            steps=(cost_of("fusion.2", "transpose(jvp(net))/layer/mlp", hbm_bytes=1_000_000),),
        ),
        cost_of("fusion.3", "optimizer", hbm_bytes=500_000),
        cost_of("fusion.4", "", hbm_bytes=1),
    )
)


def measured(**seconds: float) -> MeasuredStep:
    ops = tuple(
        MeasuredOp(name=name, num_executions=1.0, samples_s=(one,)) for name, one in seconds.items()
    )
    return MeasuredStep(
        module="jit_train", platform="CPU", ops=ops, step_samples_s=(30e-3,), num_dropped=1
    )


@pytest.fixture
def found() -> StepOps:
    listed = list_ops(predict_ops(COST, CPU, cpu_peaks=PEAKS))
    seconds = {"dot.1": 8e-3, "fusion.2": 12e-3, "fusion.3": 1e-3, "while.9": 4e-3}
    return join_ops(measured(**seconds), listed)


def test_ops_are_predicted_one_execution_at_a_time() -> None:
    found = predict_ops(COST, CPU, cpu_peaks=PEAKS)
    assert [(op.name, op.count, seconds, bound) for op, seconds, bound in found] == [
        ("dot.1", 1, 4e-3, "compute"),
        ("fusion.2", 3, 1e-3, "memory"),
        ("fusion.3", 1, 5e-4, "memory"),
        ("fusion.4", 1, 1e-9, "memory"),
    ]


def test_joined_rows_hold_both_times_and_their_rates(found) -> None:
    rows = {row.name: row for row in found.rows}
    assert rows["fusion.2"].predicted_s == pytest.approx(3e-3)
    assert rows["fusion.2"].ratio == pytest.approx(4.0)
    assert rows["fusion.2"].bytes_per_s == pytest.approx(3_000_000 / 12e-3)
    assert rows["dot.1"].flops_per_s == pytest.approx(4_000_000 / 8e-3)
    assert found.share(rows["fusion.2"]) == pytest.approx(0.4)
    assert [row.name for row in found.rows[:2]] == ["fusion.2", "dot.1"]


def test_nothing_is_dropped_and_all_adds_up(found) -> None:
    assert [(row.name, row.opcode) for row in found.without_cost] == [("while.9", "while")]
    assert [row.name for row in found.not_seen] == ["fusion.4"]
    assert found.between_s == pytest.approx(5e-3)
    assert found.busy_s + found.between_s == pytest.approx(found.step_s)


def test_groups_add_up_to_the_step(found) -> None:
    passes = {group.name: group.measured_s for group in found.by_pass()}
    assert passes == {
        "backward": 12e-3,
        "forward": 8e-3,
        "optimizer": 1e-3,
        "unknown": 4e-3,
        BETWEEN: pytest.approx(5e-3),
    }
    modules = {group.name: group.measured_s for group in found.by_module(2)}
    assert modules["net/layer"] == pytest.approx(20e-3)
    assert sum(modules.values()) == pytest.approx(found.step_s)
    assert {"net/layer/mlp", "optimizer"} <= {group.name for group in found.by_module(3)}


def test_ops_of_one_name_are_one_row() -> None:
    twice = Cost(steps=(COST.steps[1], cost_of("fusion.2", "", hbm_bytes=1_000_000)))
    row, between = list_ops(predict_ops(twice, CPU, cpu_peaks=PEAKS))
    assert (row.num_executions, row.hbm_bytes) == (4, 4_000_000)
    assert row.predicted_s == pytest.approx(4e-3)
    assert (between.name, between.num_executions) == (BETWEEN, 4)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("jvp(net)/layer/mlp", "forward"),
        ("layer/attention", "forward"),
        ("transpose(jvp(net))/layer/mlp", "backward"),
        ("jit(train)/transpose(jvp(net))/checkpoint/rematted_computation/mlp/dot", "backward"),
        ("jvp(net)/rematted_computation/mlp/dot_general", "backward"),
        ("jvp(net)/transpose/reshape", "forward"),
        ("jit(train)/optimizer/mul", "optimizer"),
        ("optimizer", "optimizer"),
        ("", "unknown"),
    ],
)
def test_pass_follows_from_the_scope(name: str, expected: str) -> None:
    assert pass_of(name) == expected


def test_modules_of_both_passes_have_one_path() -> None:
    assert module_path("transpose(jvp(net))/layer/mlp") == ["net", "layer", "mlp"]
    assert module_path("jvp(net)/layer/mlp") == ["net", "layer", "mlp"]
    assert module_path("jvp()") == []


def test_step_ops_survive_json(found) -> None:
    assert StepOps.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_tables_say_how_far_the_ops_add_up(found) -> None:
    passes, modules, ops = ops_tables(found, top=3)
    assert all(
        len(row) == len(table.header) for table in (passes, modules, ops) for row in table.rows
    )
    assert passes.rows[-1][:3] == ("all ops and between", "30 ms", "100.0%")
    assert ops.rows[0][0] == "fusion.2"
    assert len(ops.rows) == 3
    text = " ".join(ops.notes)
    assert "Ops 25 ms and between them 5 ms: 0.0% off the step of 30 ms" in text
    assert "without a cost: while.9." in text
    assert "never seen: fusion.4." in text


def test_seconds_are_written_with_the_unit_that_fits() -> None:
    texts = [format_seconds(one) for one in (1.5, 2.5e-3, 450e-6, 0.0)]
    assert texts == ["1.5 s", "2.5 ms", "450 us", "0 us"]
