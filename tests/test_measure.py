"""Timing: the protocol with made-up steps on a made-up clock, and the real stepper's known answers.

A fake stepper moves the clock by what its steps cost, so a session of minutes takes milliseconds.
"""

import dataclasses
import itertools
import math
import mmap
import random
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import psutil
import pytest

from jaxbench.errors import Failure, MeasureError
from jaxbench.measure.paired import chain_ratios, compare_rows
from jaxbench.measure.protocol import PLANTED_SHARE, Row, Session, is_clock_set, measure_session
from jaxbench.measure.stepper import Chain, Probe, Stepper
from jaxbench.stats import paired_ratio

FAILED = Failure(stage="measure", error="MeasureError", text="made up for tests")
NAMES = ("one", "two", "three")
LEAST_ROUNDS = 8

# --- The protocol ---------------------------------------------------------------------------------


class Bench:
    """A clock, and what ran on it: (stepper, steps, extra share) of each chain, and the probes."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.log: list[tuple[str, int, float]] = []

    def clock(self) -> float:
        return self.now_s

    def energy(self) -> dict[str, float]:
        """Ten watts."""
        return {"package-0": 10.0 * self.now_s}

    def rounds(self) -> list[list[tuple[str, int, float]]]:
        """What ran after the warm-up, in stretches that begin with a probe."""
        stretches: list[list[tuple[str, int, float]]] = []
        for entry in self.log:
            if entry[0] == "probe":
                stretches.append([])
            elif stretches:
                stretches[-1].append(entry)
        return stretches


class FakeStepper:
    """Chains that cost what they are told.

    `cost(step)` is the seconds of the step with that number, `twist` changes a chain or fails it.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        cost: Callable[[int], float],
        *,
        constant_s: float = 0.0,
        noise: float = 0.0,
        twist: Callable[[int, Chain], Chain | Failure] = lambda number, chain: chain,
        probe_fails: bool = False,
        num_copies: int = 1,
    ) -> None:
        self.bench, self.name, self.cost, self.constant_s = bench, name, cost, constant_s
        self.noise, self.twist, self.probe_fails = noise, twist, probe_fails
        self.random, self.num_steps, self.num_chains = random.Random(name), 0, 0
        self.num_copies, self.turns = num_copies, 0

    def turn(self) -> None:
        self.turns += 1

    def chain(self, *, steps: int, extra_share: float = 0.0) -> Chain | Failure:
        self.bench.log.append((self.name, steps, extra_share))
        numbers = range(self.num_steps, self.num_steps + steps)
        seconds = self.constant_s + sum(map(self.cost, numbers))
        seconds *= (1 + extra_share) * math.exp(self.random.gauss(0.0, self.noise))
        self.num_steps += steps
        self.num_chains += 1
        self.bench.now_s += seconds
        chain = Chain(
            steps=steps,
            seconds=seconds,
            dispatch_s=seconds / 4,
            calendar_s=seconds,
            cpu_s=2 * seconds,
            page_faults=100,
            page_loads=1,
            resident_bytes=1000 * self.num_chains,
            copy=self.turns % self.num_copies,
        )
        return self.twist(self.num_chains, chain)

    def probe(self) -> Probe | Failure:
        self.bench.log.append(("probe", 0, 0.0))
        self.bench.now_s += 0.005
        return FAILED if self.probe_fails else Probe(yardstick_s=0.001, hash_cpu_s=0.0002)


def steady(step_s: float) -> Callable[[int], float]:
    return lambda _: step_s


def measure(
    *steppers: FakeStepper,
    control: FakeStepper | None = None,
    budget_s: float = 20.0,
    precision: float = 1e-9,
    **options: Any,
) -> Session:
    """Runs a session; the control costs what the base does."""
    base = steppers[0]
    return measure_session(
        [(stepper.name, stepper) for stepper in steppers],
        control or FakeStepper(base.bench, "control", base.cost, noise=base.noise),
        budget_s=budget_s,
        precision=precision,
        clock=base.bench.clock,
        seed=options.pop("seed", 0),
        **options,
    )


