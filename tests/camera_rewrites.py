"""Values for the parameters of a network, and its loss and gradient, to compare exact rewrites."""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbench.candidate import Candidate
from jaxbench.discovery import load_candidate
from jaxbench.program import make_batch


def find(name: str) -> Candidate:
    return load_candidate(f"jaxbench.models.{name.split('-')[0]}", name)


def count_parameters(candidate: Candidate, part: str | None = None) -> int:
    """Parameters of the network, or of one of its attributes; a path is dotted."""
    module = abstract(candidate)
    for attribute in part.split(".") if part else ():
        module = getattr(module, attribute)
    leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
    return sum(math.prod(leaf.shape) for leaf in leaves)


def abstract(candidate: Candidate) -> Any:
    with nnx.use_eager_sharding(False):
        return nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))


def values(shapes: Any, seed: int = 0) -> Any:
    """Draws parameters: scales near 1, kernels by fan-in, small biases."""
    draw = np.random.default_rng(seed).standard_normal

    def fill(path: Any, leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        noise = draw(leaf.shape)
        if "scale" in name or "variance" in name:
            value = 1 + 0.1 * noise if "scale" in name else np.ones(leaf.shape)
        elif "bias" in name or "mean" in name or "prior" in name:
            value = 0.1 * noise
        else:
            value = noise / math.sqrt(math.prod(leaf.shape[-4:-1]) or 1)
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def compare(one: Candidate, other: Candidate, *, tolerance: float) -> None:
    """Holds loss and gradient of two candidates with the same parameters to each other.

    The error of each gradient is that of its norm, to which `tolerance` is relative.
    """
    (loss, gradient), (loss2, gradient2) = (loss_and_gradient(given) for given in (one, other))
    assert abs(loss2 - loss) < tolerance * abs(loss)
    leaves, leaves2 = jax.tree.leaves(gradient), jax.tree.leaves(gradient2)
    assert len(leaves) == len(leaves2)
    whole = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in leaves))
    for leaf, leaf2 in zip(leaves, leaves2, strict=True):
        # Some gradients are zero but for rounding; those are held to the whole gradient.
        size = max(float(np.linalg.norm(leaf)), 1e-3 * whole)
        assert float(np.linalg.norm(leaf2 - leaf)) < tolerance * size


@functools.lru_cache(maxsize=4)
def loss_and_gradient(candidate: Candidate) -> tuple[float, Any]:
    """Loss and gradient in float32; the family's DTYPE must be patched to it."""
    family = importlib.import_module(candidate.build.__module__)
    assert np.dtype(family.DTYPE) == np.float32
    graphdef, params, rest = nnx.split(abstract(candidate), nnx.Param, ...)
    batch = make_batch(candidate.workload, jax.random.key(1))

    def loss(params: Any) -> Any:
        return candidate.loss(nnx.merge(graphdef, params, values(rest)), batch)

    quick = {"xla_backend_optimization_level": 0}
    step = jax.jit(jax.value_and_grad(loss), compiler_options=quick)
    found, gradient = jax.device_get(step(values(params)))
    return float(found), gradient
