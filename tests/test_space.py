"""Spaces: points, what they change, bands, refusals; and what blocks weigh, counted by hand."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from commands import CANDIDATES

from jaxbench.candidate import Candidate
from jaxbench.discovery import load_described, load_module
from jaxbench.errors import CandidateError
from jaxbench.models import bev
from jaxbench.search import Band, Block, Choice, Space, choices_from_variants
from jaxbench.search.block import merge_blocks
from jaxbench.search.blockstep import price_block, weigh_block
from jaxbench.search.candidate_file import write_candidate
from jaxbench.search.resolved import Resolved
from jaxbench.search.server import SpaceServer
from jaxbench.spaces import bev as bev_space
from jaxbench.spaces import decoder as decoder_space

FILE = str(CANDIDATES / "space.py")


@pytest.fixture(scope="module")
def server() -> SpaceServer:
    return SpaceServer(FILE)


@pytest.fixture(scope="module")
def space(server: SpaceServer) -> Space:
    return server.space


def changed(space: Space, **fields: Any) -> Space:
    return dataclasses.replace(space, **fields)


def test_space_base_point_is_the_base(space: Space) -> None:
    assert space.base_point() == {"widths.0": 128, "widths.1": 128, "kind": "relu"}
    assert space.candidate(space.base_point()) is space.base
    assert space.num_points == 48


def test_space_point_changes_what_it_names_and_says_so(space: Space) -> None:
    candidate = space.candidate({"widths.0": 64, "widths.1": 128, "kind": "tanh"})
    assert candidate.config == dataclasses.replace(space.base.config, widths=(64, 128), kind="tanh")
    assert candidate.replaces == "widths.0 128 -> 64; kind relu -> tanh"
    assert (candidate.validity, candidate.base) == ("T2", "pair-cpu-base")
    only_width = space.candidate({"widths.0": 64, "widths.1": 128, "kind": "relu"})
    assert only_width.validity == "T1"
    assert only_width.name != candidate.name


def test_space_value_that_is_none_of_its_choice_is_refused(space: Space) -> None:
    with pytest.raises(CandidateError, match=r"widths.0=65 is not in space 'pair'. Allowed: 32"):
        space.candidate({"widths.0": 65, "widths.1": 128, "kind": "relu"})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"choices": ()}, "no choices"),
        ({"choices": (Choice("widths.0", (32, 64)),)}, "the base's own, 128"),
        ({"choices": (Choice("depth", (1, 2)),)}, "changes nothing that is there. Known: kind"),
        ({"choices": (Choice("inputs.y", ((1,),)),)}, "changes nothing that is there. Known: x"),
        (
            {"choices": (Choice("kind", ("relu",)), Choice("kind", ("relu",)))},
            "the choice 'kind' twice",
        ),
        ({"bands": (Band("speed", 0.9, 1.1),)}, "a band on 'speed'. Known: num_params"),
        (
            {"bands": (Band("num_params", 0.9, 1.1), Band("num_params", 1.2))},
            "contradict each other: no value is at least 1.2 and at most 1.1",
        ),
    ],
)
def test_space_that_contradicts_itself_is_refused(
    space: Space, fields: dict[str, Any], says: str
) -> None:
    with pytest.raises(CandidateError, match=says):
        changed(space, **fields).check()


def test_choices_from_variants_are_the_declared_values_of_each_field() -> None:
    base = next(one for one in bev.CANDIDATES if one.name == "bev-cpu-segsum")
    (choice,) = choices_from_variants(base, bev.CANDIDATES)
    assert choice == Choice("lift", ("segment_sum", "gather", "product"), validity="T0")


def test_server_refuses_what_a_config_refuses_in_its_words(server: SpaceServer) -> None:
    answer = server.resolve({"widths.0": 64, "widths.1": 64, "kind": "broken"})
    assert answer == {"refused": "kind: kind='broken' is no activation: use relu or tanh."}


def test_server_counts_parameters_flops_and_bands_by_blocks(server: SpaceServer) -> None:
    answer = server.resolve({"widths.0": 32, "widths.1": 192, "kind": "relu"})
    first, second = 32, 192
    params = 64 * first + first + first * second + second + second * 64 + 64
    assert answer["quantities"]["num_params"] == params
    assert answer["quantities"]["forward_flops"] == 2 * (64 * first + first * second + second * 64)
    base = server.describe()["base_quantities"]["num_params"]
    assert answer["violations"] == [pytest.approx(max(0.2 - params / base, params / base - 1.2))]
    assert [kind for _, kind, _ in answer["blocks"]] == ["hidden", "hidden", "last"]


def test_server_refuses_a_network_that_answers_another_question() -> None:
    drive = bev_space.SPACE
    smaller = Choice("inputs.labels", ((64, 64), (32, 32)))
    space = dataclasses.replace(drive, choices=(*drive.choices, smaller))
    server = SpaceServer.__new__(SpaceServer)
    server.space = space
    answer = server.resolve({**space.base_point(), "inputs.labels": (32, 32)})
    assert "labels has the shape (32, 32) and (64, 64) in the base" in answer["refused"]


def test_found_network_is_loaded_from_its_description_and_from_its_file(
    server: SpaceServer, tmp_path: Path
) -> None:
    point = {"widths.0": 64, "widths.1": 32, "kind": "tanh"}
    answer = server.resolve(point)
    loaded = load_described(answer["described"])
    # Each load of a file makes classes of its own, which are equal to none of another's.
    config = dataclasses.asdict(server.space.candidate(point).config)
    assert (loaded.name, dataclasses.asdict(loaded.config)) == (
        answer["described"]["name"],
        config,
    )
    path = write_candidate(tmp_path, Resolved.from_answer(point, answer))
    assert path is not None
    (written,) = load_module(str(path)).CANDIDATES
    assert (written.name, dataclasses.asdict(written.config)) == (loaded.name, config)
    assert (written.workload, written.replaces) == (loaded.workload, answer["changes"])


@pytest.mark.parametrize("module", [bev_space, decoder_space], ids=["bev", "decoder"])
def test_shipped_space_is_large_and_its_blocks_are_the_whole_network(module: Any) -> None:
    from jaxbench.program import count_forward

    space = module.SPACE
    space.check()
    assert space.num_points >= 1e5
    point = dict(space.base_point())
    for choice in space.choices[:4]:
        point[choice.name] = choice.values[0]
    for candidate in (space.base, space.candidate(point)):
        _check_blocks(candidate, module.blocks(candidate), count_forward(candidate))


def _check_blocks(candidate: Candidate, blocks: Any, whole: dict[str, int]) -> None:
    """All parameters and all FLOPs of a network are in its blocks, none of them twice."""
    merged: list[tuple[Block, float]] = list(merge_blocks(blocks).values())
    weights = [(weigh_block(block), count) for block, count in merged]
    num_params = sum(weight.num_params * count for weight, count in weights)
    flops = sum(weight.forward_flops * count for weight, count in weights)
    assert num_params == whole["num_params"]
    samples = candidate.workload.global_batch
    assert flops // samples == whole["forward_flops"]


def test_blocks_of_the_decoder_compile_over_the_devices_of_its_layout() -> None:
    base = decoder_space.SPACE.base
    for block in decoder_space.blocks(base):
        price = price_block(
            block, workload=base.workload, layout="fsdp=8", target="gpu-h100:8", cpu_peaks=None
        )
        assert price["step_s"] > 0, block.kind


def test_receptive_field_of_the_bev_base() -> None:
    # 3x3 at stride 2, then stages of two blocks at strides 4 and 8: counted by hand.
    field = 3 + 2 * 2 + 3 * 2 * 4 + 2 * 4 + 3 * 2 * 8
    assert bev_space.receptive_field(bev_space.BASE) == field
