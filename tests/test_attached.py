"""Which targets can be timed on this machine; the tests' machines have no accelerator."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxbench import attached
from jaxbench.attached import Gpus, attach, why_not_attached
from jaxbench.compiler import compiled_key, versions_for
from jaxbench.errors import UsageError
from jaxbench.measure.session import _device_room
from jaxbench.run import plan
from jaxbench.suite import Part, Suite
from jaxbench.target import chip_table, parse_target

EIGHT = Gpus(model="NVIDIA H100 80GB HBM3", num_cores=132, count=8)


@pytest.fixture
def eight_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has them."""
    monkeypatch.setattr(attached, "_SIGNS", (tmp_path,))
    monkeypatch.setattr(attached, "_gpus", lambda: EIGHT)


@pytest.mark.parametrize(
    ("model", "num_cores", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", 108, "gpu-a100"),
        ("NVIDIA H100 80GB HBM3", 132, "gpu-h100"),
        ("NVIDIA H200", 132, "gpu-h200"),
        ("NVIDIA B200", 148, "gpu-b200"),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA GeForce RTX 4090", 128, None),
    ],
)
def test_gpus_are_the_chip_of_their_name_and_cores(
    model: str, num_cores: int, chip: str | None
) -> None:
    gpus = Gpus(model=model, num_cores=num_cores, count=1)
    same = [one.name for one in chip_table().values() if one.kind == "gpu" and gpus.are(one)]
    assert same == ([chip] if chip else [])


def test_where_nothing_is_attached_the_cpu_alone_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "_SIGNS", (tmp_path / "none",))
    found = attach([parse_target(name) for name in ("cpu", "gpu-h100", "tpu-v5e")])
    assert [target.can_run for target in found] == [True, False, False]
    with pytest.raises(UsageError, match="no NVIDIA driver on this machine"):
        attach([parse_target("gpu-h100")])
    with pytest.raises(UsageError, match="one process at a time"):
        attach([parse_target("tpu-v5e")])


def test_a_driver_without_what_jax_needs_is_told_with_jax_s_own_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "_SIGNS", (tmp_path,))
    attached._gpus.cache_clear()
    why = why_not_attached(parse_target("gpu-h100"))
    attached._gpus.cache_clear()
    assert why
    assert "cuda" in why
    assert "jaxbench[cuda]" in why
    assert "\n" not in why


@pytest.mark.usefixtures("eight_h100")
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("gpu-h100", None),
        ("gpu-h100:8", None),
        ("gpu-h100:2x8", "fewer than 16"),
        ("gpu-b200", "a gpu-b200 has 148"),
    ],
)
def test_gpus_of_one_host_are_attached_as_many_as_there_are(name: str, why: str | None) -> None:
    found = why_not_attached(parse_target(name))
    assert (found is None) == (why is None)
    assert (why or "") in (found or "")


DESCRIBED = {
    "name": "one",
    "config": {},
    "workload": {"global_batch": 8},
    "source_sha256": "0" * 64,
}
PARTS = (Part(candidates=("one",), targets=("gpu-h100", "gpu-b200")),)


@pytest.mark.usefixtures("eight_h100")
def test_an_attached_gpu_is_timed_and_compiled_by_its_own_compiler() -> None:
    suite = Suite(name="s", about="", parts=PARTS)
    timed, absent = plan(suite, [DESCRIBED], measure=True)
    (_, predicted) = reversed(plan(suite, [DESCRIBED], measure=False))
    assert (timed.measured, absent.measured, predicted.measured) == (True, False, False)
    assert timed.versions["compiled on"] == "the attached device"
    assert "compiled on" not in {**absent.versions, **predicted.versions}
    assert timed.id != predicted.id
    assert compiled_key("0", timed.target) != compiled_key("0", predicted.target)
    assert versions_for(absent.target) == dict(absent.versions)


def test_a_suite_that_times_gpus_predicts_where_none_is_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attached, "_SIGNS", (tmp_path / "none",))
    suite = Suite(name="s", about="", parts=PARTS, measure=("gpu-h100",))
    assert [one.measured for one in plan(suite, [DESCRIBED], measure=False)] == [False, False]
    with pytest.raises(UsageError, match="no NVIDIA driver"):
        plan(suite, [DESCRIBED], measure=True)


@pytest.mark.usefixtures("eight_h100")
def test_a_suite_times_the_gpu_that_it_names_and_that_is_attached() -> None:
    suite = Suite(name="s", about="", parts=PARTS, measure=("gpu-h100", "gpu-b200"))
    assert [one.measured for one in plan(suite, [DESCRIBED], measure=False)] == [True, False]


@pytest.mark.parametrize(
    ("peaks", "memory_bytes", "room"),
    [([10], 100, 4), ([10], 80, 3), ([10, 20], 100, 2), ([60, 60], 100, 0), ([60], 0, 4)],
)
def test_an_accelerator_holds_as_many_processes_as_its_memory(
    peaks: list[int], memory_bytes: int, room: int
) -> None:
    about = [{"peak_bytes": peak, "memory_bytes": memory_bytes} for peak in peaks]
    assert min(4, _device_room(about, 4)) == room