def three(bench: Bench, **options: Any) -> list[FakeStepper]:
    """Steps of 10, 11 and 12 ms, which are never known well enough."""
    settings = {"noise": 0.01, **options}
    return [
        FakeStepper(bench, name, steady(0.010 + 0.001 * index), **settings)
        for index, name in enumerate(NAMES)
    ]


def has_control(number: int) -> bool:
    """Every one of the first rounds, and every third later on."""
    return number < LEAST_ROUNDS or number % 3 == 0


def num_rounds(rows: list[Row]) -> int:
    return len({row[0] for row in rows})


def seconds_of(rows: list[Row]) -> list[float]:
    return [row[2] / row[1] for row in rows]


def test_measure_session_round_is_an_order_and_then_its_reverse() -> None:
    bench = Bench()
    measure(*three(bench), budget_s=30.0)
    orders = []
    for index, stretch in enumerate(bench.rounds()[:-1]):
        with_control = [number for number in range(5) if has_control(5 * index + number)]
        num_short = 4 if 0 in with_control else 3
        assert [steps for _, steps, _ in stretch[:num_short]] == [1] * num_short
        names = [name for name, _, _ in stretch[num_short:]]
        for number in range(5):
            size = 4 if number in with_control else 3
            one_way, back, names = names[:size], names[size : 2 * size], names[2 * size :]
            assert sorted(one_way) == sorted([*NAMES, "control"][:size])
            assert back == one_way[::-1]
            orders.append(tuple(name for name in one_way if name != "control"))
        assert not names
    assert len(orders) >= 20
    # Of six orders, 20 random ones are nearly never fewer than four different ones.
    assert len(set(orders)) >= 4


def test_measure_session_same_seed_gives_the_same_order_and_another_another() -> None:
    logs = []
    for seed in (1, 1, 2):
        bench = Bench()
        measure(*three(bench), seed=seed)
        logs.append([name for name, _, _ in bench.log])
    assert logs[0] == logs[1] != logs[2]


def test_measure_session_controls_take_turns_and_one_sees_the_planted_share() -> None:
    bench = Bench()
    session = measure(*three(bench))
    last = session.candidates[0].rows[-1][0]
    with_control = [number for number in range(last + 1) if has_control(number)]
    assert {row[0] for row in session.same.rows} == {0, 2, 4, 6, *with_control[9::2]}
    assert {row[0] for row in session.planted.rows} == {1, 3, 5, 7, *with_control[8::2]}
    assert with_control[8:10] == [9, 12]
    assert len(with_control) > 12
    planted = {(name, extra) for name, _, extra in bench.log if extra}
    assert planted == {("control", PLANTED_SHARE)}
    num_planted = sum(bool(extra) for _, _, extra in bench.log)
    assert num_planted == len(session.planted.rows)


def test_measure_session_controls_find_what_is_right() -> None:
    bench = Bench()
    session = measure(*three(bench, noise=0.0))
    base = session.candidates[0]
    # Times are kept to 0.1 us, of 60 ms.
    assert chain_ratios(base.rows, session.same.rows) == pytest.approx(
        [1.0] * 2 * num_rounds(session.same.rows), rel=1e-5
    )
    assert chain_ratios(base.rows, session.planted.rows) == pytest.approx(
        [1 + PLANTED_SHARE] * 2 * num_rounds(session.planted.rows), rel=1e-5
    )


def test_measure_session_candidates_get_their_true_ratios() -> None:
    bench = Bench()
    base, *others = measure(*three(bench), budget_s=60.0).candidates
    for slot, truth in zip(others, (1.1, 1.2), strict=True):
        ratio = paired_ratio(chain_ratios(base.rows, slot.rows), confidence=0.99)
        assert not ratio.excludes(truth)
        assert ratio.high / ratio.low < 1.01


