"""Exact rewrites: the same values in, the same loss and gradients out, in float32. In a worker."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbench.candidate import Candidate
from jaxbench.discovery import load_described
from jaxbench.errors import DataError
from jaxbench.program import make_batch
from jaxbench.quality.shards import Data, read_data
from jaxbench.quality.tasks import find_task, fit_to_data

TOLERANCE = 1e-4  # relative, in float32: sums in another order differ by some 1e-7 of their terms
_SMALL = 0.01  # of the whole gradient: below this a parameter's gradient may be rounding alone
_FRAMES = 2

Values = dict[tuple[Any, ...], np.ndarray]


def check_rewrite(
    *, described: Mapping[str, Any], base: Mapping[str, Any], data: str
) -> dict[str, Any]:
    """Compares loss and gradient of a network with its base's, on random and on real batches.

    Returns:
      `exact`; `loss_error` and `gradient_error`, the largest relative ones; and `reason`.
    """
    frames = read_data(Path(data))
    network, origin = (
        fit_to_data(load_described(one), frames.train, frames.about) for one in (described, base)
    )
    try:
        # Layers take their dtype when they are made, functions when they are traced.
        with _in_float32():
            errors = [
                _compare(network, origin, batch)
                for batch in _batches(origin, frames.train, frames.about)
            ]
    except DataError as error:
        return {"exact": False, "reason": str(error)}
    loss_error, gradient_error = (max(column) for column in zip(*errors, strict=True))
    exact = max(loss_error, gradient_error) <= TOLERANCE
    reason = (
        f"loss within {loss_error:.1e} and gradient within {gradient_error:.1e} of the base's, "
        f"relative, in float32; {'below' if exact else 'above'} {TOLERANCE:.0e}"
    )
    if not exact:
        moved = _sensitivity(origin, frames)
        reason += f"; one rounding of all values moves the base's own by {moved:.1e}"
    return {
        "exact": exact,
        "loss_error": loss_error,
        "gradient_error": gradient_error,
        "reason": reason,
    }


def _batches(origin: Candidate, arrays: Any, about: Any) -> Iterator[dict[str, Any]]:
    yield make_batch(origin.workload, jax.random.key(1))
    few = {name: array[:_FRAMES] for name, array in arrays.items()}
    prepared = find_task(origin).prepare(few, about, origin)
    yield {name: jnp.asarray(array) for name, array in prepared.items()}


def _compare(network: Candidate, origin: Candidate, batch: dict[str, Any]) -> tuple[float, float]:
    """Returns the relative errors of loss and gradient."""
    values = _draw(origin)
    wanted, slopes = _run(origin, values, batch)
    paths = [path for path, _ in nnx.to_flat_state(_abstract(network)[1])]
    found, found_slopes = _run(network, deal(values, paths), batch)
    error = _gradient_error(deal(slopes, paths), found_slopes)
    return abs(found - wanted) / max(abs(wanted), 1e-9), error


def _sensitivity(origin: Candidate, frames: Data) -> float:
    """Returns how far the base's gradient moves on its own when values move by one rounding.

    Beside a rectifier's corner it may be further than any tolerance; then nothing is proved either
    way, and training has to tell.
    """
    values, random = _draw(origin), np.random.default_rng(1)
    moved = {
        path: np.nextafter(value, np.where(random.random(value.shape) < 0.5, -np.inf, np.inf))
        for path, value in values.items()
    }
    worst = 0.0
    with _in_float32():
        for batch in _batches(origin, frames.train, frames.about):
            slopes, others = (_run(origin, these, batch)[1] for these in (values, moved))
            worst = max(worst, _gradient_error(slopes, others))
    return worst


def _gradient_error(slopes: Values, found: Values) -> float:
    """Largest relative error of a parameter's gradient."""
    length = math.sqrt(sum(float(np.sum(slope**2)) for slope in slopes.values()))
    return max(
        float(np.linalg.norm(found[path] - slope))
        / max(float(np.linalg.norm(slope)), _SMALL * length, 1e-30)
        for path, slope in slopes.items()
    )


def deal(values: Values, paths: Iterable[tuple[Any, ...]]) -> Values:
    """Returns values for other paths; what is stacked for a loop is dealt out to its layers.

    Raises:
      DataError: if a parameter has no counterpart of its shape.
    """
    dealt: Values = {}
    for path in paths:
        if path in values:
            dealt[path] = values[path]
            continue
        at = next((at for at, key in enumerate(path) if isinstance(key, int)), None)
        stacked = None if at is None else values.get((*path[:at], *path[at + 1 :]))
        if at is None or stacked is None:
            raise DataError(f"Parameter {'.'.join(map(str, path))} has no counterpart in the base.")
        dealt[path] = stacked[path[at]]
    return dealt


def _draw(candidate: Candidate) -> Values:
    """Draws values of all parameters, none of them a start that switches a part off."""
    random, values = np.random.default_rng(0), {}
    for path, leaf in nnx.to_flat_state(_abstract(candidate)[1]):
        noise = random.standard_normal(leaf.shape, np.float32)
        fan_in = math.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        values[path] = noise * np.float32(fan_in**-0.5) + np.float32("scale" in path)
    return values


def _abstract(candidate: Candidate) -> tuple[Any, Any, Any]:
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: candidate.build(candidate.config, nnx.Rngs(params=0)))
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    return graph, params, rest


def _run(candidate: Candidate, values: Values, batch: Any) -> tuple[float, Values]:
    """Returns the loss and its gradient by path."""
    graph, params, rest = _abstract(candidate)
    for path, leaf in nnx.to_flat_state(params):
        if values[path].shape != leaf.shape:
            raise DataError(
                f"Parameter {'.'.join(map(str, path))} has the shape {leaf.shape}, "
                f"{values[path].shape} in the base: no exact rewrite of it."
            )
    params = nnx.from_flat_state(
        [
            (path, leaf.replace(jnp.asarray(values[path])))
            for path, leaf in nnx.to_flat_state(params)
        ]
    )
    rest = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rest)

    def loss(params: Any) -> Any:
        own = jax.tree.map(lambda leaf: leaf, rest)
        return candidate.loss(nnx.merge(graph, params, own), batch).astype(jnp.float32)

    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    if "bf16[" in str(traced.jaxpr):
        raise DataError(
            f"{candidate.name} computes in bfloat16 whatever its file's DTYPE says, so that no "
            "rewrite of it can be proved. Name the dtype in DTYPE alone."
        )
    value, gradient = traced.lower().compile()(params)
    return float(value), {path: np.asarray(g[...]) for path, g in nnx.to_flat_state(gradient)}


@contextlib.contextmanager
def _in_float32() -> Iterator[None]:
    """Makes families that name their dtype in `DTYPE` compute in float32."""
    with contextlib.ExitStack() as stack:
        for module in list(sys.modules.values()):
            if getattr(module, "DTYPE", None) is jnp.bfloat16:
                stack.enter_context(mock.patch.object(module, "DTYPE", jnp.float32))
        yield
