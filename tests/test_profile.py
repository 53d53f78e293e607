"""Predicted profiles, read back by others: JAX, XProf's converters, any JSON reader."""

import gzip
import json
import math

import pytest
from jax.profiler import ProfileData
from xprof.convert import raw_to_tool_data

from jaxbench.cost import Loop, OpCost, Wait
from jaxbench.predict.schedule import simulate
from jaxbench.report import perfetto, xspace
from jaxbench.report.perfetto import write_trace
from jaxbench.report.xspace import category, write_xspace
from jaxbench.target import parse_target

TARGET = parse_target("tpu-v5p:2x2x1")
LAYERS = 8
FLOPS = 459_000_000_000  # a millisecond at the peak
SECONDS = {"gather": 3e-3, "forward": 2e-3, "backward": 4e-3, "copy": 1e-3}


def op(name: str, scope: str = "", **fields) -> OpCost:
    return OpCost(name=name, opcode=fields.pop("opcode", "fusion"), scope=scope, **fields)


@pytest.fixture(scope="module")
def timeline():
    gather = op(
        "gather", opcode="all-gather", collective="all-gather", stream="collective", starts="g"
    )
    product = {"flops": (("bf16", FLOPS),), "matmul_flops": FLOPS, "hbm_bytes": 1_000_000}
    forward = op("forward", "jvp(net)/layer/mlp", **product)
    backward = op("backward", "transpose(jvp(net))/layer/mlp", **product)
    copy = op("copy", opcode="copy", hbm_bytes=2_000_000)
    steps = (
        copy,
        Loop(trips=LAYERS, steps=(gather, forward, Wait(token="g"))),
        Loop(trips=LAYERS, steps=(backward,)),
    )
    return simulate(steps, lambda one: SECONDS[one.name])


@pytest.fixture(scope="module")
def profile(timeline, tmp_path_factory):
    return write_xspace(timeline, name="net", target=TARGET, logdir=tmp_path_factory.mktemp("log"))


def test_profile_lies_where_xprof_looks(profile) -> None:
    assert profile.parts[-4:-2] == ("plugins", "profile")
    assert profile.name.endswith(".xplane.pb")


def test_profile_has_every_execution_at_its_time(timeline, profile) -> None:
    data = ProfileData.from_file(str(profile))
    plane = next(plane for plane in data.planes if plane.name.startswith("/device:TPU"))
    lines = {line.name: list(line.events) for line in plane.lines}
    names = [event.name for event in lines["XLA Ops"]]
    assert names == ["%copy"] + ["%forward"] * LAYERS + ["%backward"] * LAYERS
    total_s = sum(event.duration_ns for event in lines["XLA Ops"]) / 1e9
    assert total_s == pytest.approx(1e-3 + LAYERS * 6e-3)
    gathers = lines["Async XLA Ops"]
    assert len(gathers) == LAYERS
    # Each gather outlasts the product beside it; the next one starts when it is waited for.
    assert gathers[1].start_ns - gathers[0].start_ns == pytest.approx(3e6)
    (step,) = lines["Steps"]
    assert step.duration_ns / 1e9 == pytest.approx(timeline.step_s)
    scopes = {event.name for event in lines["Framework Name Scope"]}
    assert scopes == {"jvp(net)/layer/mlp", "transpose(jvp(net))/layer/mlp"}


def convert(profile, tool):
    data, _ = raw_to_tool_data.xspace_to_tool_data([str(profile)], tool, {})
    return json.loads(data)


def column(table, name):
    index = [col["id"] for col in table["cols"]].index(name)
    return [row["c"][index]["v"] for row in table["rows"]]


def test_xprofs_op_statistics_are_those_of_the_timeline(profile) -> None:
    table = convert(profile, "hlo_stats")
    times_us = dict(
        zip(column(table, "hlo_op_name"), column(table, "total_self_time"), strict=True)
    )
    assert times_us["forward"] == pytest.approx(LAYERS * 2e3)
    assert times_us["backward"] == pytest.approx(LAYERS * 4e3)
    counts = dict(zip(column(table, "hlo_op_name"), column(table, "occurrences"), strict=True))
    assert counts["forward"] == LAYERS
    categories = dict(zip(column(table, "hlo_op_name"), column(table, "category"), strict=True))
    assert categories["forward"] == "convolution fusion"


def test_xprofs_roofline_has_the_chips_peak(profile) -> None:
    table, *_ = convert(profile, "roofline_model")
    assert float(table["p"]["peak_flop_rate"]) == pytest.approx(459_000, rel=1e-3)  # GFLOP/s
    assert float(table["p"]["peak_hbm_bw"]) == pytest.approx(2765e9 / 2**30, rel=0.08)


def test_xprofs_op_profile_adds_up_to_the_step(timeline, profile) -> None:
    root = convert(profile, "op_profile")["byProgram"]
    assert root["metrics"]["rawTime"] == pytest.approx(timeline.step_s * 1e12, rel=1e-6)
    assert root["metrics"]["rawFlops"] == pytest.approx(2 * LAYERS * FLOPS, rel=1e-3)


def test_xprofs_trace_viewer_shows_every_line(profile) -> None:
    events = convert(profile, "trace_viewer")["traceEvents"]
    names = {event["args"]["name"] for event in events if event.get("name") == "thread_name"}
    assert {"Steps", "XLA Modules", "XLA Ops", "Async XLA Ops"} <= names


def test_trace_for_perfetto_has_the_same_slices(timeline, tmp_path) -> None:
    path = write_trace(timeline, name="net", path=tmp_path / "net.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert sum(event["name"] == "forward" for event in slices) == LAYERS
    assert max(event["ts"] + event["dur"] for event in slices) == pytest.approx(
        timeline.step_s * 1e6
    )
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {"compute", "collective", "module"} <= tracks
    assert all(math.isfinite(event["dur"]) for event in slices)


def test_long_loops_are_cut_and_it_is_said(monkeypatch, tmp_path) -> None:
    for module in (xspace, perfetto):
        monkeypatch.setattr(module, "MAX_EVENTS", 10)
    loop = Loop(trips=1000, steps=(op("forward"),))
    timeline = simulate([loop], lambda one: SECONDS[one.name])
    path = write_xspace(timeline, name="net", target=TARGET, logdir=tmp_path)
    (plane,) = ProfileData.from_file(str(path)).planes
    lines = {line.name: list(line.events) for line in plane.lines}
    assert len(lines["XLA Ops"]) == 10
    assert "first 10 iterations" in lines["XLA Modules"][0].name


def test_category_of_an_op_is_xprofs() -> None:
    assert category(op("a", collective="all-reduce")) == "all-reduce"
    assert category(op("a", matmul_flops=1)) == "convolution fusion"
    assert category(op("a")) == "loop fusion"
    assert category(op("a", opcode="copy")) == "copy"