def test_measure_session_machine_that_slows_down_changes_no_ratio() -> None:
    bench = Bench()

    def slowing(step_s: float) -> Callable[[int], float]:
        return lambda _: step_s * math.exp(bench.now_s / 100)

    steppers = [FakeStepper(bench, name, slowing(0.01)) for name in NAMES]
    base, *others = measure(*steppers, budget_s=60.0).candidates
    assert seconds_of(base.rows)[-1] > 1.7 * seconds_of(base.rows)[0]
    for slot in others:
        # Drift by 0.06 % a chain; chains of one round differ in length by that.
        assert paired_ratio(chain_ratios(base.rows, slot.rows)).value == pytest.approx(1, abs=1e-4)


def test_measure_session_every_fifth_round_begins_with_a_probe_and_short_chains() -> None:
    bench = Bench()
    session = measure(*three(bench))
    everyone = (*session.candidates, session.same, session.planted)
    shorts = {slot.name: [row[0] for row in slot.rows if row[1] == 1] for slot in everyone}
    last = session.candidates[0].rows[-1][0]
    fifths = list(range(0, last + 1, 5))
    assert len(fifths) == len(session.probes) >= 5
    assert [shorts[name] for name in NAMES] == [fifths] * 3
    for name in ("same", "planted"):
        rounds = {row[0] for slot in everyone if slot.name == name for row in slot.rows}
        assert shorts[name] == [number for number in fifths if number in rounds]
        assert shorts[name]


def test_measure_session_short_chains_take_the_constant_out() -> None:
    bench = Bench()
    steppers = [
        FakeStepper(bench, "one", steady(0.002), constant_s=0.001, noise=0.001),
        FakeStepper(bench, "two", steady(0.002), constant_s=0.008, noise=0.001),
    ]
    base, other = measure(*steppers, budget_s=30.0).candidates
    assert paired_ratio(chain_ratios(base.rows, other.rows)).value > 1.05
    found = compare_rows(base.rows, other.rows, confidence=0.99)
    assert not found.excludes(1.0)
    assert found.high / found.low < 1.01


def test_measure_session_ends_early_only_when_it_knows_what_chains_cost_by_themselves() -> None:
    bench = Bench()
    steppers = [
        FakeStepper(bench, "one", steady(0.01), constant_s=0.0002, noise=0.002),
        FakeStepper(bench, "two", steady(0.01), constant_s=0.003, noise=0.002),
    ]
    session = measure(*steppers, budget_s=60.0, precision=0.005)
    base, other = session.candidates
    assert session.ended == "precise"
    # The steps are equal; whole chains differ by 5 %.
    assert not compare_rows(base.rows, other.rows, confidence=0.99).excludes(1.0)


@pytest.mark.parametrize("num_slow", [1, 10, 20])
def test_measure_session_slow_first_steps_are_in_the_warm_up(num_slow: int) -> None:
    bench = Bench()
    slow = FakeStepper(bench, "one", lambda step: 0.002 if step < num_slow else 0.001, noise=0.002)
    (slot,) = measure(slow, budget_s=30.0).candidates
    assert slot.settled
    warm = sum(chain.steps for chain in slot.warm_up)
    # The level is seen to stand still in the second half, so about twice as long is needed.
    assert num_slow <= warm <= 60 + 3 * num_slow
    assert max(seconds_of(slot.rows)) < 0.0011


def test_measure_session_slowness_that_fades_is_in_the_warm_up() -> None:
    bench = Bench()
    fading = FakeStepper(bench, "one", lambda step: 0.001 * (1 + math.exp(-step / 20)))
    (slot,) = measure(fading, budget_s=30.0).candidates
    assert slot.settled
    # Settled is what moves by less than 3 % from the third quarter to the last.
    assert max(seconds_of(slot.rows)) < 0.00103
    assert len(slot.warm_up) < 40


