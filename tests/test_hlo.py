"""The HLO reader: shapes and tiles, replica groups, names, loops, and what happens to bad bytes."""

import itertools
import math

import pytest
from hlo_samples import FSDP, PROGRAMS, hlo

from jaxbench.hlo import HloReadError, Module, Op, read_module, trip_count
from jaxbench.hlo.convolution import count_taps
from jaxbench.hlo.groups import permute_group_size, read_groups
from jaxbench.hlo.loops import solve_trips
from jaxbench.hlo.module import WindowDim, split_op_name
from jaxbench.hlo.schema import _CLASSES
from jaxbench.hlo.shape import tiled_size

__all__ = ["hlo"]
Hlo = tuple[str, dict[str, bytes]]
COMBINE = -(2**63)


def whiles(module: Module) -> list[Op]:
    return [op for op in module.all_ops() if op.opcode == "while"]


@pytest.mark.parametrize("program", PROGRAMS)
def test_read_module_real_program_resolves_every_operand(hlo: Hlo, program: str) -> None:
    module = read_module(hlo[1][program])
    assert module.entry in module.computations
    for computation in module.computations:
        seen: set[Op] = set()
        assert computation.root in computation.ops
        for op in computation.ops:
            assert seen.issuperset(op.operands), f"{op.name} runs before its operands"
            seen.add(op)


