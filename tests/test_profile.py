"""Predicted profiles, read back by others: JAX, XProf's converters, any JSON reader."""

import gzip
import itertools
import json
import math
from collections import Counter

import pytest
from jax.profiler import ProfileData
from xprof.convert import raw_to_tool_data

from jaxbench.cost import Loop, OpCost, Wait
from jaxbench.predict.schedule import simulate
from jaxbench.report import perfetto, xspace
from jaxbench.report.executions import category, expand, find_waits, iteration_limit
from jaxbench.report.perfetto import write_trace
from jaxbench.report.xspace import write_xspace
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


def lines_of(path):
    (plane,) = ProfileData.from_file(str(path)).planes
    return {line.name: list(line.events) for line in plane.lines}


def test_profile_has_every_execution_at_its_time(timeline, profile) -> None:
    lines = lines_of(profile)
    ops = [event for event in lines["XLA Ops"] if not event.name.startswith("%wait")]
    names = [event.name for event in ops]
    assert names == ["%copy"] + ["%forward"] * LAYERS + ["%backward"] * LAYERS
    assert sum(event.duration_ns for event in ops) / 1e9 == pytest.approx(1e-3 + LAYERS * 6e-3)
    gathers = lines["Collectives"]
    assert len(gathers) == LAYERS
    # Each gather outlasts the product beside it; the next one starts when it is waited for.
    assert gathers[1].start_ns - gathers[0].start_ns == pytest.approx(3e6)
    (step,) = lines["Steps"]
    assert step.duration_ns / 1e9 == pytest.approx(timeline.step_s)


def test_waits_fill_the_time_that_the_core_stands_still(timeline, profile) -> None:
    events = lines_of(profile)["XLA Ops"]
    waits = [event for event in events if event.name == "%wait for gather"]
    exposed_s = dict(timeline.exposed_s)["collective"]
    assert sum(event.duration_ns for event in waits) / 1e9 == pytest.approx(exposed_s)
    assert sum(event.duration_ns for event in events) / 1e9 == pytest.approx(timeline.step_s)


def convert(profile, tool, **options):
    data, _ = raw_to_tool_data.xspace_to_tool_data([str(profile)], tool, options)
    return json.loads(data)


def column(table, name):
    index = [col["id"] for col in table["cols"]].index(name)
    return [row["c"][index]["v"] for row in table["rows"]]


def test_xprofs_op_statistics_are_those_of_the_timeline(timeline, profile) -> None:
    table = convert(profile, "hlo_stats")
    rows = {
        name: dict(zip(("time_us", "count", "category", "gflops_per_s"), row, strict=True))
        for name, *row in zip(
            column(table, "hlo_op_name"),
            column(table, "total_self_time"),
            column(table, "occurrences"),
            column(table, "category"),
            column(table, "model_flop_rate"),
            strict=True,
        )
    }
    assert rows["forward"]["time_us"] == pytest.approx(LAYERS * 2e3)
    assert rows["backward"]["time_us"] == pytest.approx(LAYERS * 4e3)
    assert rows["forward"]["count"] == LAYERS
    assert rows["forward"]["category"] == "convolution fusion"
    assert rows["forward"]["gflops_per_s"] == pytest.approx(FLOPS / 2e-3 / 1e9)
    assert rows["wait for gather"]["category"] == "all-gather-wait"
    assert sum(row["time_us"] for row in rows.values()) == pytest.approx(timeline.step_s * 1e6)


def test_xprofs_roofline_has_the_chips_peak(profile) -> None:
    table, *_ = convert(profile, "roofline_model")
    # XProf writes six digits.
    assert float(table["p"]["peak_flop_rate"]) == pytest.approx(459_000, rel=1e-5)  # GFLOP/s
    assert float(table["p"]["peak_hbm_bw"]) == pytest.approx(2765e9 / 2**30, rel=1e-5)


def test_xprofs_op_profile_adds_up_to_the_step(timeline, profile) -> None:
    metrics = convert(profile, "op_profile")["byProgram"]["metrics"]
    assert metrics["rawTime"] == pytest.approx(timeline.step_s * 1e12)
    assert metrics["rawFlops"] == 2 * LAYERS * FLOPS
    on_core = 2 * LAYERS * 1_000_000 + 2_000_000
    assert metrics["rawBytesAccessedArray"][0] == pytest.approx(on_core)
    assert metrics["bandwidthUtils"][0] == pytest.approx(on_core / timeline.step_s / 2765e9)