def test_measure_session_steady_candidate_needs_few_chains_of_warm_up() -> None:
    bench = Bench()
    (slot,) = measure(FakeStepper(bench, "one", steady(0.001))).candidates
    assert slot.settled
    assert [chain.steps for chain in slot.warm_up] == [1, 1, 10, 10, 10, 10]


def test_measure_session_level_that_never_stands_still_ends_the_warm_up_all_the_same() -> None:
    bench = Bench()
    restless = FakeStepper(bench, "one", lambda step: 0.001 * 1.01**step)
    session = measure(restless, budget_s=1000.0)
    (slot,) = session.candidates
    assert not slot.settled
    assert len(slot.warm_up) == 40
    assert slot.rows


def test_measure_session_warm_up_takes_its_share_of_the_budget_and_a_chain_at_most() -> None:
    bench = Bench()
    session = measure(*(FakeStepper(bench, name, steady(0.5)) for name in NAMES), budget_s=60.0)
    # A tenth of 60 s for five slots: 1.2 s each.
    for slot in session.candidates:
        assert len(slot.warm_up) == 3
        assert not slot.settled
        assert slot.steps == 2


@pytest.mark.parametrize(
    ("step_s", "steps"), [(1e-6, 4096), (0.001, 60), (0.01, 6), (0.05, 2), (7.0, 2)]
)
def test_measure_session_long_chain_lasts_60_ms_within_its_bounds(
    step_s: float, steps: int
) -> None:
    bench = Bench()
    session = measure(FakeStepper(bench, "one", steady(step_s)), budget_s=1.0)
    for slot in (*session.candidates, session.same, session.planted):
        assert {row[1] for row in slot.rows} == {1, steps}


def test_measure_session_rivals_choose_their_own_length_and_controls_the_bases() -> None:
    bench = Bench()
    steppers = [FakeStepper(bench, "one", steady(0.01)), FakeStepper(bench, "two", steady(0.03))]
    session = measure(*steppers, budget_s=1.0)
    assert [slot.steps for slot in session.candidates] == [6, 2]
    assert (session.same.steps, session.planted.steps) == (6, 6)


def test_measure_session_ends_early_when_its_ratios_are_known() -> None:
    bench, told = Bench(), []
    session = measure(
        *three(bench, noise=0.002), budget_s=600.0, precision=0.005, progress=told.append
    )
    assert session.ended == "precise"
    assert session.wall_s < 60
    assert session.wall_s == pytest.approx(bench.now_s)
    assert told
    assert told == sorted(told)
    for slot in session.candidates:
        assert num_rounds(slot.rows) >= LEAST_ROUNDS
    base, *others = session.candidates
    for slot in others:
        ratio = paired_ratio(chain_ratios(base.rows, slot.rows), resamples=400)
        assert math.log(ratio.high / ratio.low) / 2 <= 0.005


def test_measure_session_one_alone_ends_early_when_its_controls_are_known() -> None:
    bench = Bench()
    session = measure(
        FakeStepper(bench, "one", steady(0.01), noise=0.002), budget_s=600.0, precision=0.005
    )
    assert session.ended == "precise"
    assert session.wall_s < 60
    assert min(num_rounds(slot.rows) for slot in (session.same, session.planted)) >= 4
    rounds = {row[0] for slot in (session.same, session.planted) for row in slot.rows}
    assert rounds == {row[0] for row in session.candidates[0].rows}  # there is nothing else


def test_measure_session_spends_its_budget_and_one_round_at_most_beyond() -> None:
    bench = Bench()
    session = measure(*three(bench), budget_s=20.0)
    assert session.ended == "budget"
    # A round is two chains each of four, 60 ms long and a little more.
    assert 20.0 <= session.wall_s <= 20.0 + 2 * 4 * 0.075 + 0.1
    assert session.timed_s <= session.wall_s
    assert session.timed_s > 0.9 * session.wall_s


