"""Timing: slopes of chains under a clock that is told, and a known answer under the real one."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbench.errors import MeasureError
from jaxbench.measure import measure_step

NUM_WARM_UP = 1 + 2 + 2  # first step, then two chains of two


class Machine:
    """A clock and a step that moves it.

    `cost(step)` is the seconds of the step with that number; every reading costs `reading_s`.
    """

    def __init__(self, cost: Callable[[int], float], *, reading_s: float = 0.0, loss: float = 1.0):
        self.cost, self.reading_s, self.loss = cost, reading_s, loss
        self.now_s, self.num_steps, self.chain_steps = 0.0, 0, 0

    def clock(self) -> float:
        self.now_s += self.reading_s
        self.chain_steps = 0
        return self.now_s

    def train(self, state: Any, batch: Any) -> tuple[Any, Any]:
        self.now_s += self.cost(self.num_steps)
        self.num_steps += 1
        self.chain_steps += 1
        return state + batch, jnp.float32(self.loss)

    def forward(self, state: Any, batch: Any) -> Any:
        return self.train(state, batch)[1]


def init(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    del key
    return jnp.zeros((), jnp.int32), jnp.ones((), jnp.int32)


def test_measure_step_constant_parts_cancel_in_the_slope() -> None:
    machine = Machine(lambda step: 3.0 if step == 0 else 0.02, reading_s=0.5)
    measured = measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    # Sums of a few floats near 10: the last digits differ.
    assert measured.samples_s == pytest.approx([0.02] * len(measured.samples_s), rel=1e-9)
    assert measured.first_step_s == pytest.approx(3.0 + 0.5)
    assert measured.final_loss == 1.0
    assert measured.doubts == ()
    assert measured.protocol == "chain-slope-1"


def test_measure_step_samples_are_the_slopes_of_the_kept_chains() -> None:
    machine = Machine(lambda step: 0.02 + 0.001 * (step % 5))
    measured = measure_step(machine.train, init, budget_s=5.0, clock=machine.clock)
    shorts, longs = measured.chains[::2], measured.chains[1::2]
    slopes = [
        (long_s - short_s) / (num_long - num_short)
        for (num_short, short_s), (num_long, long_s) in zip(shorts, longs, strict=True)
    ]
    assert list(measured.samples_s) == slopes
    assert machine.num_steps == NUM_WARM_UP + sum(steps for steps, _ in measured.chains)


def test_measure_step_without_budget_takes_five_samples() -> None:
    machine = Machine(lambda _: 100.0)
    measured = measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    assert len(measured.samples_s) == 5


def test_measure_step_spends_its_budget_and_one_sample_at_most_beyond() -> None:
    machine = Machine(lambda _: 0.05)
    measured = measure_step(machine.train, init, budget_s=20.0, clock=machine.clock)
    spent_s = [seconds for _, seconds in measured.chains]
    assert sum(spent_s) >= 20.0 > sum(spent_s[:-2])


@pytest.mark.parametrize(("step_s", "steps"), [(1e-6, 257), (0.01, 26), (0.05, 6), (7.0, 3)])
def test_measure_step_long_chain_lasts_a_quarter_second_within_its_bounds(
    step_s: float, steps: int
) -> None:
    machine = Machine(lambda _: step_s)
    measured = measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    assert {num_steps for num_steps, _ in measured.chains} == {1, steps}


def test_measure_step_forward_keeps_the_state_and_times_the_same() -> None:
    machine = Machine(lambda _: 0.02, loss=0.25)
    measured = measure_step(machine.forward, init, budget_s=0.0, clock=machine.clock)
    assert measured.samples_s == pytest.approx([0.02] * 5, rel=1e-9)
    assert measured.final_loss == 0.25


def test_measure_step_train_hands_each_state_to_the_next_step() -> None:
    machine = Machine(lambda _: 0.02)
    states: list[int] = []

    def train(state: Any, batch: Any) -> tuple[Any, Any]:
        states.append(int(state))
        return machine.train(state, batch)

    measure_step(train, init, budget_s=0.0, clock=machine.clock)
    assert states == list(range(machine.num_steps))


def test_measure_step_slope_of_nothing_is_doubted() -> None:
    machine = Machine(lambda _: 0.0)
    machine.cost = lambda _: 5.0 if machine.chain_steps == 0 else 0.0
    measured = measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    assert measured.samples_s == (0.0,) * 5
    assert any("not positive" in doubt for doubt in measured.doubts)


def test_measure_step_one_negative_slope_is_doubted() -> None:
    machine = Machine(lambda step: 30.0 if step == NUM_WARM_UP else 0.05)
    measured = measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    assert min(measured.samples_s) < 0
    assert [doubt for doubt in measured.doubts if "not positive" in doubt]


@pytest.mark.parametrize(("slower", "num_doubts"), [(1.05, 0), (1.5, 1)])
def test_measure_step_busy_machine_is_doubted_above_a_tenth(slower: float, num_doubts: int) -> None:
    # Steps of 50 ms: a sample is 1 + 6 steps. Every other sample runs on a slower machine.
    machine = Machine(lambda step: 0.05 * (slower if max(step - NUM_WARM_UP, 0) // 7 % 2 else 1.0))
    measured = measure_step(machine.train, init, budget_s=10.0, clock=machine.clock)
    assert max(measured.samples_s) / min(measured.samples_s) == pytest.approx(slower)
    assert len(measured.doubts) == num_doubts
    assert all("spread over" in doubt for doubt in measured.doubts)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_measure_step_loss_that_is_no_number_raises(loss: float) -> None:
    machine = Machine(lambda _: 0.02, loss=loss)
    with pytest.raises(MeasureError, match=f"Loss is {loss}") as caught:
        measure_step(machine.train, init, budget_s=0.0, clock=machine.clock)
    assert "\n" not in str(caught.value)


def test_measure_step_50_ms_callback_is_timed_as_50_ms() -> None:
    def sleep(value: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return value

    @jax.jit
    def step(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        slept = jax.pure_callback(sleep, jax.ShapeDtypeStruct((), state.dtype), state)
        return slept + batch, slept.astype(jnp.float32)

    runs = [measure_step(step, init, budget_s=1.5) for _ in range(3)]
    for measured in runs:
        assert len(measured.samples_s) >= 3
        assert measured.final_loss == NUM_WARM_UP + sum(steps for steps, _ in measured.chains) - 1
    # 5 %: a sleep never ends early, and ends late where the machine has other work, such as the
    # other tests; so the fastest of three runs counts.
    fastest = min(statistics.median(measured.samples_s) for measured in runs)
    assert fastest == pytest.approx(0.05, rel=0.05)
