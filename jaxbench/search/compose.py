"""Steps composed from block prices, and how well that agrees with whole compiles.

step = c0 + sum over kinds of c_k x seconds of the kind's blocks

Blocks compiled alone miss what the compiler does across their borders, and each carries what a
step costs whatever is in it. The coefficients, near 1, are fitted to networks compiled whole, by
least relative squares with a ridge towards (0, 1, ..., 1); the ridge is the one that predicts each
network best from the others. That leave-one-out error is what is reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

_RIDGES = tuple(10.0**power for power in range(-4, 3))
_NO_FIT = 4  # networks below which nothing is fitted


@dataclass(frozen=True, kw_only=True, slots=True)
class Composition:
    """How one target's steps are composed.

    Attributes:
      constant_s: Of every step.
      coefficients: By kind of block; 1 where a kind was not seen.
      signed_errors: composed / whole - 1 of each network compiled whole, composed from a fit
        without it.
      plain_errors: The same with no fit: sums of block prices.
    """

    constant_s: float
    coefficients: Mapping[str, float]
    signed_errors: tuple[float, ...]
    plain_errors: tuple[float, ...]

    @property
    def errors(self) -> tuple[float, ...]:
        """Sizes of the errors."""
        return tuple(map(abs, self.signed_errors))

    @property
    def median_error(self) -> float:
        """Of composed steps against whole compiles."""
        return statistics.median(self.errors) if self.errors else float("inf")

    def step_s(self, by_kind: Mapping[str, float]) -> float:
        """Composes a step from the seconds of its blocks, by kind."""
        return self.constant_s + sum(
            self.coefficients.get(kind, 1.0) * seconds for kind, seconds in by_kind.items()
        )


def fit_composition(blocks: Sequence[Mapping[str, float]], whole_s: Sequence[float]) -> Composition:
    """Fits how steps follow from blocks.

    Args:
      blocks: Seconds by kind, of each network.
      whole_s: Step of the same networks compiled whole.
    """
    plain = [sum(by_kind.values()) for by_kind in blocks]
    plain_errors = tuple(abs(sum_s / s - 1) for sum_s, s in zip(plain, whole_s, strict=True))
    kinds = sorted({kind for by_kind in blocks for kind in by_kind})
    if len(whole_s) < _NO_FIT:
        return Composition(
            constant_s=0.0,
            coefficients=dict.fromkeys(kinds, 1.0),
            signed_errors=tuple(sum_s / s - 1 for sum_s, s in zip(plain, whole_s, strict=True)),
            plain_errors=plain_errors,
        )
    scale = float(np.mean(whole_s))
    # The constant is fitted in units of the mean step, so that the ridge treats all alike.
    rows = np.array([[scale, *(by_kind.get(kind, 0.0) for kind in kinds)] for by_kind in blocks])
    rows = rows / np.asarray(whole_s)[:, None]
    prior = np.array([0.0, *[1.0] * len(kinds)])
    ridge = min(_RIDGES, key=lambda ridge: float(np.median(np.abs(_left_out(rows, prior, ridge)))))
    fitted = _solve(rows, prior, ridge)
    return Composition(
        constant_s=float(fitted[0]) * scale,
        coefficients={kind: float(c) for kind, c in zip(kinds, fitted[1:], strict=True)},
        signed_errors=tuple(float(error) for error in _left_out(rows, prior, ridge)),
        plain_errors=plain_errors,
    )


def _solve(rows: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """Minimises |rows c - 1|^2 + ridge |c - prior|^2."""
    gram = rows.T @ rows + ridge * np.eye(rows.shape[1])
    return prior + np.linalg.solve(gram, rows.T @ (1 - rows @ prior))


def _left_out(rows: np.ndarray, prior: np.ndarray, ridge: float) -> np.ndarray:
    """Prediction - 1 of each row by a fit to the others."""
    gram = rows.T @ rows + ridge * np.eye(rows.shape[1])
    hat = np.einsum("ij,jk,ik->i", rows, np.linalg.inv(gram), rows)
    residual = 1 - rows @ _solve(rows, prior, ridge)
    return -residual / np.maximum(1 - hat, 1e-9)