def test_measure_session_does_eight_rounds_however_small_the_budget() -> None:
    bench = Bench()
    session = measure(*three(bench), budget_s=0.001)
    assert session.ended == "budget"
    assert {num_rounds(slot.rows) for slot in session.candidates} == {LEAST_ROUNDS}


def failing(from_chain: int) -> Callable[[int, Chain], Chain | Failure]:
    return lambda number, chain: FAILED if number >= from_chain else chain


@pytest.mark.parametrize("from_chain", [1, 3, 20])
def test_measure_session_rival_that_fails_is_left_out_and_the_others_go_on(
    from_chain: int,
) -> None:
    bench = Bench()
    one, two, three_ = three(bench)
    two.twist = failing(from_chain)
    session = measure(one, two, three_)
    base, failed, kept = session.candidates
    assert session.ended == "budget"
    assert failed.failure == FAILED
    assert two.num_chains == from_chain  # it was not asked again
    assert len(failed.rows) == max(0, from_chain - 1 - len(failed.warm_up))
    assert (base.failure, kept.failure) == (None, None)
    assert len(chain_ratios(base.rows, kept.rows)) == 2 * num_rounds(base.rows) > 40


@pytest.mark.parametrize("from_chain", [1, 20])
def test_measure_session_control_that_fails_leaves_the_rivals(from_chain: int) -> None:
    bench = Bench()
    control = FakeStepper(bench, "control", steady(0.01), twist=failing(from_chain))
    session = measure(*three(bench), control=control)
    assert session.ended == "budget"
    assert session.same.failure == session.planted.failure == FAILED
    assert len(chain_ratios(*(slot.rows for slot in session.candidates[:2]))) > 40


@pytest.mark.parametrize("from_chain", [1, 20])
def test_measure_session_base_that_fails_ends_it(from_chain: int) -> None:
    bench = Bench()
    one, *others = three(bench)
    one.twist = failing(from_chain)
    session = measure(one, *others)
    assert session.ended == "failed"
    assert session.candidates[0].failure == FAILED
    assert [slot.failure for slot in session.candidates[1:]] == [None, None]
    assert bool(session.candidates[1].rows) == (from_chain > 1)
    assert session.wall_s < 20.0


def test_measure_session_probe_that_fails_ends_it() -> None:
    session = measure(*three(Bench(), probe_fails=True))
    assert session.ended == "failed"
    assert session.candidates[0].failure == FAILED
    assert session.probes == ()


def test_measure_session_everyone_but_the_base_failing_ends_it() -> None:
    bench = Bench()
    one, two = three(bench)[:2]
    two.twist = failing(12)
    control = FakeStepper(bench, "control", steady(0.01), twist=failing(15))
    session = measure(one, two, control=control)
    assert session.ended == "failed"
    assert session.candidates[0].failure is None
    assert session.wall_s < 20.0


@pytest.mark.parametrize("at_chain", [2, 40])
def test_measure_session_interrupt_keeps_what_was_measured(at_chain: int) -> None:
    bench = Bench()
    one, two, three_ = three(bench)

    def interrupt(number: int, chain: Chain) -> Chain:
        if number == at_chain:
            raise KeyboardInterrupt
        return chain

    two.twist = interrupt
    session = measure(one, two, three_)
    assert session.ended == "interrupted"
    assert session.wall_s == pytest.approx(bench.now_s)
    base, broken, _ = session.candidates
    assert len(broken.rows) == max(0, at_chain - 1 - len(broken.warm_up))
    # The round that it broke into tells no ratio.
    complete = [row for row in broken.rows if row[1] > 1][::2]
    assert len(chain_ratios(base.rows, broken.rows)) / 2 in (len(complete), len(complete) - 1)
    assert len(complete) > 10 or at_chain == 2


