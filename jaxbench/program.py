"""Programs: the whole step of a candidate as a traced function with abstract, sharded arguments.

Nothing is allocated: parameters, optimiser state and batch are shapes with shardings, so that a
network of any size can be traced on any machine.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxbench.candidate import Candidate, Workload
from jaxbench.errors import LayoutError
from jaxbench.layout import Layout, check_batch
from jaxbench.mathematics import Mathematics, count_mathematics


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A step, its abstract arguments and what they say before any compiler has seen them.

    Attributes:
      lowered: The step as StableHLO, ready to compile.
      sha256: Digest of the StableHLO text, the program's identity.
      init: Makes concrete state and batch of the same structure from a seed; jit it where it shall
        live.
      mathematics: FLOPs and bytes of the whole step over all devices, from the traced function.
      num_params: Parameters of the network.
      trace_s, lower_s: Wall seconds spent.
    """

    lowered: jax.stages.Lowered
    sha256: str
    init: Callable[[jax.Array], tuple[Any, Any]]
    mathematics: Mathematics
    num_params: int
    trace_s: float
    lower_s: float


def build_program(candidate: Candidate, layout: Layout, mesh: Any, platform: str) -> Program:
    """Traces and lowers the candidate's step for a mesh.

    Args:
      candidate: Network and workload.
      layout: Resolved layout, whose axes are the mesh's.
      mesh: `Mesh` of real or compile-only devices, or an `AbstractMesh`.
      platform: `cpu`, `tpu` or `cuda`.

    Raises:
      LayoutError: if the batch or a parameter does not divide over the mesh.
    """
    check_batch(layout, candidate.workload.global_batch)
    start = time.perf_counter()
    graphdef, params, rest = _abstract_network(candidate)
    workload = candidate.workload
    step, make = _make_step(candidate, graphdef)
    rules = layout.rules()
    with nnx.logical_axis_rules(rules):
        state = jax.eval_shape(lambda p, r: initial_state(workload, p, r), params, rest)
        batch = jax.eval_shape(lambda: make_batch(workload, jax.random.key(0)))
        arguments = (shard_state(state, rules, mesh), _shard_batch(batch, rules, mesh))
        traced = trace_step(step, arguments, mesh)
        # A new function object: JAX keeps traces by function, and the second one must be another.
        again = functools.partial(step)
        mathematics = count_mathematics(lambda: trace_step(again, arguments, mesh), traced.jaxpr)
    traced_at = time.perf_counter()
    lowered = traced.lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    return Program(
        lowered=lowered,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        init=make,
        mathematics=mathematics,
        num_params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"])),
        trace_s=traced_at - start,
        lower_s=time.perf_counter() - traced_at,
    )


def count_forward(candidate: Candidate) -> dict[str, int]:
    """Counts parameters and the product FLOPs of one sample's forward pass and loss.

    FLOPs are those of the whole batch over its samples, as work that all samples share exists.
    """
    graphdef, params, rest = _abstract_network(candidate)
    workload = dataclasses.replace(candidate.workload, kind="forward")
    forward, _ = _make_step(dataclasses.replace(candidate, workload=workload), graphdef)
    state = {"params": params, "rest": rest}
    batch = jax.eval_shape(lambda: make_batch(workload, jax.random.key(0)))
    traced = jax.jit(forward).trace(state, batch)
    # A new function object, as in `build_program`.
    again = functools.partial(forward)
    mathematics = count_mathematics(lambda: jax.jit(again).trace(state, batch), traced.jaxpr)
    return {
        "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        "forward_flops": mathematics.flops // workload.global_batch,
    }


def count_activations(candidate: Candidate) -> int:
    """Counts the bytes that the backward pass of one batch keeps of its forward pass."""
    graphdef, params, rest = _abstract_network(candidate)
    forward, _ = _make_step(
        dataclasses.replace(
            candidate, workload=dataclasses.replace(candidate.workload, kind="forward")
        ),
        graphdef,
    )
    batch = jax.eval_shape(lambda: make_batch(candidate.workload, jax.random.key(0)))

    def loss(params: Any, rest: Any, batch: Any) -> Any:
        return forward({"params": params, "rest": rest}, batch)

    return count_residuals(loss, params, (rest, batch))


def count_residuals(function: Callable, params: Any, others: tuple[Any, ...]) -> int:
    """Counts the bytes that the gradient of `function(params, *others)` keeps, less parameters.

    Others count as constants, so what is kept of them alone is left out.
    """

    def keep(params: Any, *others: Any) -> Any:
        return jax.vjp(lambda p: function(p, *others), params)[1]

    kept = jax.tree.leaves(jax.eval_shape(keep, params, *others))
    total = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in kept)
    own = sum(math.prod(leaf.shape) * 4 for leaf in jax.tree.leaves(params))
    return max(0, total - own)


