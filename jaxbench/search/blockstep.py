"""A block's part of the training step as a program, and what the compilers make of it.

Runs in worker processes. Forward pass, backward pass from a given cotangent, and the optimiser's
update are one program, as they are in a step; what the rest of the network would hand over are
arguments.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jaxbench import cache
from jaxbench.candidate import Workload
from jaxbench.compiler import (
    Compiled,
    compile_program,
    compiled_key,
    make_mesh,
    platform_of,
    unpack_compiled,
)
from jaxbench.cost import price_module
from jaxbench.hlo import read_module
from jaxbench.layout import Layout, parse_layout
from jaxbench.mathematics import Mathematics, count_mathematics
from jaxbench.predict import predict_step
from jaxbench.program import (
    count_residuals,
    initial_state,
    make_optimizer,
    shard_state,
    trace_step,
    use_mesh,
)
from jaxbench.search.block import Array, Block
from jaxbench.target import Target, chip_table, parse_target


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """What a block is before any compiler has seen it; FLOPs and bytes of the whole batch.

    Attributes:
      activation_bytes: What its backward pass keeps of its forward pass, parameters left out.
    """

    num_params: int
    forward_flops: int
    activation_bytes: int


def weigh_block(block: Block) -> Weight:
    """Traces a block's forward pass abstractly and counts."""
    graphdef, params, rest = _abstract_module(block)
    arguments = [jax.ShapeDtypeStruct(one.shape, _dtype(one)) for one in block.inputs]

    def forward(params: Any, rest: Any, *arrays: Any) -> Any:
        return _call(graphdef, params, rest, arrays)[0]

    traced = jax.jit(forward).trace(params, rest, *arguments)
    # A new function object: JAX keeps traces by function, and the second one must be another.
    again = functools.partial(forward)
    counted = count_mathematics(
        lambda: jax.jit(again).trace(params, rest, *arguments), traced.jaxpr
    )
    return Weight(
        num_params=sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)),
        forward_flops=counted.flops,
        activation_bytes=count_residuals(forward, params, (rest, *arguments)),
    )


def price_block(
    block: Block,
    *,
    workload: Workload,
    layout: str,
    target: str,
    cpu_peaks: Mapping[str, float] | None,
    forward_only: bool = False,
) -> dict[str, Any]:
    """Compiles a block's part of the step and predicts what it takes.

    Returns:
      `step_s`, `peak_bytes` and `compile_s`, JSON-ready.
    """
    aimed, mesh_layout = parse_target(target), parse_layout(layout)
    lowered, model = _lower(block, workload, mesh_layout, aimed, forward_only=forward_only)
    sha256 = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    compiled = _compiled(lowered, sha256, aimed)
    module = read_module(compiled.hlo)
    cost = price_module(module, mxu=chip_table()[aimed.chip].mxu)
    prediction = predict_step(
        cost,
        aimed,
        model_flops=model.flops / aimed.num_devices,
        dtype=workload.dtype,
        cpu_peaks=cpu_peaks,
    )
    return {
        "step_s": prediction.step_s,
        "peak_bytes": compiled.memory.peak_bytes,
        "compile_s": compiled.compile_s,
    }


def _compiled(lowered: Any, sha256: str, target: Target) -> Compiled:
    key = compiled_key(sha256, target)
    packed = cache.read_entry("compiled", key)
    if packed is not None:
        return unpack_compiled(packed)
    compiled, _ = compile_program(lowered, sha256, target, quick_code=True)
    cache.write_entry("compiled", key, compiled.pack())
    return compiled


def _lower(
    block: Block, workload: Workload, layout: Layout, target: Target, *, forward_only: bool
) -> tuple[Any, Mathematics]:
    """Traces and lowers; also counts the mathematics."""
    mesh, rules = make_mesh(target, layout), layout.rules()
    graphdef, params, rest = _abstract_module(block)
    workload = dataclasses.replace(workload, kind="forward") if forward_only else workload
    state = jax.eval_shape(lambda p, r: initial_state(workload, p, r), params, rest)
    batch = NamedSharding(mesh, PartitionSpec(dict(rules)["batch"]))
    arrays = [jax.ShapeDtypeStruct(one.shape, _dtype(one), sharding=batch) for one in block.inputs]
    with nnx.logical_axis_rules(rules):
        state = shard_state(state, rules, mesh)
        with use_mesh(mesh):
            out = jax.eval_shape(lambda p, r, a: _call(graphdef, p, r, a)[0], params, rest, arrays)
        if forward_only:
            step, arguments = _forward_step(graphdef), (state, arrays)
        else:
            cotangents = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, leaf.dtype, sharding=batch if leaf.shape else None
                ),
                out,
            )
            step, arguments = _train_step(graphdef, block, workload), (state, arrays, cotangents)
        traced = trace_step(step, arguments, mesh)
        again = functools.partial(step)
        counted = count_mathematics(lambda: trace_step(again, arguments, mesh), traced.jaxpr)
    return traced.lower(lowering_platforms=(platform_of(target),)), counted


def _forward_step(graphdef: Any) -> Callable:
    def step(state: Any, arrays: Any) -> Any:
        return _call(graphdef, state["params"], state["rest"], arrays)[0]

    return step


def _train_step(graphdef: Any, block: Block, workload: Workload) -> Callable:
    optimizer = make_optimizer(workload)
    smooth = [index for index, one in enumerate(block.inputs) if _is_smooth(one)]

    def step(state: Any, arrays: Any, cotangents: Any) -> Any:
        def of(params: Any, moving: Any) -> Any:
            return _call(graphdef, params, state["rest"], _put(arrays, smooth, moving))

        out, backward, rest = jax.vjp(
            of, state["params"], [arrays[index] for index in smooth], has_aux=True
        )
        gradient, moving = backward(cotangents)
        with jax.named_scope("optimizer"):
            updates, moments = optimizer.update(gradient, state["optimizer"], state["params"])
            params = jax.tree.map(lambda a, b: a + b, state["params"], updates)
        return {"params": params, "rest": rest, "optimizer": moments}, (out, moving)

    return step


def _call(graphdef: Any, params: Any, rest: Any, arrays: Any) -> tuple[Any, Any]:
    # Variables can be changed only at the trace level that made them.
    module = nnx.merge(graphdef, params, jax.tree.map(lambda leaf: leaf, rest))
    out = module(*arrays)
    return out, nnx.split(module, nnx.Param, ...)[2]


def _abstract_module(block: Block) -> tuple[Any, Any, Any]:
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: block.build(nnx.Rngs(params=0), **block.arguments))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    return graphdef, params, rest


def _put(arrays: Any, places: list[int], values: Any) -> list[Any]:
    arrays = list(arrays)
    for place, value in zip(places, values, strict=True):
        arrays[place] = value
    return arrays


def _is_smooth(one: Array) -> bool:
    return one.gradient and jnp.issubdtype(_dtype(one), jnp.floating)


def _dtype(one: Array) -> Any:
    return jnp.dtype(one.dtype)