def test_xprofs_op_profile_parts_forward_and_backward(profile) -> None:
    root = convert(profile, "op_profile", group_by="provenance")["byProvenance"]
    (program,) = (node for node in root["children"] if node["name"] != "IDLE")
    times_ps = {node["name"]: node["metrics"]["rawTime"] for node in program["children"]}
    assert times_ps["jvp(net)"] == pytest.approx(LAYERS * 2e9)
    assert times_ps["transpose(jvp(net))"] == pytest.approx(LAYERS * 4e9)


def test_xprofs_trace_viewer_shows_events_on_every_line(profile) -> None:
    events = convert(profile, "trace_viewer")["traceEvents"]
    names = {
        event["tid"]: event["args"]["name"]
        for event in events
        if event.get("name") == "thread_name"
    }
    counts = Counter(names[event["tid"]] for event in events if event.get("ph") == "X")
    assert counts["XLA Modules"] == 1
    assert counts["Collectives"] == LAYERS
    assert counts["XLA Ops"] == 1 + 3 * LAYERS  # copy, forward, backward and the waits for gathers
    scopes = {
        event["name"] for event in events if names.get(event.get("tid")) == "Framework Name Scope"
    }
    assert {"jvp(net)", "transpose(jvp(net))", "mlp"} <= scopes


def test_gpus_have_their_own_peaks(timeline, tmp_path) -> None:
    path = write_xspace(timeline, name="net", target=parse_target("gpu-h100"), logdir=tmp_path)
    table, *_ = convert(path, "roofline_model")
    assert float(table["p"]["peak_flop_rate"]) == pytest.approx(989_400, rel=1e-5)
    assert column(convert(path, "hlo_stats"), "hlo_op_name")


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


def test_trace_nests_module_scopes(timeline, tmp_path) -> None:
    path = write_trace(timeline, name="net", path=tmp_path / "net.json")
    events = json.loads(path.read_text())["traceEvents"]
    (module,) = (e["tid"] for e in events if e.get("args", {}).get("name") == "module")
    scopes = [e for e in events if e["ph"] == "X" and e["tid"] == module]
    assert Counter(e["name"] for e in scopes) == {
        "jvp(net)": 1, "transpose(jvp(net))": 1, "layer": 2, "mlp": 2
    }  # fmt: skip
    first, second = (e for e in scopes if "net" in e["name"])
    assert first["ts"] + first["dur"] <= second["ts"]


@pytest.fixture(scope="module")
def nested():
    """Two equal nests of loops one after the other, with a gather beside the inner ones."""
    gather = op(
        "gather", opcode="all-gather", collective="all-gather", stream="collective", starts="g"
    )
    product = {"flops": (("bf16", FLOPS),), "matmul_flops": FLOPS, "hbm_bytes": 1_000_003}
    inner = Loop(trips=30, steps=(op("forward", "net/inner", **product),))
    outer = Loop(trips=40, steps=(gather, inner, Wait(token="g"), op("copy", opcode="copy")))
    return simulate((outer, outer), lambda one: SECONDS[one.name])


@pytest.mark.parametrize("bound", [50, 200, 1000])
def test_merged_loops_keep_the_totals_of_the_step(nested, bound, monkeypatch, tmp_path) -> None:
    for module in (xspace, perfetto):
        monkeypatch.setattr(module, "MAX_EVENTS", bound)
    path = write_xspace(nested, name="net", target=TARGET, logdir=tmp_path)
    lines = lines_of(path)
    names = ("XLA Ops", "Collectives")
    assert sum(len(lines[name]) for name in names) <= bound
    assert "loops merged to" in lines["XLA Modules"][0].name
    assert any(" x" in event.name for event in lines["XLA Ops"])
    # JAX's reader cuts each event to whole nanoseconds.
    gathers = lines["Collectives"]
    gathers_ns = sum(event.duration_ns for event in gathers)
    assert gathers_ns == pytest.approx(80 * 3e6, abs=len(gathers))
    root = convert(path, "op_profile")["byProgram"]
    busy_ps = sum(n["metrics"]["rawTime"] for n in root["children"] if n["name"] != "IDLE")
    # Two picoseconds for the rounding of each event.
    assert busy_ps == pytest.approx(nested.step_s * 1e12, abs=2 * bound)
    metrics = root["metrics"]
    # Figures of one event are whole numbers.
    assert metrics["rawFlops"] == pytest.approx(2 * 40 * 30 * FLOPS, rel=1e-6)
    assert metrics["rawBytesAccessedArray"][0] == pytest.approx(2 * 40 * 30 * 1_000_003, rel=1e-6)
    trace = write_trace(nested, name="net", path=tmp_path / "net.json")
    slices = [e for e in json.loads(trace.read_text())["traceEvents"] if e["ph"] == "X"]
    merged = [e for e in slices if e["name"].startswith("forward")]
    assert sum(e["dur"] for e in merged) == pytest.approx(2400 * 2e3)
    assert sum(e["args"]["flops"] for e in merged) == pytest.approx(2400 * FLOPS)


