"""Records made by hand, as the stages would have filled them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbench.measure.protocol import PLANTED_SHARE
from jaxbench.record import Record


def make_record(
    candidate: str = "net-cpu-one",
    target: str = "tpu-v5e",
    *,
    base: str = "net-cpu-one",
    hlo_s: float | None = None,
    compiler_s: float | None = None,
    samples_s: Sequence[float] | None = None,
    model_flops: float = 1e9,
    samples_per_s: float | None = None,
    failure: dict[str, Any] | None = None,
    **fields: Any,
) -> Record:
    """Makes a record with the given signals."""
    step_s = compiler_s or hlo_s
    values: dict[str, Any] = {
        "id": f"{candidate}@{target}",
        "family": "net",
        "size": "cpu",
        "replaces": "",
        "validity": "base" if candidate == base else "T1",
        "source": "made up for tests",
        "source_sha256": "0" * 64,
        "config": {},
        "workload": {"kind": "train", "global_batch": 8},
        "layout": "data=1",
        "num_devices": 1,
        "versions": {"jax": "0.0.1"},
        "hlo_sha256": f"program of {candidate} on {target}",
        "cost": {"model_flops": model_flops},
        "prediction": None if hlo_s is None else {"hlo_s": hlo_s, "step_s": step_s},
        "compiler": None if compiler_s is None else {"step_s": compiler_s},
        "measurement": None if samples_s is None else {"samples_s": list(samples_s)},
        "samples_per_s": samples_per_s,
        "samples_per_s_from": "measurement" if samples_s else "prediction",
        "failure": failure,
    }
    return Record(candidate=candidate, target=target, base=base, **{**values, **fields})


def make_measurement(
    step_s: float,
    *,
    session: str = "session",
    rounds: int = 24,
    noise: float = 0.002,
    seed: int = 0,
    same: float = 1.0,
    planted: float = 1 + PLANTED_SHARE,
    **fields: Any,
) -> dict[str, Any]:
    """Makes what a session says of one candidate: two chains of ten steps a round.

    Args:
      noise: Of each chain, and of the controls.
      same: What the control that must show nothing shows.
      planted: What the control that must show `PLANTED_SHARE` shows.
    """
    generator = np.random.default_rng(seed)

    def noisy(value: float, size: int) -> list[float]:
        return (value * np.exp(noise * generator.normal(size=size))).tolist()

    steps = noisy(step_s, 2 * rounds)
    return {
        "session": session,
        "ended": "budget",
        "samples_s": steps,
        "chains": [[place // 2, 10, 10 * one, one, 10 * one] for place, one in enumerate(steps)],
        "controls": {
            "planted_share": PLANTED_SHARE,
            "same": noisy(same, math.ceil(rounds / 2)),
            "planted": noisy(planted, rounds // 2),
        },
        **fields,
    }