def trace_step(step: Callable, arguments: tuple[Any, ...], mesh: Any) -> Any:
    """Traces `step(state, ...)` on a mesh; a training step returns the next state first."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments[0])
    out = (shardings, None) if "optimizer" in arguments[0] else None
    # The batch is read again in the next step of a chain, so only the state is donated.
    donate = (0,) if out else ()
    with use_mesh(mesh):
        return jax.jit(step, donate_argnums=donate, out_shardings=out).trace(*arguments)


def use_mesh(mesh: Any) -> Any:
    """Returns the context in which shardings by axis name mean this mesh, real or abstract."""
    abstract = isinstance(mesh, jax.sharding.AbstractMesh)
    return jax.sharding.use_abstract_mesh(mesh) if abstract else jax.set_mesh(mesh)


def _abstract_network(candidate: Candidate) -> tuple[Any, Any, Any]:
    """Returns graph, parameters and other state, as shapes."""
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return graphdef, params, rest


def make_optimizer(workload: Workload) -> optax.GradientTransformation:
    """Makes the workload's optimiser."""
    return getattr(optax, workload.optimizer)(workload.learning_rate)


def initial_state(workload: Workload, params: Any, rest: Any) -> dict[str, Any]:
    """Returns what a step changes: parameters, other state and, if it trains, moments."""
    state = {"params": params, "rest": rest}
    if workload.kind == "train":
        state["optimizer"] = make_optimizer(workload).init(params)
    return state


def _make_step(candidate: Candidate, graphdef: Any) -> tuple[Callable, Callable]:
    """Returns `step(state, batch)` and `make(key) -> (state, batch)`."""
    workload, optimizer = candidate.workload, make_optimizer(candidate.workload)

    def loss_of(params: Any, rest: Any, batch: Any) -> tuple[Any, Any]:
        # Variables can be changed only at the trace level that made them: batch statistics are made
        # anew here.
        module = nnx.merge(graphdef, params, jax.tree.map(lambda leaf: leaf, rest))
        value = candidate.loss(module, batch)
        return value.astype(jnp.float32), nnx.split(module, nnx.Param, ...)[2]

    def train(state: Any, batch: Any) -> tuple[Any, Any]:
        (value, rest), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            state["params"], state["rest"], batch
        )
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradient, state["optimizer"], state["params"])
            params = optax.apply_updates(state["params"], updates)
        return {"params": params, "rest": rest, "optimizer": moments}, value

    def forward(state: Any, batch: Any) -> Any:
        return loss_of(state["params"], state["rest"], batch)[0]

    def make(key: Any) -> tuple[Any, Any]:
        network_key, batch_key = jax.random.split(key)
        with nnx.use_eager_sharding(False):
            module = candidate.build(candidate.config, nnx.Rngs(params=network_key))
        _, params, rest = nnx.split(module, nnx.Param, ...)
        return initial_state(workload, params, rest), make_batch(workload, batch_key)

    return (train if workload.kind == "train" else forward), make


def make_batch(workload: Workload, key: Any) -> dict[str, Any]:
    """Draws one batch: standard normal where floating, uniform over [0, high) where integer."""
    batch = {}
    for name, given in workload.inputs:
        key, sub = jax.random.split(key)
        shape, dtype = (workload.global_batch, *given.shape), np.dtype(given.dtype)
        if np.issubdtype(dtype, np.integer):
            batch[name] = jax.random.randint(sub, shape, 0, given.high).astype(dtype)
        else:
            batch[name] = jax.random.normal(sub, shape).astype(dtype)
    return batch


def shard_state(state: Any, rules: Any, mesh: Any) -> Any:
    """Puts shardings on parameters by their logical axes; moments follow their parameter."""
    axes_of_rule = dict(rules)

    def sharding(path: Any, leaf: Any) -> Any:
        names = _logical_axes(leaf)
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        spec = [axes_of_rule.get(name) if name else None for name in names or ()]
        _check_divides(jax.tree_util.keystr(path), value.shape, names, spec, mesh)
        shaped = jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )
        return leaf.replace(shaped) if isinstance(leaf, nnx.Variable) else shaped

    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(sharding, state, is_leaf=is_variable)


def _logical_axes(leaf: Any) -> tuple[str | None, ...] | None:
    if not isinstance(leaf, nnx.Variable):
        return None
    metadata = leaf.get_metadata()
    return metadata.get("out_sharding", metadata.get("sharding_names"))


def _check_divides(name: str, shape: Any, names: Any, spec: Any, mesh: Any) -> None:
    for dim, (logical, axes) in enumerate(zip(names or (), spec, strict=True)):
        ways = math.prod(mesh.shape[axis] for axis in axes or ())
        if shape[dim] % ways:
            raise LayoutError(
                f"Parameter {name} has {shape[dim]} along its axis {logical!r}, which "
                f"{'x'.join(axes)}={ways} "
                f"does not divide. Use fewer devices on that mesh axis, or layout data."
            )


def _shard_batch(batch: Any, rules: Any, mesh: Any) -> Any:
    axes = dict(rules)["batch"]
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for name, leaf in batch.items()
    }
