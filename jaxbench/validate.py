"""The predictor against published step times: builds each step again, predicts it, and compares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxbench import cache
from jaxbench.compiler import compiled_key, unpack_compiled
from jaxbench.cost import price_module
from jaxbench.hlo import read_module
from jaxbench.hlo.pack import pack_module, unpack_module
from jaxbench.predict import Prediction, predict_step
from jaxbench.published import Case
from jaxbench.record import Record, read_records
from jaxbench.run import Limits, Progress, Request, describe, families_of, run
from jaxbench.target import Target, chip_table, parse_target
from jaxbench.worker import Job, run_jobs

FOLDER = "hlo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """One case, predicted; `failure` says why where it is not, or that it would not fit."""

    case: Case
    made_with: str
    prediction: Mapping[str, Any] | None = None
    unpriced_share: float = 0.0
    failure: str = ""

    @property
    def error(self) -> float | None:
        """Relative error of the prediction."""
        if self.prediction is None:
            return None
        return self.prediction["step_s"] / self.case.step_s - 1

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values."""
        return {
            **dataclasses.asdict(self.case),
            "chip": self.case.chip,
            "published_s": self.case.step_s,
            "prediction": self.prediction,
            "error": self.error,
            "unpriced_share": self.unpriced_share,
            "made_with": self.made_with,
            "failure": self.failure,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """How good the predictions of a set of cases are.

    Attributes:
      tau: Kendall's tau-b between predicted and published seconds, NaN below three cases.
    """

    name: str
    num_cases: int
    median: float
    ninth_of_ten: float
    worst: float
    tau: float


def default_folder() -> Path:
    """Returns the folder of compiled cases that the repository holds, or one for new ones."""
    kept = Path("results") / "validate"
    return kept if kept.is_dir() else Path("out") / "validate"


def validate(
    cases: Sequence[Case], out: Path, *, limits: Limits, progress: Progress, recompile: bool = False
) -> list[Outcome]:
    """Predicts published steps, and compiles those whose program is not in `out`.

    The optimised HLO of each case is kept in `out`, so that a new predictor needs no compiler.

    Args:
      out: Folder of the records and of compressed HLO.
      recompile: Compile with the compilers at hand what other versions made.
    """
    described = {
        one["name"]: one for one in describe(families_of([c.candidate for c in cases]), limits)
    }
    requests = [case.request(described) for case in cases]
    known = _known_records(out)
    missing = [
        request
        for request in requests
        if _find(known, request, exact=recompile) is None or recompile
    ]
    run(list({request.id: request for request in missing}.values()), out, limits, progress)
    known = _known_records(out)
    records = [_find(known, request, exact=recompile) for request in requests]
    for record, request in zip(records, requests, strict=True):
        if record is not None:
            _keep_hlo(out, record, request.target)
    return _predict(cases, records, out, limits)


def _known_records(out: Path) -> list[Record]:
    return [record for record in read_records(out) if not record.is_lost]


def _find(known: Sequence[Record], request: Request, *, exact: bool) -> Record | None:
    """The record of a request; made with any versions of the compilers, unless `exact`."""
    same = [record for record in known if record.id == request.id]
    if same or exact:
        return same[0] if same else None
    asked = _essence(request.described, request.layout, request.target.name, request.versions)
    of_record = (
        (record, _essence(vars_of(record), record.layout, record.target, record.versions))
        for record in known
    )
    return next((record for record, essence in of_record if essence == asked), None)


def vars_of(record: Record) -> dict[str, Any]:
    """Returns a record as a description of its candidate."""
    return {**record.to_json(), "name": record.candidate}


def _essence(
    described: Mapping[str, Any], layout: str, target: str, versions: Mapping[str, str]
) -> str:
    asked = [described[key] for key in ("name", "config", "workload", "source_sha256")]
    return cache.key_of(asked, layout, target, versions.get("options", ""))


def _hlo_path(out: Path, record: Record) -> Path:
    return out / FOLDER / f"{record.id}.hlo.xz"


def _keep_hlo(out: Path, record: Record, target: Target) -> None:
    path = _hlo_path(out, record)
    if path.exists() or record.program_sha256 is None:
        return
    packed = cache.read_entry("compiled", compiled_key(record.program_sha256, target))
    if packed is None:
        return
    with cache.storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack_module(unpack_compiled(packed).hlo))


def _predict(
    cases: Sequence[Case], records: Sequence[Record | None], out: Path, limits: Limits
) -> list[Outcome]:
    jobs = {
        case.id: Job(
            name=case.id,
            function="jaxbench.validate:predict_hlo",
            arguments=_arguments(record, _hlo_path(out, record)),
            limit_s=limits.limit_s,
            limit_bytes=limits.limit_bytes,
        )
        for case, record in zip(cases, records, strict=True)
        if record is not None and _hlo_path(out, record).exists()
    }
    results = {
        job.name: result
        for job, result in run_jobs(list(jobs.values()), num_workers=limits.num_workers)
    }
    return [
        _outcome(case, record, results.get(case.id))
        for case, record in zip(cases, records, strict=True)
    ]


