"""Candidates: a network, its configuration and the work it is asked to do, as plain data.

Importing it imports no JAX, so that the process the user started can hold descriptions cheaply.
A candidate file is any Python file with a module-level tuple `CANDIDATES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["train", "forward"]
Validity = Literal["base", "T0", "T1", "T2"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """One array of the batch.

    Attributes:
      shape: Shape of one sample; the batch dim is put before it.
      dtype: NumPy name of the dtype.
      high: Integers are drawn from [0, high); ignored for floating dtypes, which are standard
        normal.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    high: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What is done with a network, knowing no device.

    Attributes:
      kind: `train` is loss, gradient and optimiser update; `forward` is the loss alone.
      global_batch: Samples in one step, over all devices.
      inputs: Name and description of each array of the batch.
      dtype: Dtype that products are computed in; parameters are float32.
      optimizer: Name of an Optax optimiser that takes a learning rate.
    """

    kind: Kind = "train"
    global_batch: int
    inputs: tuple[tuple[str, Input], ...]
    dtype: str = "bfloat16"
    optimizer: Literal["adamw"] = "adamw"
    learning_rate: float = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One architecture with one configuration and one workload.

    Two candidates of one file differ only in a config field. Candidates with the same `base` and
    size are rivals: equally valid choices for the same place, by the validity class that they
      declare.

    Attributes:
      name: `family-size-change`, unique in its file.
      family: Name of the architecture family, the file's idea.
      size: `cpu` steps in well under a second on two cores; `paper` is a published configuration.
      config: Frozen dataclass; every field changes the program.
      build: `build(config, rngs)` returns the Flax NNX module.
      loss: `loss(module, batch)` returns the scalar float32 loss of a batch (dict of arrays).
      workload: Inputs, global batch, dtype and optimiser.
      base: Name of the candidate that this one is a variant of, its own name if it is the base.
      replaces: What the variant puts in place of what, in words; empty for a base.
      validity: `base`, or the class of the substitution: T0 exact rewrite, T1 same family at equal
        parameters or FLOPs, T2 another mechanism.
      source: Where the configuration was published, or why it is what it is.
    """

    name: str
    family: str
    size: str
    config: Any
    build: Callable[[Any, Any], Any]
    loss: Callable[[Any, dict[str, Any]], Any]
    workload: Workload
    base: str
    replaces: str = ""
    validity: Validity = "base"
    source: str

    def describe(self) -> dict[str, Any]:
        """Returns what can leave the process that loaded the candidate: JSON-ready values."""
        return {
            "name": self.name,
            "family": self.family,
            "size": self.size,
            "config": dataclasses.asdict(self.config),
            "workload": dataclasses.asdict(self.workload),
            "base": self.base,
            "replaces": self.replaces,
            "validity": self.validity,
            "source": self.source,
        }


def constrain(x: Any, axes: tuple[str | None, ...]) -> Any:
    """Asks the partitioner to split an activation by its logical axes, such as ("batch", None).

    Does nothing outside `flax.nnx.logical_axis_rules`. Flax Linen's function for this does nothing
    in a process whose own devices are CPUs, as those of every compile process are; left alone,
    the partitioner may do all of attention on every device.
    """
    from flax.core.spmd import get_logical_axis_rules
    from jax.lax import with_sharding_constraint
    from jax.sharding import PartitionSpec

    rules = dict(get_logical_axis_rules() or ())
    if not rules:
        return x
    return with_sharding_constraint(x, PartitionSpec(*(rules.get(axis or "") for axis in axes)))
