"""Exact rewrites: one set of values, one batch, two programs, the same loss and gradient."""

import functools
import math
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbench.candidate import Candidate
from jaxbench.discovery import load_candidate
from jaxbench.mathematics import count_mathematics
from jaxbench.program import make_batch

Path = tuple[Any, ...]
Values = dict[Path, np.ndarray]
# LLVM unoptimised: most of the time would go into code that runs once.
QUICK = {"xla_backend_optimization_level": 0}
# Sums in another order, in float32: some 1e-7 of what is summed, with cancellation in between.
TOLERANCE = 1e-4


def abstract(candidate: Candidate) -> Any:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))


def find(name: str) -> Candidate:
    return load_candidate(f"jaxbench.models.{name.split('-')[0]}", name)


def count_parameters(candidate: Candidate, part: str | None = None) -> int:
    """Parameters of the network, or of one of its attributes; a path is dotted."""
    module = abstract(candidate)
    for attribute in part.split(".") if part else ():
        module = getattr(module, attribute)
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def forward_flops(candidate: Candidate, *shapes: tuple[tuple[int, ...], Any]) -> int:
    """FLOPs of the network's products when it is called with arrays of these shapes and dtypes."""
    graph, state = nnx.split(abstract(candidate))
    arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]

    def trace() -> Any:
        def forward(state: Any, *arrays: Any) -> Any:
            return nnx.merge(graph, state)(*arrays)

        return jax.jit(forward).trace(state, *arrays)

    return count_mathematics(trace, trace().jaxpr).flops


def count_macs(jaxpr: Any) -> int:
    """Multiplications of products, those with padding too, as published counts have it."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("conv_general_dilated", "dot_general"):
            # Kernels and matrices have the output's channels last.
            kernel, out = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
            total += math.prod(out) * math.prod(kernel[:-1])
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(count_macs(sub) for sub in inner if hasattr(sub, "eqns"))
    return total


def forward_macs(module: Any, shape: tuple[int, ...]) -> int:
    """Multiplications of an abstract convolutional network called on images of that shape."""
    graph, state = nnx.split(module)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    traced = jax.make_jaxpr(lambda state, images: nnx.merge(graph, state)(images))(state, images)
    return count_macs(traced.jaxpr)


def draw(candidate: Candidate, seed: int = 0) -> Values:
    """Values of all parameters, none of them at a start that switches a part off."""
    random = np.random.default_rng(seed)
    values = {}
    for path, leaf in nnx.to_flat_state(nnx.state(abstract(candidate), nnx.Param)):
        noise = random.standard_normal(leaf.shape, np.float32)
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        values[path] = noise * np.float32(fan_in**-0.5) + np.float32("scale" in path)
    return values


def fill(candidate: Candidate, values: Values) -> Any:
    """The network with these values of its parameters; other state is zero."""
    graph, state, rest = nnx.split(abstract(candidate), nnx.Param, ...)
    given = [
        (path, leaf.replace(jnp.asarray(values[path]))) for path, leaf in nnx.to_flat_state(state)
    ]
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)
    return nnx.merge(graph, nnx.from_flat_state(given), rest)


def compiled_call(candidate: Candidate, values: Values) -> Callable[..., Any]:
    """The network with these values as a compiled function of its inputs.

    A loop over layers takes variables of its own trace only, so they are handed in.
    """
    graph, state = nnx.split(fill(candidate, values))

    def call(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs)

    return functools.partial(jax.jit(call, compiler_options=QUICK), state)


def deal(values: Values, like: Iterable[Path]) -> Values:
    """Deals what is stacked for a loop over layers out to the layers written out."""
    dealt = {}
    for path in like:
        if path in values:
            dealt[path] = values[path]
            continue
        # The first number in the path of a layer written out is its place in the stack.
        at = next(at for at, key in enumerate(path) if isinstance(key, int))
        dealt[path] = values[(*path[:at], *path[at + 1 :])][path[at]]
    return dealt


def run(module: ModuleType, candidate: Candidate, values: Values, batch: Any) -> Any:
    """The loss and its gradient, by path."""
    with mock.patch.object(module, "DTYPE", jnp.float32):
        graph, state, rest = nnx.split(fill(candidate, values), nnx.Param, ...)

        def loss(state: Any) -> Any:
            # Averages can be changed only at the trace level that made them.
            own = jax.tree.map(lambda leaf: leaf, rest)
            return candidate.loss(nnx.merge(graph, state, own), batch)

        step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
        value, gradient = step(state)
    return float(value), {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(gradient)}


def check_rewrites(
    module: ModuleType,
    base: Candidate,
    variants: Iterable[Candidate],
    *,
    carry: Callable[[Values, Iterable[Path]], Values] = deal,
) -> None:
    """Asserts that each variant has the base's loss and gradient; `carry` takes values to it."""
    values, batch = draw(base), make_batch(base.workload, jax.random.key(1))
    wanted, slopes = run(module, base, values, batch)
    length = sum(float(np.sum(slope**2)) for slope in slopes.values()) ** 0.5
    assert length > 0
    for variant in variants:
        paths = [path for path, _ in nnx.to_flat_state(nnx.state(abstract(variant), nnx.Param))]
        found, found_slopes = run(module, variant, carry(values, paths), batch)
        assert found == pytest.approx(wanted, rel=TOLERANCE), variant.name
        for path, slope in carry(slopes, paths).items():
            # A gradient may be nothing but rounding: a bias of keys moves all scores alike.
            scale = max(float(np.linalg.norm(slope)), 0.01 * length)
            error = float(np.linalg.norm(found_slopes[path] - slope))
            assert error < TOLERANCE * scale, (variant.name, path)