def _arguments(record: Record, path: Path) -> dict[str, Any]:
    # A program that is too large for its device was compiled all the same: it has a time, no MFU.
    model_flops = record.cost["model_flops"] if record.cost else 0.0
    return {
        "path": str(path),
        "target": record.target,
        "model_flops": model_flops,
        "dtype": record.workload["dtype"],
    }


def predict_hlo(*, path: str, target: str, model_flops: float, dtype: str) -> dict[str, Any]:
    """Reads, prices and predicts a kept program; runs in a worker."""
    chip = parse_target(target)
    module = read_module(unpack_module(Path(path).read_bytes()))
    cost = price_module(module, mxu=chip_table()[chip.chip].mxu)
    prediction = predict_step(cost, chip, model_flops=model_flops, dtype=dtype)
    return {"prediction": _values(prediction), "unpriced_share": cost.unpriced_share}


def _values(prediction: Prediction) -> dict[str, Any]:
    names = ("step_s", "low_s", "high_s", "bound", "mfu", "kind", "hlo_s", "compiler_s")
    values = {name: getattr(prediction, name) for name in names}
    return {**values, "terms": dict(prediction.terms)}


def _outcome(case: Case, record: Record | None, result: Any) -> Outcome:
    made_with = "" if record is None else ", ".join(f"{k} {v}" for k, v in record.versions.items())
    if isinstance(result, dict):
        too_large = record.failure["text"] if record and record.failure else ""
        return Outcome(case=case, made_with=made_with, failure=too_large, **result)
    text = "its compiled program is kept nowhere; give another --out, and it is compiled"
    if result is not None:
        text = f"{result.error}: {result.text}"
    elif record is not None and record.failure is not None:
        text = f"{record.failure['error']}: {record.failure['text']}"
    return Outcome(case=case, made_with=made_with, failure=text)


# --- How good they are ---


def summarise(outcomes: Sequence[Outcome]) -> list[Summary]:
    """Returns errors by goal, by half, by chip, and the order within each set of rivals."""
    told = [outcome for outcome in outcomes if outcome.prediction is not None]
    known = [outcome for outcome in told if outcome.case.group != "order"]
    sets: list[tuple[str, Callable[[Outcome], bool]]] = [("all", known.__contains__)]
    sets += [(_GROUPS[name], _is("group", name)) for name in _GROUPS]
    sets += [(_HALVES[name], _of(known, "half", name)) for name in _HALVES]
    chips = dict.fromkeys(outcome.case.chip for outcome in known)
    sets += [(chip, _of(known, "chip", chip)) for chip in chips]
    rivals = dict.fromkeys(outcome.case.rivals for outcome in told if outcome.case.rivals)
    sets += [(f"rivals: {name}", _is("rivals", name)) for name in rivals]
    chosen = ((name, [one for one in told if belongs(one)]) for name, belongs in sets)
    return [_summary(name, some) for name, some in chosen if some]


_GROUPS = {
    "plain": "TPU, no kernels, no offload",
    "flash": "TPU, flash kernels or offload",
    "gpu": "GPU",
    "order": "only their order is known",
}
_HALVES = {"fit": "half that constants were fitted on", "check": "other half"}


def _is(attribute: str, value: str) -> Callable[[Outcome], bool]:
    return lambda outcome: getattr(outcome.case, attribute) == value


def _of(known: Sequence[Outcome], attribute: str, value: str) -> Callable[[Outcome], bool]:
    return lambda outcome: outcome in known and getattr(outcome.case, attribute) == value


def _summary(name: str, outcomes: Sequence[Outcome]) -> Summary:
    errors = np.array([abs(outcome.error or 0.0) for outcome in outcomes])
    return Summary(
        name=name,
        num_cases=len(outcomes),
        median=float(np.median(errors)),
        ninth_of_ten=float(np.quantile(errors, 0.9)),
        worst=float(errors.max()),
        tau=_tau(outcomes),
    )


def _tau(outcomes: Sequence[Outcome]) -> float:
    """Kendall's tau-b. Source: Kendall, "Rank Correlation Methods", 1948."""
    if len(outcomes) < 3:
        return math.nan
    from scipy.stats import kendalltau

    published = [outcome.case.step_s for outcome in outcomes]
    predicted = [outcome.prediction["step_s"] for outcome in outcomes if outcome.prediction]
    tau: Any = kendalltau(published, predicted)[0]
    return float(tau)
