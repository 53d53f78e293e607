"""Traces with known answers, built by hand, and one of the real profiler."""

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from xspaces import Event, op, task, write

from jaxbench.cost import Loop, OpCost
from jaxbench.errors import MeasureError, UsageError
from jaxbench.predict.schedule import simulate
from jaxbench.report.xspace import write_xspace
from jaxbench.target import parse_target
from jaxbench.trace import read_trace, record_trace, xprof_hlo_stats
from jaxbench.trace.attribution import OpEvent, attribute


def event(name: str, start: float, end: float, lane: int = 0) -> OpEvent:
    return OpEvent(name=name, run=0, device=0, lane=lane, start_ns=start, end_ns=end)


def host(tmp_path, **threads):
    return write(tmp_path / "t.xplane.pb", {"/host:CPU": threads})


def micros(step) -> dict[str, Any]:
    return {name: pytest.approx(seconds * 1e6) for name, seconds in step.op_s.items()}


def test_time_of_two_threads_counts_once() -> None:
    shares = attribute([event("a", 0, 10, lane=0), event("b", 4, 8, lane=1)])
    assert shares.tolist() == [8.0, 2.0]


def test_loop_owns_what_its_body_leaves_wherever_the_body_runs() -> None:
    shares = attribute(
        [
            event("while.1", 0, 100, lane=0),
            event("while.2", 20, 80, lane=0),
            event("a", 30, 50, lane=1),
            event("b", 40, 60, lane=2),
        ]
    )
    assert shares.tolist() == [40.0, 30.0, 15.0, 15.0]


def test_what_encloses_others_on_its_lane_is_a_loop_by_any_name() -> None:
    shares = attribute([event("outer", 0, 10), event("inner", 2, 5), event("beside", 8, 12, 1)])
    assert shares.tolist() == [5.0, 3.0, 4.0]


def test_shares_add_up_to_the_union() -> None:
    events = [event(f"op{n}", 7 * n % 50, 7 * n % 50 + 3 + n % 9, lane=n % 3) for n in range(40)]
    union, until = 0.0, 0.0
    for one in sorted(events, key=lambda e: e.start_ns):
        union += max(0.0, one.end_ns - max(until, one.start_ns))
        until = max(until, one.end_ns)
    assert attribute(events).sum() == pytest.approx(union)


def test_steps_are_told_apart_and_the_first_is_dropped(tmp_path) -> None:
    runs = [
        op(name, 100 * run + at, length, run=run)
        for run, slow in ((1, 30), (2, 0), (3, 0), (4, 0), (5, 0))
        for name, at, length in (("dot.1", 0, 40 + slow), ("copy.2", 80, 10))
    ]
    step = read_trace(host(tmp_path, worker=runs))
    assert (step.num_steps, step.num_dropped, step.platform) == (4, 1, "CPU")
    assert step.module == "jit_step"
    assert micros(step) == {"dot.1": 40.0, "copy.2": 10.0}
    assert step.step_samples_s == pytest.approx([100e-6, 100e-6, 100e-6, 90e-6])
    assert step.busy_s + step.between_s == pytest.approx(step.step_s)
    assert [one.num_executions for one in step.ops] == [1.0, 1.0]


def test_disturbed_steps_are_not_typical(tmp_path) -> None:
    starts = [0, 100, 200, 300, 1000, 1100, 1200, 1300, 1400]
    runs = [op("dot.1", start, 50, run=run) for run, start in enumerate(starts)]
    step = read_trace(host(tmp_path, worker=runs))
    assert step.num_steps == 8
    assert step.step_s == pytest.approx(100e-6)


def test_end_events_are_no_ops_but_end_a_loop(tmp_path) -> None:
    first = [
        op("while.1", 0, 20, _p=7),
        op("a", 10, 10),
        Event(name="end: a", start_us=20, duration_us=5, stats={"_c": 8}),
    ]
    second = [op("b", 30, 10), Event(name="end: while.1", start_us=50, stats={"_c": 7})]
    step = read_trace(host(tmp_path, first=first, second=second))
    assert micros(step) == {"while.1": 30.0, "a": 10.0, "b": 10.0}
    assert step.between_s == pytest.approx(0.0)