@pytest.mark.parametrize(
    ("change", "is_set"),
    [
        ({}, False),
        ({"calendar_s": 1.09}, False),
        ({"calendar_s": 1.11}, True),
        ({"calendar_s": -3600.0}, True),
        ({"calendar_s": 0.0, "seconds": 0.04}, False),  # clocks of 50 ms are nothing to go by
        ({"calendar_s": 0.0, "seconds": 0.0}, True),
        ({"calendar_s": -0.01, "seconds": -0.01}, True),
    ],
)
def test_is_clock_set_when_two_clocks_disagree(change: dict[str, float], is_set: bool) -> None:
    chain = FakeStepper(Bench(), "one", steady(1.0)).chain(steps=1)
    assert isinstance(chain, Chain)
    assert is_clock_set(dataclasses.replace(chain, **change)) == is_set


def test_measure_session_chains_while_the_clock_was_set_are_left_out_and_counted() -> None:
    bench = Bench()
    one, two, three_ = three(bench)
    jumps = (30, 31, 50)

    def jump(number: int, chain: Chain) -> Chain:
        if number not in jumps:
            return chain
        return dataclasses.replace(chain, calendar_s=chain.seconds - 3600.0)

    two.twist = jump
    session = measure(one, two, three_)
    base, jumped, kept = session.candidates
    assert (base.dropped, jumped.dropped, kept.dropped) == (0, 3, 0)
    assert len(jumped.rows) == len(kept.rows) - 3
    assert (
        2
        <= len(chain_ratios(base.rows, kept.rows)) - len(chain_ratios(base.rows, jumped.rows))
        <= 6
    )


def test_measure_session_energy_of_long_chains_is_added_up_for_each() -> None:
    bench = Bench()
    session = measure(*three(bench), energy=bench.energy)
    for slot in (*session.candidates, session.same, session.planted):
        longs_s = sum(row[2] for row in slot.rows if row[1] > 1)
        assert slot.joules == pytest.approx({"package-0": 10.0 * longs_s}, rel=1e-5)


def test_measure_session_energy_counter_that_wraps_takes_nothing_back() -> None:
    bench = Bench()
    session = measure(*three(bench), energy=lambda: {"package-0": 10.0 * bench.now_s % 100})
    right, found = 0.0, 0.0
    for slot in (*session.candidates, session.same, session.planted):
        right += 10.0 * sum(row[2] for row in slot.rows if row[1] > 1)
        found += slot.joules["package-0"]
    # It wraps every 10 s, once or twice within a chain of less than 1 J.
    assert right - 3 < found <= right * (1 + 1e-5)


def test_measure_session_without_counters_has_no_energy() -> None:
    session = measure(*three(Bench()))
    assert [slot.joules for slot in session.candidates] == [{}] * 3


def test_measure_session_counts_pages_and_memory_of_the_rounds() -> None:
    session = measure(*three(Bench()))
    for slot in session.candidates:
        warm = len(slot.warm_up)
        assert slot.page_faults == 100 * len(slot.rows)
        assert slot.page_loads == len(slot.rows)
        assert slot.resident_bytes == (1000 * (warm + 1), 1000 * (warm + len(slot.rows)))
        assert [row[3:5] for row in slot.rows] == [
            pytest.approx((row[2] / 4, 2 * row[2]), abs=3e-7) for row in slot.rows
        ]


def test_measure_session_each_round_takes_another_process() -> None:
    steppers = three(Bench(), num_copies=3)
    session = measure(*steppers)
    for slot in session.candidates:
        copies = {row[0]: row[5] for row in slot.rows}
        assert all(row[5] == copies[row[0]] for row in slot.rows)
        in_order = [copies[number] for number in sorted(copies)]
        assert all(two == (one + 1) % 3 for one, two in itertools.pairwise(in_order))
    # What a process holds is told of one of them.
    for slot, stepper in zip(session.candidates, steppers, strict=True):
        sizes = [1000 * number for number in range(1, stepper.num_chains + 1)]
        assert set(slot.resident_bytes) <= set(sizes)
        assert slot.resident_bytes[0] < slot.resident_bytes[1]


