"""Published cases build what was published; summaries against arithmetic done by hand."""

import collections
import dataclasses
import json
import math

import pytest
from hlo_samples import hlo

from jaxbench.discovery import describe_candidates, load_described
from jaxbench.errors import UsageError
from jaxbench.hlo import read_module
from jaxbench.hlo.pack import pack_module, unpack_module
from jaxbench.published import published_cases, select_cases
from jaxbench.report.validation import outcome_table, scatter_svg, summary_table
from jaxbench.run import families_of
from jaxbench.target import chip_table
from jaxbench.validate import Outcome, summarise

__all__ = ["hlo"]
CASES = published_cases()
DESCRIBED = {
    one["name"]: one for one in describe_candidates(families_of([case.candidate for case in CASES]))
}


def outcome(case, ratio: float) -> Outcome:
    values = dict.fromkeys(("low_s", "high_s", "hlo_s"), case.step_s * ratio)
    prediction = {"kind": "products", "step_s": case.step_s * ratio, "bound": "compute", **values}
    return Outcome(case=case, made_with="jax 0", prediction=prediction)


def test_cases_are_many_and_of_many_chips() -> None:
    assert len(CASES) >= 30
    assert len({case.id for case in CASES}) == len(CASES)
    chips = {case.chip for case in CASES}
    assert chips >= {"tpu-v3", "tpu-v4", "tpu-v5e", "tpu-v5p", "tpu-v6e", "tpu-7x"}
    assert chips >= {"gpu-a100", "gpu-h100"}
    assert chips <= set(chip_table())
    assert all(case.differs and case.source and case.step_s > 0 for case in CASES)


def test_every_group_has_rows_to_fit_and_rows_to_check() -> None:
    halves = collections.defaultdict(set)
    for case in CASES:
        halves[case.group].add(case.half)
    assert all(found == {"fit", "check"} for found in halves.values())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_case_is_a_candidate_with_its_published_batch(case) -> None:
    request = case.request(DESCRIBED)
    candidate = load_described(request.described)
    assert candidate.workload.global_batch == case.batch
    for name, value in case.config:
        assert getattr(candidate.config, name) == value
    given = dict(candidate.workload.inputs)
    assert all(given[name].shape == shape for name, shape in case.inputs)
    ways = math.prod(int(part.split("=")[1]) for part in request.layout.split(","))
    assert ways == request.target.num_devices


def test_cases_are_chosen_by_id_or_chip() -> None:
    assert {case.chip for case in select_cases(["tpu-v4"])} == {"tpu-v4"}
    assert [case.id for case in select_cases(["v5e-1x256-16b"])] == ["v5e-1x256-16b"]
    assert select_cases([]) == list(CASES)
    with pytest.raises(UsageError, match="No published case 'tpu-v9'"):
        select_cases(["tpu-v9"])


def test_summary_of_known_errors() -> None:
    plain = [case for case in CASES if case.chip == "tpu-v4"]
    ratios = (1.0, 1.1, 0.8, 1.02)
    outcomes = [outcome(case, ratio) for case, ratio in zip(plain, ratios, strict=True)]
    found = {summary.name: summary for summary in summarise(outcomes)}
    assert found["all"].num_cases == 4
    assert found["all"].median == pytest.approx(0.06)
    assert found["all"].worst == pytest.approx(0.2)
    assert found["tpu-v4"].median == found["all"].median
    # 13.8, 15.6, 11.6 and 15.0 s for 13.8, 14.2, 14.4 and 14.7: three pairs of six in order.
    assert found["all"].tau == pytest.approx((3 - 3) / 6)


def test_case_without_a_prediction_is_shown_and_not_counted() -> None:
    failed = Outcome(case=CASES[0], made_with="", failure="DoesNotFit: too large")
    outcomes = [failed, outcome(CASES[1], 1.1)]
    assert summarise(outcomes)[0].num_cases == 1
    assert "DoesNotFit" in outcome_table(outcomes).rows[0][-2]
    assert failed.error is None
    json.dumps([one.to_json() for one in outcomes])


def test_page_shows_a_point_a_case() -> None:
    outcomes = [outcome(case, 1.05) for case in CASES]
    picture = scatter_svg(outcomes)
    assert all(f"<title>{case.id}: +5.0%" in picture for case in CASES)
    assert len(summary_table(summarise(outcomes)).rows) > 5


def test_packed_module_reads_as_before(hlo) -> None:
    target, programs = hlo
    for name, data in programs.items():
        packed = pack_module(data)
        before, after = read_module(data), read_module(unpack_module(packed))
        assert [dataclass_of(op) for op in before.all_ops()] == [
            dataclass_of(op) for op in after.all_ops()
        ], (target, name)
        assert b"/site-packages/" not in unpack_module(packed)


def dataclass_of(op) -> tuple:
    fields = (field.name for field in dataclasses.fields(op))
    skipped = {"operands", "called", "backend_config"}
    return tuple(getattr(op, name) for name in fields if name not in skipped)
