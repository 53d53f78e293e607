"""Doubts: each is found where it was planted, with its number, and nowhere else."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbench.machine import Usage
from jaxbench.measure.doubts import Doubt, Kind, find_doubts
from jaxbench.measure.protocol import Session, Slot
from jaxbench.measure.stepper import Chain, Probe, Stepper

MIB = 2**20
NUM_CHAINS, STEPS, CHAIN_S = 40, 20, 0.06
QUIET = Usage(
    wall_s=10.0, cores=4, others_cores=0.01, swapped_bytes=0, energy_joules={}, energy_missing=""
)


@dataclass
class Found:
    """What a session knows of one competitor; a test changes what it is about."""

    num_chains: int = NUM_CHAINS
    slower: Callable[[np.ndarray], Any] = lambda place: 1.0
    noise: float = 0.003
    dispatch_share: float = 0.1
    num_copies: int = 2
    hashes_s: list[float] = field(default_factory=lambda: [0.0002, 0.000201, 0.000199] * 4)
    slot: dict[str, Any] = field(default_factory=dict)
    usage: dict[str, Any] = field(default_factory=dict)

    def doubts(self) -> list[Doubt]:
        """Returns the doubts about it."""
        generator = np.random.default_rng(0)
        noise = np.exp(self.noise * generator.normal(size=self.num_chains))
        seconds = CHAIN_S * noise * self.slower(np.arange(self.num_chains))
        rows = [
            (
                index // 2,
                STEPS,
                float(s),
                float(s) * self.dispatch_share,
                float(s),
                index // 2 % self.num_copies,
            )
            for index, s in enumerate(seconds)
        ]
        values: dict[str, Any] = {
            "warm_up": [chain_of(CHAIN_S)] * 6,
            "settled": True,
            "rows": rows,
            "resident_bytes": (2**30, 2**30),
            **self.slot,
        }
        slot = Slot(name="one", stepper=None, **values)  # pyright: ignore[reportArgumentType]
        probes = tuple(Probe(yardstick_s=0.001, hash_cpu_s=hash_s) for hash_s in self.hashes_s)
        return find_doubts(slot, session_of(slot, probes), replace(QUIET, **self.usage))


def chain_of(seconds: float) -> Chain:
    return Chain(
        steps=1, seconds=seconds, dispatch_s=0.0, calendar_s=seconds, cpu_s=seconds,
        page_faults=0, page_loads=0, resident_bytes=2**30,
    )  # fmt: skip


def session_of(slot: Slot, probes: tuple[Probe, ...] = ()) -> Session:
    return Session(
        candidates=(slot,), same=slot, planted=slot, probes=probes, ended="budget", wall_s=10.0
    )


def every_fourth(place: np.ndarray) -> np.ndarray:
    return np.where(place % 4, 1.0, 1.2)


def from_half(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda place: np.where(place < NUM_CHAINS // 2, 1.0, factor)


PAGES_OF_A_TENTH = round(0.1 * NUM_CHAINS * CHAIN_S / 0.25e-6)
# (doubt, what is planted, its number, by how much the number may be off, what is not enough for it)
CASES = [
    (Kind.DRIFT, Found(slower=from_half(1.1)), 0.1, 0.01, Found(slower=from_half(1.02))),
    (Kind.DRIFT, Found(slower=from_half(0.9)), -0.1, 0.01, Found(slower=from_half(0.98))),
    (Kind.LOAD, Found(usage={"others_cores": 0.5}), 0.5, 0, Found(usage={"others_cores": 0.04})),
    (
        Kind.BIMODAL,
        Found(slower=every_fourth),
        0.2,
        0.01,
        # A twentieth is no heap, but now and then a disturbance.
        Found(slower=lambda place: np.where(place % 20, 1.0, 1.2)),
    ),
    (
        Kind.THROTTLED,
        Found(hashes_s=[0.0002] * 6 + [0.00024] * 6),
        0.2,
        0.001,
        Found(hashes_s=[0.0002] * 6 + [0.000204] * 6),
    ),
    (
        Kind.THROTTLED,
        Found(hashes_s=[0.00024] * 6 + [0.0002] * 6),
        0.2,
        0.001,
        Found(hashes_s=[0.0002] * 2 + [0.0004] * 2),
    ),
    (Kind.ONE_PROCESS, Found(num_copies=1), 1, 0, Found(num_copies=2)),
    (Kind.FEW, Found(num_chains=16), 16, 0, Found(num_chains=20)),
    (
        Kind.SWAP,
        Found(usage={"swapped_bytes": 3 * MIB}),
        3 * MIB,
        0,
        Found(usage={"swapped_bytes": 0}),
    ),
    (Kind.SWAP, Found(slot={"page_loads": 7}), 7, 0, Found(slot={"page_loads": 0})),
    (Kind.DISPATCH, Found(dispatch_share=0.97), 0.97, 0.001, Found(dispatch_share=0.85)),
    (
        Kind.FIRST_TOUCH,
        Found(slot={"page_faults": PAGES_OF_A_TENTH}),
        0.1,
        0.001,
        Found(slot={"page_faults": PAGES_OF_A_TENTH // 4}),
    ),
    (
        Kind.LEAK,
        Found(slot={"resident_bytes": (2**30, 2**30 + 100 * MIB)}),
        100 * MIB,
        0,
        # 5 % of a large process, or 64 MiB, may come and go.
        Found(slot={"resident_bytes": (2**31, 2**31 + 100 * MIB)}),
    ),
    (
        Kind.LEAK,
        Found(slot={"resident_bytes": (100 * MIB, 170 * MIB)}),
        70 * MIB,
        0,
        Found(slot={"resident_bytes": (100 * MIB, 160 * MIB)}),
    ),
    (Kind.CLOCK, Found(slot={"dropped": 2}), 2, 0, Found(slot={"dropped": 0})),
    (
        Kind.UNSETTLED,
        Found(slot={"settled": False, "warm_up": [chain_of(1.0)] * 40}),
        40,
        0,
        Found(slot={"settled": True, "warm_up": [chain_of(1.0)] * 40}),
    ),
]


def test_find_doubts_clean_session_has_none() -> None:
    assert Found().doubts() == []


def test_find_doubts_cases_are_of_every_kind() -> None:
    assert {case[0] for case in CASES} == set(Kind)


@pytest.mark.parametrize(("kind", "planted", "number", "off", "_"), CASES)
def test_find_doubts_planted_one_is_found_with_its_number(
    kind: Kind, planted: Found, number: float, off: float, _: Found
) -> None:
    (doubt,) = [doubt for doubt in planted.doubts() if doubt.kind == kind]
    assert doubt.number == pytest.approx(number, abs=off)
    assert doubt.cause
    assert doubt.remedy
    assert str(doubt) == f"{kind.value}: {doubt.cause}; {doubt.remedy}"
    assert doubt.to_json() == {
        "kind": kind.value, "number": doubt.number, "cause": doubt.cause, "remedy": doubt.remedy,
    }  # fmt: skip
    assert type(doubt.to_json()["kind"]) is str


@pytest.mark.parametrize(("kind", "_", "number", "off", "less"), CASES)
def test_find_doubts_less_than_its_threshold_is_none(
    kind: Kind, _: Found, number: float, off: float, less: Found
) -> None:
    assert [doubt for doubt in less.doubts() if doubt.kind == kind] == []


@pytest.mark.parametrize(
    "unsteady",
    [
        lambda generator, size: np.exp(0.05 * generator.normal(size=size)),
        lambda generator, size: np.where(generator.random(size) < 0.5, 1.0, 1.1),
    ],
    ids=["noisy", "bimodal"],
)
def test_find_doubts_unsteady_samples_without_a_trend_are_no_drift(
    unsteady: Callable[[np.random.Generator, int], np.ndarray],
) -> None:
    found = 0
    for seed in range(40):
        factors = unsteady(np.random.default_rng(seed), NUM_CHAINS)
        doubts = Found(slower=lambda _, factors=factors: factors).doubts()
        found += any(doubt.kind == Kind.DRIFT for doubt in doubts)
    # One in ten may look as if; that leaves room for six of forty by luck.
    assert found <= 6


def test_find_doubts_come_in_the_order_of_their_kinds() -> None:
    many = Found(
        num_chains=10,
        dispatch_share=0.99,
        usage={"others_cores": 1.0, "swapped_bytes": 1},
        slot={"dropped": 1, "settled": False},
    )
    order = list(Kind)
    found = [order.index(doubt.kind) for doubt in many.doubts()]
    assert found == sorted(found)
    assert len(found) == 6


def test_find_doubts_without_long_chains_are_still_found() -> None:
    empty = Found(num_chains=0, usage={"others_cores": 1.0})
    assert [doubt.kind for doubt in empty.doubts()] == [Kind.LOAD, Kind.FEW]


# --- The real stepper -----------------------------------------------------------------------------


def doubts_of(executable: Callable, init: Callable, *, steps: int, num_chains: int) -> set[Kind]:
    """Times a step as the rounds do and returns what is doubtful about it."""
    slot = Slot(name="one", stepper=Stepper(executable, init), settled=True)
    slot.stepper.chain(steps=2)
    for number in range(num_chains):
        slot.run(number, steps, dict)
    assert slot.failure is None
    return {doubt.kind for doubt in find_doubts(slot, session_of(slot), QUIET)}


def test_find_doubts_step_that_waits_on_the_host_is_dispatch_bound() -> None:
    add = jax.jit(lambda state, batch: (state + batch, state))

    def sleepy(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        time.sleep(0.01)
        return add(state, batch)

    kinds = doubts_of(sleepy, lambda _: (jnp.zeros(()), jnp.ones(())), steps=4, num_chains=6)
    assert Kind.DISPATCH in kinds


def test_find_doubts_step_of_products_is_not_dispatch_bound() -> None:
    size, turns = 512, 4

    def products(state: jax.Array, batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        for _ in range(turns):
            state = state @ batch
        return state, state[0, 0]

    def init(_: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.ones((size, size)), jnp.eye(size)

    compiled = jax.jit(products, donate_argnums=0).lower(*init(jax.random.key(0))).compile()
    kinds = doubts_of(compiled, init, steps=8, num_chains=6)
    assert Kind.DISPATCH not in kinds
