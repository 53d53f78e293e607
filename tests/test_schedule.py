"""The simulated timeline against schedules whose times are plain."""

import pytest

from jaxbench.cost import Loop, OpCost, Wait
from jaxbench.predict.schedule import simulate


def op(name: str, *, stream: str = "compute", starts: str = "") -> OpCost:
    return OpCost(name=name, opcode="fusion", scope="", stream=stream, starts=starts)


def run(steps, **seconds):
    return simulate(steps, lambda cost: seconds[cost.name])


def spans(timeline):
    return {
        event.op.name: (event.start_s, event.start_s + event.duration_s)
        for event in timeline.events
    }


def test_ops_on_the_core_follow_each_other() -> None:
    timeline = run([op("a"), op("b")], a=1.0, b=2.0)
    assert timeline.step_s == 3.0
    assert spans(timeline) == {"a": (0.0, 1.0), "b": (1.0, 3.0)}
    assert timeline.exposed_s == ()


def test_gather_hides_behind_a_longer_product() -> None:
    gather = op("gather", stream="collective", starts="gather")
    timeline = run(
        [gather, op("dot"), Wait(token="gather"), op("use")], gather=2.0, dot=3.0, use=1.0
    )
    assert timeline.step_s == 4.0
    assert timeline.exposed_s == ()


def test_gather_longer_than_the_product_is_exposed_by_the_difference() -> None:
    gather = op("gather", stream="collective", starts="gather")
    timeline = run(
        [gather, op("dot"), Wait(token="gather"), op("use")], gather=5.0, dot=3.0, use=1.0
    )
    assert timeline.step_s == 6.0
    assert timeline.exposed_s == (("collective", 2.0),)


def test_gather_that_is_waited_for_at_once_is_exposed_whole() -> None:
    timeline = run([op("gather", stream="collective"), op("dot")], gather=5.0, dot=3.0)
    assert timeline.step_s == 8.0
    assert timeline.exposed_s == (("collective", 5.0),)


def test_one_stream_does_one_thing_at_a_time_and_two_streams_two() -> None:
    first, second = (op(name, stream="collective", starts=name) for name in ("first", "second"))
    copy = op("copy", stream="dma", starts="copy")
    seconds = {"first": 2.0, "second": 2.0, "copy": 3.0}
    timeline = run([first, second, copy], **seconds)
    assert spans(timeline) == {"first": (0.0, 2.0), "second": (2.0, 4.0), "copy": (0.0, 3.0)}
    assert timeline.step_s == 4.0  # the step ends with the last of what it started


def test_loop_takes_its_trips_and_is_written_once() -> None:
    timeline = run([Loop(trips=1000, steps=(op("a"), op("b")))], a=1.0, b=2.0)
    assert timeline.step_s == pytest.approx(3000.0)
    assert [(event.op.name, event.count, event.total_s) for event in timeline.events] == [
        ("a", 1000, 1000.0),
        ("b", 1000, 2000.0),
    ]


def test_loops_in_loops_multiply() -> None:
    inner = Loop(trips=3, steps=(op("a"),))
    timeline = run([Loop(trips=5, steps=(inner, op("b")))], a=1.0, b=2.0)
    assert timeline.step_s == 25.0
    (a, b) = timeline.events
    assert a.repeats == ((5, 5.0), (3, 1.0))
    assert b.repeats == ((5, 5.0),)


def test_copy_that_is_waited_for_in_the_next_iteration_overlaps_in_steady_state() -> None:
    # Each iteration starts a copy and waits for that of the one before: 3 s a turn, not 4.
    steps = (Wait(token="copy"), op("copy", stream="dma", starts="copy"), op("dot"))
    timeline = run([Loop(trips=10, steps=steps)], copy=3.0, dot=1.0)
    assert timeline.step_s == pytest.approx(30.0)
    assert dict(timeline.exposed_s)["dma"] == pytest.approx(20.0)


@pytest.mark.parametrize("trips", [1, 2, 3, 7])
def test_loop_agrees_with_its_iterations_written_out(trips: int) -> None:
    body = (
        op("gather", stream="collective", starts="gather"),
        op("dot"),
        Wait(token="gather"),
        op("copy", stream="dma", starts="copy"),
    )
    seconds = {"gather": 2.0, "dot": 1.5, "copy": 4.0}
    looped = run([op("dot"), Loop(trips=trips, steps=body), op("dot")], **seconds)
    written = run([op("dot"), *body * trips, op("dot")], **seconds)
    assert looped.step_s == pytest.approx(written.step_s)
    assert dict(looped.exposed_s) == pytest.approx(dict(written.exposed_s))
    for stream in ("compute", "dma", "collective"):
        totals = [
            sum(event.total_s for event in timeline.events if event.stream == stream)
            for timeline in (looped, written)
        ]
        assert totals[0] == pytest.approx(totals[1])


def test_number_of_events_does_not_depend_on_trips() -> None:
    few, many = (run([Loop(trips=trips, steps=(op("a"),))], a=1.0) for trips in (4, 4_000_000))
    assert len(few.events) == len(many.events)