def test_measure_session_every_process_is_warmed_up() -> None:
    bench = Bench()
    stepper = FakeStepper(bench, "one", steady(0.001), num_copies=3)
    (slot,) = measure(stepper).candidates
    first_probe = next(at for at, entry in enumerate(bench.log) if entry[0] == "probe")
    warm = [steps for name, steps, _ in bench.log[:first_probe] if name == "one"]
    assert warm[:6] == [chain.steps for chain in slot.warm_up]
    # The others run as many chains of the last length, or as long.
    assert warm[6:] == [10] * (len(warm) - 6)
    assert 4 <= (len(warm) - 6) / 2 <= 6


# --- The real stepper -----------------------------------------------------------------------------


def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    del key
    return jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)


def train(state: Any, batch: Any) -> tuple[Any, Any]:
    return state + batch, jnp.float32(1.0)


def test_stepper_train_hands_each_state_to_the_next_step() -> None:
    states: list[int] = []

    def note(state: Any, batch: Any) -> tuple[Any, Any]:
        states.append(int(state))
        return state + batch, jnp.float32(state + 1)

    stepper = Stepper(note, init)
    for steps in (1, 4, 2):
        assert stepper.chain(steps=steps).steps == steps
    assert states == list(range(7))
    assert stepper.final_loss() == 7.0


def test_stepper_forward_keeps_the_state() -> None:
    states: list[int] = []

    def forward(state: Any, batch: Any) -> Any:
        states.append(int(state))
        return jnp.float32(0.25)

    stepper = Stepper(forward, init)
    stepper.chain(steps=3)
    assert states == [0, 0, 0]
    assert stepper.final_loss() == 0.25


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_stepper_loss_that_is_no_number_raises(loss: float) -> None:
    stepper = Stepper(lambda state, batch: (state, jnp.float32(loss)), init)
    with pytest.raises(MeasureError, match=f"Loss is {loss}") as caught:
        stepper.chain(steps=2)
    assert "\n" not in str(caught.value)


def ticking(reading_s: float, step_s: float) -> tuple[Callable[[], float], Callable]:
    """A clock of which every reading costs, and a step that moves it."""
    now = [0.0]

    def clock() -> float:
        now[0] += reading_s
        return now[0]

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        now[0] += step_s
        return train(state, batch)

    return clock, step


def test_stepper_chain_is_timed_from_its_first_step_to_its_end() -> None:
    clock, step = ticking(0.001, 0.25)
    chain = Stepper(step, init, clock=clock).chain(steps=4)
    assert chain.dispatch_s == pytest.approx(1.0 + 0.001)
    assert chain.seconds == pytest.approx(1.0 + 0.002)


@pytest.mark.parametrize("share", [0.02, 0.5])
def test_stepper_planted_share_takes_that_much_longer(share: float) -> None:
    clock, step = ticking(1e-6, 0.25)
    stepper = Stepper(step, init, clock=clock)
    plain, slowed = stepper.chain(steps=4), stepper.chain(steps=4, extra_share=share)
    # Two readings of the clock at most.
    assert slowed.seconds == pytest.approx(plain.seconds * (1 + share), abs=3e-6)
    assert slowed.dispatch_s == pytest.approx(plain.dispatch_s)


