"""Laws of op times for one machine, fitted to the ops of steps that were measured on it.

A roofline knows peaks; what a machine's kernels make of them it does not. So each class of work has
a law of its own, and a calibration holds the laws of one machine under one version of the compiler.
It is used only where it is given: nothing looks for one.
"""

from __future__ import annotations

import importlib.metadata
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy import optimize, stats

from jaxbench import cache
from jaxbench.errors import UsageError
from jaxbench.machine import describe_environment
from jaxbench.ops import BETWEEN, OpRow, StepOps
from jaxbench.ops.opclass import broader
from jaxbench.predict import Prediction

MIN_SAMPLES = 6
_TURNS = 12
_FLOOR = 0.1  # of the measured time: what a fit may be taken for when it weighs its own errors
_KIND = "calibration"


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """t = executions * start_s + FLOPs * flop_s + bytes * byte_s, none of them negative.

    FLOPs are those of products where there are any: what is fused to them overlaps.
    """

    op_class: str
    start_s: float
    flop_s: float
    byte_s: float
    num_samples: int

    def seconds(self, row: OpRow) -> float:
        """Returns the seconds of all executions of an op."""
        constants = (self.start_s, self.flop_s, self.byte_s)
        return sum(a * b for a, b in zip(_features(row), constants, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The laws of one machine.

    A class with too few samples takes the law of its broader class; where that has too few as well,
    an op takes its roofline times `default_ratio`, the median ratio of all ops.

    Attributes:
      fingerprint: Of the machine, from `describe_environment`.
      candidates: Whose steps it was fitted to.
    """

    fingerprint: str
    jaxlib: str
    laws: tuple[Law, ...]
    default_ratio: float
    candidates: tuple[str, ...]

    def law_of(self, row: OpRow) -> Law | None:
        """Returns the law that an op takes, or None if it takes the default."""
        by_class = {law.op_class: law for law in self.laws}
        return by_class.get(row.op_class) or by_class.get(broader(row.op_class))

    def seconds(self, row: OpRow) -> float:
        """Returns the seconds of all executions of an op in a step."""
        law = self.law_of(row)
        return law.seconds(row) if law else (row.predicted_s or 0.0) * self.default_ratio

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return asdict(self)

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> Calibration:
        """Reads what `to_json` gave."""
        laws = tuple(Law(**law) for law in values["laws"])
        return Calibration(**{**values, "laws": laws, "candidates": tuple(values["candidates"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The ops of one candidate's step.

    Attributes:
      plain_step_s: Seconds of the step without the profiler, which takes its time between ops;
        None where only the profiled step is known.
    """

    name: str
    ops: StepOps
    plain_step_s: float | None = None

    @property
    def step_s(self) -> float:
        """Seconds of the step, without the profiler if that was measured."""
        return self.plain_step_s or self.ops.step_s

    @property
    def rows(self) -> Iterator[OpRow]:
        """The measured rows, with what the step without the profiler leaves between ops."""
        for row in self.ops.rows:
            if row.name == BETWEEN:
                yield replace(row, measured_s=max(0.0, self.step_s - self.ops.busy_s))
            elif row.measured_s is not None:
                yield row


def fit_calibration(
    samples: Sequence[Sample], *, fingerprint: str, jaxlib: str | None = None
) -> Calibration:
    """Fits a law for each class of work with enough ops.

    min sum over ops of (t - measured)^2 / (t * step), with constants that are not negative. Errors
    count by the variance that sums of many small delays have, so that a class's total is met, not
    its logarithm; each candidate counts alike, however long its step.

    Raises:
      UsageError: if no op was measured.

    Source: McCullagh and Nelder, "Generalized Linear Models", 1989, chapter 9 (quasi-likelihood,
    variance proportional to the mean); non-negative least squares: Lawson and Hanson, 1974.
    """
    by_class: defaultdict[str, list[tuple[OpRow, float]]] = defaultdict(list)
    ratios = []
    for sample in samples:
        for row in sample.rows:
            if row.measured_s:
                for name in filter(None, (row.op_class, broader(row.op_class))):
                    by_class[name].append((row, sample.step_s))
                ratios += [row.ratio] if row.ratio else []
    if not ratios:
        raise UsageError("No op was measured and predicted. Measure some candidates first.")
    laws = [
        _fit_law(name, rows) for name, rows in sorted(by_class.items()) if len(rows) >= MIN_SAMPLES
    ]
    return Calibration(
        fingerprint=fingerprint,
        jaxlib=jaxlib or importlib.metadata.version("jaxlib"),
        laws=tuple(laws),
        default_ratio=statistics.median(ratios),
        candidates=tuple(sample.name for sample in samples),
    )


def _features(row: OpRow) -> tuple[float, float, float]:
    return row.num_executions, row.product_flops or row.flops, row.hbm_bytes


def _fit_law(name: str, rows: Sequence[tuple[OpRow, float]]) -> Law:
    """Least squares again and again, each time with the weights of the last fit."""
    features = np.array([_features(row) for row, _ in rows], dtype=float)
    scales = np.maximum(features.max(axis=0), 1.0)
    measured = np.array([row.measured_s for row, _ in rows], dtype=float)
    steps = np.array([step_s for _, step_s in rows])
    fitted, constants = measured, np.zeros(3)
    for _ in range(_TURNS):
        weights = (np.maximum(fitted, _FLOOR * measured) * steps) ** -0.5
        constants, _ = optimize.nnls(
            features / scales * weights[:, None], measured * weights, maxiter=1000
        )
        fitted = features / scales @ constants
    start_s, flop_s, byte_s = (constants / scales).tolist()
    return Law(op_class=name, start_s=start_s, flop_s=flop_s, byte_s=byte_s, num_samples=len(rows))


# --- Use ------------------------------------------------------------------------------------------


def calibrate_rows(rows: Iterable[OpRow], calibration: Calibration) -> tuple[OpRow, ...]:
    """Returns the rows of `list_ops` with the calibration's seconds in place of the roofline's."""
    return tuple(replace(row, predicted_s=calibration.seconds(row)) for row in rows)


def calibrate_prediction(
    prediction: Prediction, rows: Iterable[OpRow], calibration: Calibration
) -> Prediction:
    """Returns the prediction with the calibrated sum over ops as its step, and says so.

    Ops that run side by side had their time divided when they were measured: their sum is the step.
    The interval keeps its width; terms are scaled, `hlo_s` stays the roofline's.

    Args:
      prediction: From `predict_step`.
      rows: From `list_ops`, of the same program.
    """
    step_s = sum(calibration.seconds(row) for row in rows)
    scale = step_s / prediction.step_s if prediction.step_s else 1.0
    fitted = f"{len(calibration.candidates)} steps measured on {calibration.fingerprint}"
    return replace(
        prediction,
        step_s=step_s,
        low_s=prediction.low_s * scale,
        high_s=prediction.high_s * scale,
        mfu=min(1.0, prediction.mfu / scale) if scale else prediction.mfu,
        terms=tuple((name, seconds * scale) for name, seconds in prediction.terms),
        built_from=f"calibrated op times (jaxlib {calibration.jaxlib}, {fitted})",
        status=f"calibrated; interval: {prediction.status}",
    )


def keep_calibration(calibration: Calibration) -> str:
    """Stores a calibration for its machine and compiler, and returns its key."""
    key = _key(calibration.fingerprint, calibration.jaxlib)
    cache.write_entry(_KIND, key, json.dumps(calibration.to_json()).encode())
    return key


def load_calibration(fingerprint: str, jaxlib: str | None = None) -> Calibration | None:
    """Loads the calibration of a machine; None where there is none for this compiler."""
    version = jaxlib or importlib.metadata.version("jaxlib")
    payload = cache.read_entry(_KIND, _key(fingerprint, version))
    return None if payload is None else Calibration.from_json(json.loads(payload))


def find_calibration() -> Calibration:
    """Returns the calibration of this machine's CPU.

    Raises:
      UsageError: if there is none for its compiler.
    """
    found = load_calibration(describe_environment("cpu")["fingerprint"])
    if found is None:
        raise UsageError(
            "This machine has no calibration for the installed jaxlib. `jaxbench calibrate` makes "
            "one, from steps that it profiles."
        )
    return found


def _key(fingerprint: str, jaxlib: str) -> str:
    return cache.key_of(fingerprint, jaxlib)


# --- How good it is -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Errors:
    """Predicted against measured steps.

    Attributes:
      ratios: Predicted over measured, by candidate.
      tau: Kendall's tau of the order of steps; None with fewer than two.
    """

    ratios: tuple[tuple[str, float], ...]
    tau: float | None

    @property
    def median(self) -> float:
        """Median of the relative errors' sizes."""
        return statistics.median(abs(ratio - 1) for _, ratio in self.ratios)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Errors on candidates that the fit did not see."""

    fitted_on: tuple[str, ...]
    before: Errors
    after: Errors

    def describe(self) -> str:
        """Returns one line for people."""
        tau = [
            f"{one.tau:.2f}" if one.tau is not None else "-" for one in (self.before, self.after)
        ]
        return (
            f"{len(self.after.ratios)} steps held out, fitted on {len(self.fitted_on)}: median "
            f"error {self.before.median:.1%} before, {self.after.median:.1%} after; Kendall's tau "
            f"{tau[0]} before, {tau[1]} after"
        )


def held_out(samples: Sequence[Sample]) -> HeldOut:
    """Fits on every second candidate, in order of their names, and predicts the others.

    Before is the sum of rooflines, after the sum by the laws.

    Raises:
      UsageError: if there are fewer than two candidates.
    """
    if len(samples) < 2:
        raise UsageError(f"{len(samples)} candidate(s) cannot be halved. Measure two or more.")
    ordered = sorted(samples, key=lambda sample: sample.name)
    known, unseen = ordered[::2], ordered[1::2]
    calibration = fit_calibration(known, fingerprint="")
    return HeldOut(
        fitted_on=tuple(sample.name for sample in known),
        before=_errors(unseen, lambda row: row.predicted_s or 0.0),
        after=_errors(unseen, calibration.seconds),
    )


def _errors(samples: Sequence[Sample], seconds: Callable[[OpRow], float]) -> Errors:
    predicted = [sum(seconds(row) for row in sample.ops.rows) for sample in samples]
    measured = [sample.step_s for sample in samples]
    pairs = zip(samples, predicted, measured, strict=True)
    return Errors(
        ratios=tuple((sample.name, p / m) for sample, p, m in pairs),
        tau=_tau(predicted, measured) if len(samples) > 1 else None,
    )


def _tau(first: Sequence[float], second: Sequence[float]) -> float:
    found: Any = stats.kendalltau(first, second)
    return float(found.statistic)
