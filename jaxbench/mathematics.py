"""What a step costs as mathematics: FLOPs and bytes of the traced function, before any compiler.

Products count, loops are multiplied, rematerialisation does not count: that is the compiler's and
  the author's business, not the network's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr  # pyright: ignore[reportPrivateImportUsage]


@dataclass(frozen=True, kw_only=True, slots=True)
class Mathematics:
    """FLOPs of matrix products and convolutions, and bytes of the step's arguments and results.

    Attributes:
      flops_by_dtype: Product FLOPs by dtype of the left operand.
      io_bytes: Bytes of all arguments and results, each once: what must move at the very least.
    """

    flops_by_dtype: tuple[tuple[str, int], ...]
    io_bytes: int

    @property
    def flops(self) -> int:
        """All product FLOPs."""
        return sum(flops for _, flops in self.flops_by_dtype)


def count_mathematics(trace: Callable[[], Any], jaxpr: Any) -> Mathematics:
    """Counts a traced step; traces again without rematerialisation where the step has any."""
    if _has_remat(jaxpr.jaxpr):
        with _no_remat():
            jaxpr = trace().jaxpr
    flops: dict[str, int] = {}
    _count(jaxpr.jaxpr, 1, flops)
    io_bytes = sum(
        math.prod(aval.shape) * np.dtype(aval.dtype).itemsize
        for aval in (*jaxpr.in_avals, *jaxpr.out_avals)
    )
    return Mathematics(flops_by_dtype=tuple(sorted(flops.items())), io_bytes=io_bytes)


@contextlib.contextmanager
def _no_remat() -> Iterator[None]:
    """Makes `jax.checkpoint` the identity, also where Flax calls it."""

    def identity(function: Callable | None = None, **_: Any) -> Callable:
        return function if function is not None else lambda inner: inner

    with mock.patch.object(jax, "checkpoint", identity), mock.patch.object(jax, "remat", identity):
        yield


def _subjaxprs(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _has_remat(jaxpr: Any) -> bool:
    return any(
        equation.primitive.name in ("checkpoint", "remat2")
        or any(map(_has_remat, _subjaxprs(equation)))
        for equation in jaxpr.eqns
    )


def _count(jaxpr: Any, times: int, flops: dict[str, int]) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            _add(flops, equation, times * _dot_flops(equation))
        elif name == "conv_general_dilated":
            _add(flops, equation, times * _convolution_flops(equation))
        elif name == "cond":
            branches: list[dict[str, int]] = [{} for _ in equation.params["branches"]]
            for branch, counted in zip(equation.params["branches"], branches, strict=True):
                _count(branch.jaxpr, times, counted)
            for dtype, value in max(branches, key=lambda counted: sum(counted.values())).items():
                flops[dtype] = flops.get(dtype, 0) + value
        else:
            inner = times * equation.params["length"] if name == "scan" else times
            for sub in _subjaxprs(equation):
                _count(sub, inner, flops)


def _add(flops: dict[str, int], equation: Any, value: int) -> None:
    dtype = str(equation.invars[0].aval.dtype)
    flops[dtype] = flops.get(dtype, 0) + value


def _dot_flops(equation: Any) -> int:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return (
        2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[dim] for dim in contracting)
    )


def _convolution_flops(equation: Any) -> int:
    """2 x (valid output position, tap) pairs x batch x outputs x inputs a group."""
    params = equation.params
    numbers = params["dimension_numbers"]
    left, right = equation.invars[0].aval.shape, equation.invars[1].aval.shape
    out = equation.outvars[0].aval.shape
    pairs = math.prod(
        _valid_pairs(left[in_], right[tap], out[to], stride, pad[0], base, window)
        for in_, tap, to, stride, pad, base, window in zip(
            numbers.lhs_spec[2:],
            numbers.rhs_spec[2:],
            numbers.out_spec[2:],
            params["window_strides"],
            params["padding"],
            params["lhs_dilation"],
            params["rhs_dilation"],
            strict=True,
        )
    )
    batch, features = out[numbers.out_spec[0]], out[numbers.out_spec[1]]
    return 2 * pairs * batch * features * right[numbers.rhs_spec[1]]


def _valid_pairs(
    size: int, taps: int, outputs: int, stride: int, low: int, base: int, window: int
) -> int:
    """Counts (output, tap) pairs that read a true input, not padding and not a hole."""
    position = np.arange(outputs)[:, None] * stride - low + np.arange(taps) * window
    return int(((position >= 0) & (position <= (size - 1) * base) & (position % base == 0)).sum())