def test_read_module_bad_bytes_raise_hlo_read_error(hlo: Hlo) -> None:
    data = hlo[1]["scanned"]
    for bad in (b"", b"no proto at all", data[: len(data) // 2], data[1:]):
        with pytest.raises(HloReadError):
            read_module(bad)


def test_shape_tiles_fill_up_minor_dimensions() -> None:
    bf16_tiles = ((8, 128), (2, 1))
    assert tiled_size((4, 100, 130), bf16_tiles) == 4 * 104 * 256
    assert tiled_size((7,), ((1024,), (128,), (2, 1))) == 1024
    assert tiled_size((), ((256,),)) == 256
    assert tiled_size((3, 5, 100), ((COMBINE, 8, 128),)) == 16 * 128


def test_read_module_padded_shape_follows_the_layout(hlo: Hlo) -> None:
    target, programs = hlo
    stem = read_module(programs["conv-stem"])
    images = next(op for op in stem.entry.ops if op.shape.dims == (8, 32, 32, 3))
    assert images.shape.bytes == 8 * 32 * 32 * 3 * 2
    if not target.startswith("tpu"):
        assert images.shape.padded_bytes == images.shape.bytes
        return
    layout = images.shape
    physical = [layout.dims[dim] for dim in reversed(layout.minor_to_major)]
    rows, lanes = layout.tiles[0]
    physical[-1] = -(-physical[-1] // lanes) * lanes
    physical[-2] = -(-physical[-2] // rows) * rows
    assert layout.padded_bytes == 2 * math.prod(physical) > layout.bytes


@pytest.mark.parametrize(
    ("program", "trips"),
    [
        ("scanned", [12, 12]),
        ("nested", [3, 5]),
        ("odd-loop", [5]),
        ("stack", [64]),
        ("unrolled", []),
        ("open-loop", [None]),
    ],
)
def test_trip_count_real_loop_is_known(hlo: Hlo, program: str, trips: list[int | None]) -> None:
    module = read_module(hlo[1][program])
    assert [trip_count(op, module) for op in whiles(module)] == trips


@pytest.mark.parametrize("program", ["scanned", "nested", "odd-loop", "stack", "fsdp-step"])
def test_trip_count_without_backend_note_is_the_same(
    hlo: Hlo, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = read_module(hlo[1][program])
    noted = [trip_count(op, module) for op in whiles(module)]
    monkeypatch.setattr("jaxbench.hlo.loops._known_trip_count", lambda op: None)
    again = read_module(hlo[1][program])
    assert [trip_count(op, again) for op in whiles(again)] == noted != []


def test_solve_trips_agrees_with_running_the_loop() -> None:
    holds = {
        "LT": lambda v: v < 0,
        "LE": lambda v: v <= 0,
        "GT": lambda v: v > 0,
        "GE": lambda v: v >= 0,
        "NE": lambda v: v != 0,
        "EQ": lambda v: v == 0,
    }
    for start, step, direction in itertools.product(range(-9, 10), range(-4, 5), holds):
        value, trips = start, 0
        while holds[direction](value) and trips < 50:
            value, trips = value + step, trips + 1
        assert solve_trips(start, step, direction) == (trips if trips < 50 else None)


def test_count_taps_agrees_with_brute_force() -> None:
    sizes = itertools.product((1, 3, 4), (1, 2, 3), (-1, 0, 2), (1, 2), (1, 2, 4), (1, 5), (1, 6))
    for size, stride, low, window_dilation, base_dilation, base, out in sizes:
        window = WindowDim(
            size=size,
            stride=stride,
            padding_low=low,
            window_dilation=window_dilation,
            base_dilation=base_dilation,
        )
        places = [o * stride + k * window_dilation - low for o in range(out) for k in range(size)]
        held = {index * base_dilation for index in range(base)}
        assert count_taps(window, base, out) == sum(place in held for place in places)


def test_split_op_name_keeps_scopes_and_drops_wrappers() -> None:
    name = (
        "jit(step)/transpose(jvp(net))/while/body/checkpoint/rematted_computation/mlp/dot_general"
    )
    assert split_op_name(name) == ("transpose(jvp(net))/mlp", "dot_general")
    assert split_op_name("jit(f)/jvp(net/mlp)/eval_jaxpr/mul") == ("jvp(net/mlp)", "mul")
    assert split_op_name("params['w']") == ("", "params['w']")


def test_replica_groups_all_notations_give_the_same_devices() -> None:
    instruction = _CLASSES["Instruction"]
    listed, iota, new_iota, mesh = (instruction() for _ in range(4))
    for ids in ((0, 2), (1, 3)):
        listed.device_list.groups.add(replica_ids=ids)
    for groups in (iota.device_list.iota, new_iota.iota_groups):
        groups.num_groups, groups.group_size = 2, 2
        groups.reshape_dims.extend((2, 2))
        groups.transpose_perm.extend((1, 0))
    for name in ("data", "model"):
        mesh.mesh_groups.mesh.axes.add(name=name, size=2)
    mesh.mesh_groups.axes.add(index=0)
    for proto in (listed, iota, new_iota, mesh):
        groups = read_groups(proto)
        assert groups is not None
        assert (groups.num_groups, groups.group_size) == (2, 2)
        assert groups.devices == ((0, 2), (1, 3))
    assert read_groups(instruction()) is None


def test_replica_groups_part_of_a_mesh_axis_spans_the_right_devices() -> None:
    proto = _CLASSES["Instruction"]()
    proto.mesh_groups.mesh.axes.add(name="x", size=8)
    ref = proto.mesh_groups.axes.add(index=0)
    ref.sub_axis.pre_size, ref.sub_axis.size = 2, 2
    groups = read_groups(proto)
    assert groups is not None
    assert groups.devices == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert groups.axes == (("x", 2),)


def test_permute_group_size_is_the_longest_chain() -> None:
    assert permute_group_size(((0, 1), (1, 2), (2, 3), (3, 0))) == 4
    assert permute_group_size(((0, 0), (1, 2), (2, 1), (3, 3))) == 2
    assert permute_group_size(((0, 1), (1, 2))) == 3


def test_read_module_collective_names_its_group(hlo: Hlo) -> None:
    module = read_module(hlo[1]["fsdp"])
    gathers = [op for op in module.all_ops() if op.opcode.startswith("all-gather") and op.groups]
    assert gathers
    assert {op.group_size for op in gathers} == {2}
    assert gathers[0].groups is not None
    assert gathers[0].groups.devices == ((0, 1),)
    assert gathers[0].operands[0].shape.size == FSDP["k"] * FSDP["n"] // 2