def test_tasks_given_to_another_thread_are_the_time_of_the_op(tmp_path) -> None:
    """The pool runs a part of the product, and goes on with other ops in the same task."""
    first = [op("dot.1", 0, 10), task("Record", 5, 1), op("a", 10, 10)]
    second = [
        task("StartRegion", 12, 1),
        Event(name="end: dot.1", start_us=30, stats={"_c": 99}),
        op("b", 40, 10),
        task("StopRegion", 60, 1),
    ]
    step = read_trace(host(tmp_path, first=first, second=second))
    assert micros(step) == {"dot.1": 10 + 4 + 10, "a": 2 + 4, "b": 10}
    assert step.between_s == pytest.approx(10e-6)
    assert {one.name: one.num_executions for one in step.ops}["dot.1"] == 1.0


def test_tasks_of_the_executor_belong_to_no_op(tmp_path) -> None:
    first = [task("Record", 1, 5), op("a", 2, 4)]
    second = [task("StartRegion", 3, 5), op("b", 10, 2), task("StopRegion", 20, 5)]
    step = read_trace(host(tmp_path, first=first, second=second))
    assert micros(step) == {"a": 4.0, "b": 2.0}


def test_devices_of_one_host_share_its_time(tmp_path) -> None:
    both = {f"t{n}": [op("dot.1", 0, 10, device_ordinal=n)] for n in range(2)}
    step = read_trace(host(tmp_path, **both))
    assert micros(step) == {"dot.1": 10.0}
    assert step.ops[0].num_executions == 1.0


def test_tpu_ops_are_read_from_the_cores_line(tmp_path) -> None:
    modules = [Event(name="jit_step(9)", start_us=100 * n, duration_us=90) for n in range(3)]
    ops = [
        one
        for n in range(3)
        for one in (
            Event(name="%while.3 = (f32[]) while(%x)", start_us=100 * n, duration_us=60),
            Event(name="%fusion.1 = f32[8]{0} fusion(%p)", start_us=100 * n + 10, duration_us=20),
            Event(name="%fusion.1 = f32[8]{0} fusion(%p)", start_us=100 * n + 30, duration_us=20),
        )
    ]
    lines = {"XLA Modules": modules, "XLA Ops": ops, "Async XLA Ops": ops[:1]}
    noise = {"worker": [op("dot.1", 0, 1000)]}
    planes = {"/host:CPU": noise, "/device:TPU:1": {}, "/device:TPU:0": lines}
    step = read_trace(write(tmp_path / "t.xplane.pb", planes))
    assert (step.platform, step.module, step.num_steps) == ("TPU", "jit_step", 2)
    assert micros(step) == {"while.3": 20.0, "fusion.1": 40.0}
    assert {one.name: one.num_executions for one in step.ops}["fusion.1"] == 2.0


def test_gpu_kernels_are_read_from_all_streams_and_split_into_steps(tmp_path) -> None:
    """Kernels name no step: the op that is run the fewest times begins one."""
    compute, copies = [], []
    for n in range(3):
        at = 100 * n
        for name, start, length in (("first", 0, 10), ("loop", 10, 20), ("loop", 30, 20)):
            kernel = f"{name}_kernel"
            stats = {"hlo_op": name, "hlo_module": "jit_step"}
            compute.append(Event(name=kernel, start_us=at + start, duration_us=length, stats=stats))
        stats = {"hlo_op": "copy.1", "hlo_module": "jit_step"}
        copies.append(Event(name="Memcpy", start_us=at + 40, duration_us=20, stats=stats))
    compute.append(Event(name="unnamed kernel", start_us=0, duration_us=500))
    planes = {"/device:GPU:0": {"Stream #1(Compute)": compute, "Stream #2(Memcpy)": copies}}
    step = read_trace(write(tmp_path / "t.xplane.pb", planes))
    assert (step.platform, step.num_steps) == ("GPU", 2)
    assert micros(step) == {"first": 10.0, "loop": 35.0, "copy.1": 15.0}
    assert {one.name: one.num_executions for one in step.ops}["loop"] == 2.0


