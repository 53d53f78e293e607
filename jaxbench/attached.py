"""Which of the targets stand in this machine, so that their steps can be timed.

The CPU always does. NVIDIA GPUs are asked for through JAX, in a worker of their own. A TPU lets one
process at a time use it, and a session needs several side by side, so TPUs are not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path

from jaxbench.errors import JaxbenchError, UsageError
from jaxbench.target import Chip, Target, chip_table
from jaxbench.worker import call_in_worker

# Any of them means an NVIDIA driver: Linux, containers, Windows' subsystem for Linux.
_SIGNS = (Path("/proc/driver/nvidia/gpus"), Path("/dev/nvidia0"), Path("/dev/dxg"))
_LIBRARIES = "pip install 'jaxbench[cuda]' brings the CUDA libraries that running needs"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The GPUs of this machine, all of one model.

    Attributes:
      model: Its name by the driver, such as `NVIDIA H100 80GB HBM3`.
      num_cores: Streaming multiprocessors of one.
    """

    model: str
    num_cores: int
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.model} with {self.num_cores} multiprocessors"

    def are(self, chip: Chip) -> bool:
        """Tells whether they are such chips: the PCIe and the SXM form share most of a name."""
        words = re.findall(r"[a-z0-9]+", self.model.lower())
        return chip.name.removeprefix("gpu-") in words and self.num_cores == chip.num_cores


def attach(targets: Sequence[Target], *, needed: bool = True) -> list[Target]:
    """Returns the targets, those marked that are attached; the CPU needs no mark.

    Raises:
      UsageError: if one is `needed` and not one of them can be timed here, with the reason of the
        last.
    """
    found, why = [], ""
    for target in targets:
        reason = why_not_attached(target)
        why = reason or why
        found.append(dataclasses.replace(target, attached=not reason and target.kind != "cpu"))
    if needed and not any(target.can_run for target in found):
        names = ", ".join(dict.fromkeys(target.name for target in targets))
        raise UsageError(
            f"Cannot time steps on {names}: {why}. Take target cpu, or `jaxbench run` without "
            "--measure for predictions."
        )
    return found


def why_not_attached(target: Target) -> str | None:
    """Says why steps cannot be timed on a target here; None if they can."""
    if target.kind == "cpu":
        return None
    if target.kind == "tpu":
        return "a TPU runs for one process at a time, and a session of timing needs several"
    if not any(sign.exists() for sign in _SIGNS):
        return "there is no NVIDIA driver on this machine"
    gpus = _gpus()
    if isinstance(gpus, str):
        return f"JAX cannot use the GPU: {gpus.rstrip('.')}; {_LIBRARIES}"
    if not gpus.are(chip_table()[target.chip]):
        cores = chip_table()[target.chip].num_cores
        return f"attached are {gpus}, and a {target.chip} has {cores}"
    hosts, per_host = target.topology
    if hosts > 1 or per_host > gpus.count:
        return f"attached are {gpus}, fewer than {target.num_devices}"
    return None


@functools.cache
def _gpus() -> Gpus | str:
    """Returns the attached GPUs, or why there are none."""
    try:
        return Gpus(**call_in_worker("jaxbench.attached:describe_gpus"))
    except JaxbenchError as error:
        return str(error)


def describe_gpus() -> dict[str, object]:
    """Describes this machine's GPUs as values for `Gpus`. Runs in a worker.

    Raises:
      RuntimeError: by JAX, if there are none or their libraries are missing.
    """
    import jax

    from jaxbench.compiler import use_attached

    use_attached("gpu")
    first, *others = jax.devices()
    return {
        "model": first.device_kind,
        "num_cores": first.core_count,
        "count": 1 + sum(other.device_kind == first.device_kind for other in others),
    }
