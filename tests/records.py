"""Records made by hand, as the stages would have filled them."""

from collections.abc import Sequence
from typing import Any

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