def test_predicted_profiles_are_read_back_as_they_were_simulated(tmp_path) -> None:
    seconds = {"forward": 2e-3, "backward": 4e-3}
    steps = tuple(
        Loop(trips=3, steps=(OpCost(name=name, opcode="fusion", scope=""),)) for name in seconds
    )
    timeline = simulate(steps, lambda one: seconds[one.name])
    target = parse_target("tpu-v5p:2x2x1")
    step = read_trace(write_xspace(timeline, name="net", target=target, logdir=tmp_path))
    assert micros(step) == {name: 3e6 * one for name, one in seconds.items()}


def test_trace_without_the_program_says_which_there_are(tmp_path) -> None:
    path = host(tmp_path, worker=[op("dot.1", 0, 10)])
    with pytest.raises(MeasureError, match=r"no op of jit_other \(programs with ops: jit_step\)"):
        read_trace(path, module="jit_other")


def test_xprof_reads_a_devices_plane(tmp_path) -> None:
    about = {"hlo_category": "loop fusion", "program_id": 1, "symbol_id": 1, "flops": 1000}
    events = [
        Event(name="%fusion.1", start_us=20 * n, duration_us=10, about=about) for n in range(3)
    ]
    lines = {
        "Steps": [Event(name="1", start_us=0, duration_us=60)],
        "XLA Modules": [Event(name="jit_step(1)", start_us=0, duration_us=60)],
        "XLA Ops": events,
    }
    figures = {"peak_teraflops_per_second": 1.0, "peak_hbm_bw_gigabytes_per_second": 1.0}
    path = write(tmp_path / "t.xplane.pb", {"/device:TPU:0": lines}, **figures)
    rows = {row["hlo_op_name"]: row for row in xprof_hlo_stats(path)}
    assert rows["fusion.1"]["occurrences"] == 3
    assert rows["fusion.1"]["total_self_time"] == pytest.approx(30.0)
    assert read_trace(path).op_s["fusion.1"] == pytest.approx(30e-6)


def test_missing_xprof_says_how_to_get_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "xprof.convert", None)
    with pytest.raises(UsageError, match=r"pip install 'jaxbench\[profile\]'"):
        xprof_hlo_stats(tmp_path / "t.xplane.pb")


def test_real_profiler_ops_and_between_are_the_step(tmp_path) -> None:
    @jax.jit
    def step(x):
        y, _ = jax.lax.scan(lambda c, _: (jnp.tanh(c @ c), None), x, None, length=4)
        return y

    compiled = step.lower(jnp.ones((64, 64))).compile()
    state = jax.block_until_ready(compiled(jnp.ones((64, 64))))

    def run(num_steps: int) -> None:
        nonlocal state
        for _ in range(num_steps):
            state = compiled(state)
        jax.block_until_ready(state)

    started = time.perf_counter()
    path = record_trace(run, 6, tmp_path)
    wall_s = time.perf_counter() - started
    assert path.parts[-4:-2] == ("plugins", "profile")
    found = read_trace(path)
    assert (found.module, found.platform, found.num_steps) == ("jit_step", "CPU", 5)
    for place, step_s in enumerate(found.step_samples_s):
        busy_s = sum(one.samples_s[place] for one in found.ops)
        assert 0 < busy_s <= step_s + 1e-9  # a nanosecond: the profiler's own resolution
    assert found.busy_s + found.between_s == pytest.approx(found.step_s)
    assert sum(found.step_samples_s) < wall_s
    loops = [one for one in found.ops if one.name.startswith("while")]
    assert len(loops) == 1
    assert max(one.num_executions for one in found.ops) == 4.0


def test_profiler_that_is_taken_says_so(tmp_path) -> None:
    with (
        jax.profiler.trace(tmp_path / "one"),
        pytest.raises(MeasureError, match="one profile at a time"),
    ):
        record_trace(lambda num_steps: None, 1, tmp_path / "two")
    assert not list((tmp_path / "two").rglob("*.pb"))