def test_stepper_50_ms_callback_is_timed_as_50_ms() -> None:
    sleep_s = [0.0]

    def sleep(value: Any) -> Any:
        time.sleep(sleep_s[0])
        return value

    @jax.jit
    def step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        slept = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), state.dtype), state)
        return slept + batch, slept.astype(jnp.float32)

    def fastest_step_s() -> float:
        return min(stepper.chain(steps=1).seconds for _ in range(20))

    stepper = Stepper(step, init)
    stepper.chain(steps=2)
    around_s = fastest_step_s()  # JAX takes a millisecond to call Python and come back
    sleep_s[0] = 0.05
    # 2 %: a sleep never ends early, and ends late where the machine has other work, such as the
    # other tests; so the fastest of twenty counts.
    assert fastest_step_s() - around_s == pytest.approx(0.05, rel=0.02)
    assert stepper.final_loss() == 41.0


def test_stepper_processor_time_is_what_was_computed_and_not_what_was_slept() -> None:
    def spin(state: Any, batch: Any) -> tuple[Any, Any]:
        until = time.process_time() + 0.03
        while time.process_time() < until:
            pass
        time.sleep(0.03)
        return train(state, batch)

    stepper = Stepper(spin, init)
    stepper.chain(steps=1)
    chain = stepper.chain(steps=2)
    # Whatever else runs, the loops take 60 ms of processor; JAX and the readings a little more.
    assert 0.06 <= chain.cpu_s < 0.09
    assert chain.seconds >= 0.12
    assert chain.dispatch_s <= chain.seconds
    # The calendar's clock may be slewed by 500 ppm; readings are microseconds apart.
    assert chain.calendar_s == pytest.approx(chain.seconds, rel=0.01, abs=0.005)
    assert not is_clock_set(chain)


def test_stepper_touched_pages_and_memory_are_counted() -> None:
    size, kept = 2**25, []

    def touch(state: Any, batch: Any) -> tuple[Any, Any]:
        kept.append(mmap.mmap(-1, size))
        for start in range(0, size, mmap.PAGESIZE):
            kept[-1][start] = 1
        return train(state, batch)

    stepper = Stepper(train, init)
    before = stepper.chain(steps=2)
    stepper = Stepper(touch, init)
    chain = stepper.chain(steps=2)
    pages = 2 * size // mmap.PAGESIZE
    # Huge pages of 512 may be given; beside it the process touches some more.
    assert pages / 512 <= chain.page_faults - before.page_faults < 2 * pages
    assert chain.resident_bytes - before.resident_bytes == pytest.approx(2 * size, rel=0.2)
    assert chain.resident_bytes == pytest.approx(psutil.Process().memory_info().rss, rel=0.05)


def test_stepper_about_and_memory_describe_the_device() -> None:
    stepper = Stepper(train, init)
    about = stepper.about()
    assert (about["device"], about["platform"]) == (jax.devices()[0].device_kind, "cpu")
    assert about["pinned_threads"] == 0  # the pool has not run yet
    assert all(isinstance(value, int) for value in stepper.device_memory().values())


def test_stepper_probe_times_a_product_and_a_hash() -> None:
    stepper = Stepper(train, init)
    probes = [stepper.probe() for _ in range(5)]
    fastest = min(probe.yardstick_s for probe in probes)
    # 2 x 384^3 FLOPs at 1 GFLOP/s to 10 TFLOP/s; 256 KiB at 50 MB/s to 50 GB/s.
    assert 1e-5 < fastest < 0.11
    assert 5e-6 < min(probe.hash_cpu_s for probe in probes) < 5e-3


def test_stepper_losses_go_on_from_chain_to_chain() -> None:
    @jax.jit
    def descend(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        loss, slope = jax.value_and_grad(lambda x: jnp.sum((x - batch) ** 2))(state)
        return state - 0.1 * slope, loss

    stepper = Stepper(descend, lambda key: (jax.random.normal(key, (8,)), jnp.ones(8)))
    losses = []
    for _ in range(4):
        stepper.chain(steps=2)
        losses.append(stepper.final_loss())
    # Each step leaves 0.8 of every distance, so 0.8^4 of the loss after two.
    for one, other in itertools.pairwise(losses):
        assert other == pytest.approx(0.8**4 * one, rel=1e-4)