def test_merged_loops_do_not_overlap(nested) -> None:
    limit = iteration_limit(nested, 200)
    compute = [one for one in expand(nested, limit) if one.event.stream == "compute"]
    spans = sorted(span for one in compute for span in zip(one.starts_ps, one.ends_ps, strict=True))
    # Starts and ends are rounded to picoseconds apart.
    assert all(end <= start + 2 for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == pytest.approx(nested.step_s * 1e12, abs=2)


def test_iteration_limit_holds_for_nested_loops(nested) -> None:
    executions = sum(event.count for event in nested.events)
    assert iteration_limit(nested, executions) is None
    assert expand(nested, None)[0].merged == 1
    for bound in (50, 200, executions - 1):
        limit = iteration_limit(nested, bound)
        assert sum(len(one.starts_ps) for one in expand(nested, limit)) <= bound


def test_a_queue_of_collectives_is_waited_for_one_by_one() -> None:
    first, second = (
        op(name, opcode="all-reduce", collective="all-reduce", stream="collective")
        for name in ("first", "second")
    )
    seconds = {"first": 1e-3, "second": 2e-3, "work": 5e-3}
    timeline = simulate((op("work"), first, second), lambda one: seconds[one.name])
    waits = {
        wait.title: int((wait.ends_ps - wait.starts_ps).sum())
        for wait in find_waits(expand(timeline, None), timeline.step_s)
    }
    assert waits == {"wait for first": 10**9, "wait for second": 2 * 10**9}


def test_ops_of_one_name_keep_their_own_figures(tmp_path) -> None:
    same = [op("fusion", hbm_bytes=size, flops=(("f32", 1),)) for size in (1_000_000, 3_000_000)]
    timeline = simulate(same, lambda one: 1e-3)
    path = write_xspace(timeline, name="net", target=TARGET, logdir=tmp_path)
    assert {event.name for event in lines_of(path)["XLA Ops"]} == {"%fusion", "%fusion #2"}
    metrics = convert(path, "op_profile")["byProgram"]["metrics"]
    assert metrics["rawBytesAccessedArray"][0] == pytest.approx(4_000_000)


def test_all_flops_of_a_fusion_count_not_just_those_of_its_product(tmp_path) -> None:
    fusion = op("fusion", flops=(("bf16", 3_000_000), ("f32", 1_000_000)), matmul_flops=3_000_000)
    timeline = simulate([fusion], lambda one: 1e-3)
    path = write_xspace(timeline, name="net", target=TARGET, logdir=tmp_path)
    assert convert(path, "op_profile")["byProgram"]["metrics"]["rawFlops"] == 4_000_000


def test_what_stays_on_the_chip_is_no_memory_traffic(tmp_path) -> None:
    timeline = simulate([op("fusion", moved_bytes=1_000_000)], lambda one: 1e-3)
    path = write_xspace(timeline, name="net", target=TARGET, logdir=tmp_path)
    table = convert(path, "hlo_stats")
    assert column(table, "hlo_op_name") == ["fusion"]
    assert column(table, "measured_memory_bw") == [0]


def test_category_of_an_op_is_xprofs() -> None:
    assert category(op("a", collective="all-reduce")) == "all-reduce"
    assert category(op("a", matmul_flops=1)) == "convolution fusion"
    assert category(op("a")) == "loop fusion"
    assert category(op("a", opcode="copy")) == "copy"
