"""Known answers: what a few programs must cost on each target."""

import itertools
import math
from dataclasses import replace

import jax
import pytest
from hlo_samples import CONVOLUTIONS, FSDP, PROGRAMS, SCAN_BATCH, SCAN_LAYERS, SCAN_WIDTH, hlo

from jaxbench.cost import Cost, OpCost, price_module
from jaxbench.hlo import read_module
from jaxbench.hlo.module import DotDims, Op
from jaxbench.hlo.shape import Shape
from jaxbench.rules import RULES, work_of

__all__ = ["hlo"]
Hlo = tuple[str, dict[str, bytes]]
# XLA of JAX 0.10 makes some programs otherwise than that of 0.12.
OLD = jax.__version_info__ < (0, 12)


def price(hlo: Hlo, program: str, *, mxu: int = 1) -> Cost:
    return price_module(read_module(hlo[1][program]), mxu=mxu)


def wire_bytes(cost: Cost, kind: str) -> int:
    return sum(size for (name, _), size in cost.collective_bytes if name == kind)


# --- Known answers ---


def test_matmul_flops_are_exact(hlo: Hlo) -> None:
    cost = price(hlo, "matmul", mxu=256)
    assert cost.matmul_flops == cost.padded_flops == cost.hlo_flops == 2 * 4096**3
    # The older XLA:CPU converts bfloat16 operands and multiplies in float32.
    dtype = "f32" if OLD and hlo[0] == "cpu" else "bf16"
    assert cost.flops_by_dtype == ((dtype, 2 * 4096**3),)
    assert cost.unpriced == ()


def test_matmul_hbm_bytes_read_both_and_write_one(hlo: Hlo) -> None:
    product = 3 * 2
    if OLD and hlo[0] == "cpu":
        product = 3 * 4 + 3 * (2 + 4)  # in float32, and a conversion of each of the three
    assert price(hlo, "matmul").hbm_bytes == 4096 * 4096 * product


def test_scan_counts_as_the_same_layers_written_out(hlo: Hlo) -> None:
    products = 2 * SCAN_BATCH * SCAN_WIDTH**2 * SCAN_LAYERS * 3
    for program in ("scanned", "unrolled"):
        cost = price(hlo, program)
        assert cost.matmul_flops == products
        assert cost.unpriced == ()


def test_nested_loops_multiply(hlo: Hlo) -> None:
    cost = price(hlo, "nested")
    assert cost.matmul_flops == 5 * 3 * 2 * 128**3
    assert max(op.count for op in cost.ops if op.matmul_flops) == 15


def test_loop_with_unknown_trips_is_unpriced(hlo: Hlo) -> None:
    cost = price(hlo, "open-loop")
    assert cost.unpriced == (("while", 1),)
    assert cost.matmul_flops == 0
    assert 0.5 < cost.unpriced_share < 1


def test_fsdp_gather_counts_the_bytes_on_the_wire(hlo: Hlo) -> None:
    cost = price(hlo, "fsdp")
    item = 4 if hlo[0] == "cpu" else 2  # XLA:CPU gathers bf16 as f32
    assert cost.collective_bytes == ((("all-gather", 2), FSDP["k"] * FSDP["n"] * item // 2),)
    assert cost.matmul_flops == 2 * math.prod(FSDP.values()) // 2


def test_fsdp_step_counts_each_asynchronous_collective_once(hlo: Hlo) -> None:
    target, programs = hlo
    module = read_module(programs["fsdp-step"])
    cost = price_module(module)
    layers = 4
    channels = {op.channel_id for op in module.all_ops() if op.channel_id}
    assert sum(op.count for op in cost.ops if op.collective) == layers * len(channels)
    if target == "tpu-7x":
        return  # its partitioner moves activations instead, in a way of its own
    # w and v are gathered for the forward pass and again for the backward pass; one all-reduce
    # each way over the tensor axis.
    item = 4 if target == "cpu" else 2  # XLA:CPU does bf16 collectives in f32
    shard = 512 * 1024 // 4 * item
    activations = 2 * 128 * 512 * item
    gradients = 2 * shard * (2 if target == "cpu" else 1)  # an all-reduce is twice a scatter
    assert wire_bytes(cost, "all-gather") == layers * 4 * shard
    reduced = wire_bytes(cost, "all-reduce") + wire_bytes(cost, "reduce-scatter")
    assert reduced == layers * (activations + gradients)


def test_stacked_scan_output_counts_slices_not_the_buffer(hlo: Hlo) -> None:
    slice_bytes = 128 * 256 * 4
    cost = price(hlo, "stack")
    # Each trip writes its slice; what else a trip does (reads and writes of the carry, copies of
    # it) is at most six more slices. Counting the buffer instead would give 64 slices a trip.
    assert 64 * slice_bytes <= cost.hbm_bytes <= 64 * 7 * slice_bytes + 128 * slice_bytes


def brute_force(base: int, size: int, out: int, *, stride: int, low: int, dilation: int = 1) -> int:
    """Pairs (output, tap) of one dimension that meet the base, counted one by one."""
    pairs = itertools.product(range(out), range(size))
    return sum(0 <= o * stride + k * dilation - low < base for o, k in pairs)


def same_padding(base: int, size: int, stride: int, dilation: int) -> tuple[int, int]:
    """(padding below, output size) of SAME."""
    out = -(-base // stride)
    whole = max(0, (out - 1) * stride + (size - 1) * dilation + 1 - base)
    return whole // 2, out


def mathematical_flops(name: str) -> int:
    """FLOPs of the value, which are also those of each of the two gradients."""
    shape, kernel, strides, _, dilations = CONVOLUTIONS[name]
    taps = 1
    for dim in range(2):
        base, size = shape[1 + dim], kernel[dim]
        low, out = same_padding(base, size, strides[dim], dilations[dim])
        taps *= brute_force(base, size, out, stride=strides[dim], low=low, dilation=dilations[dim])
    return 2 * shape[0] * taps * kernel[2] * kernel[3]


def expected_flops(target: str, name: str) -> int:
    """FLOPs of value and gradients, with the three cases where a compiler really does more."""
    flops = 3 * mathematical_flops(name)
    if target == "cpu" and "depthwise" in name:
        # XLA:CPU has no batch groups: the gradient of the kernel is a full convolution, of which it
        # keeps the diagonal.
        return flops + (128 - 1) * flops // 3
    if target == "gpu-h100" and name == "conv-stem":
        # cuDNN wants symmetric padding; XLA:GPU pads the image in memory, and its zeros are
        # multiplied.
        padded = brute_force(37, 7, 16, stride=2, low=0) ** 2
        shifted = brute_force(33, 7, 16, stride=2, low=2) ** 2
        # The older one pads only for the value.
        return 2 * 8 * 3 * 64 * (padded + shifted + (shifted if OLD else padded))
    if target == "gpu-h100" and name == "conv-depthwise-strided":
        # The same with the holes between the strided gradients.
        dense = brute_force(17, 5, 13, stride=1, low=0) ** 2
        return 2 * flops // 3 + 2 * 4 * 128 * dense
    return flops


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_and_gradients_equal_brute_force(hlo: Hlo, name: str) -> None:
    cost = price(hlo, name)
    assert cost.matmul_flops == expected_flops(hlo[0], name)
    assert cost.unpriced == ()


def test_convolution_padding_fills_the_matrix_unit(hlo: Hlo) -> None:
    cost = price(hlo, "conv-plain", mxu=128)
    assert cost.padded_flops > cost.matmul_flops
    # 32 to 64 features on a 128 x 128 array leave at most an eighth of it busy.
    assert sum(op.padded_flops for op in cost.ops if op.matmul_flops) >= 8 * cost.matmul_flops


# --- Contracts ---


@pytest.mark.parametrize("program", PROGRAMS)
def test_price_module_totals_are_the_sums_over_ops(hlo: Hlo, program: str) -> None:
    cost = price(hlo, program)
    assert cost.hbm_bytes == sum(op.hbm_bytes for op in cost.ops)
    assert cost.matmul_flops == sum(op.matmul_flops for op in cost.ops)
    assert cost.hlo_flops == sum(flops for op in cost.ops for _, flops in op.flops)
    assert cost.padded_flops == cost.hlo_flops  # nothing is padded without a matrix unit
    assert 0 <= cost.unpriced_share <= 1


@pytest.mark.parametrize("program", ["matmul", "scanned", "conv-plain", "fsdp-step"])
def test_price_module_tpu_gives_the_compilers_cycles(hlo: Hlo, program: str) -> None:
    cost = price(hlo, program)
    assert (cost.cycles > 0) == hlo[0].startswith("tpu")
    assert cost.cycles == sum(op.cycles or 0 for op in cost.ops)
    heavy = [op for op in cost.ops if op.matmul_flops]
    assert all((op.cycles is not None) == hlo[0].startswith("tpu") for op in heavy)


def test_cost_adds_and_multiplies() -> None:
    op = OpCost(
        name="f",
        opcode="dot",
        scope="net",
        flops=(("bf16", 6),),
        matmul_flops=6,
        padded_flops=8,
        hbm_bytes=10,
        collective="all-gather",
        collective_bytes=4,
        group_size=2,
        cycles=3,
        moved_bytes=10,
    )
    cost = Cost(steps=(op,), unpriced=(("mystery", 1),), unpriced_bytes=30)
    assert cost + Cost() == Cost() + cost == cost
    three = cost * 3
    assert three.ops[0].count == 3
    assert three.hbm_bytes == (cost + cost + cost).hbm_bytes == 30
    assert three.flops_by_dtype == (("bf16", 18),)
    assert three.collective_bytes == ((("all-gather", 2), 12),)
    assert (three.cycles, three.padded_flops, three.unpriced) == (9, 24, (("mystery", 3),))
    assert cost.unpriced_share == three.unpriced_share == 0.75
    assert cost * 0 == Cost()
    assert Cost(steps=(replace(op, cycles=None),)).ops_without_cycles == 1


def test_op_without_a_rule_is_listed(hlo: Hlo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, "dot")
    monkeypatch.delitem(RULES, "convolution")
    cost = price(hlo, "matmul")
    assert cost.unpriced in ((("dot", 1),), (("convolution", 1),))
    assert cost.matmul_flops == 0
    # The rest are copies of the operands to VMEM, on v5e, and conversions on the older XLA:CPU.
    assert 0.4 <= cost.unpriced_share <= 1.0


def test_product_of_130_fills_two_tiles_of_a_matrix_unit_of_128() -> None:
    side = 130
    matrix = Shape(dtype="bf16", dims=(side, side), size=side**2, bytes=2 * side**2, padded_bytes=0)
    a, b = (
        Op(name=name, opcode="parameter", shape=matrix, operands=(), called=()) for name in "ab"
    )
    dims = DotDims(lhs_contracting=(1,), rhs_contracting=(0,), lhs_batch=(), rhs_batch=())
    dot = Op(name="dot", opcode="dot", shape=matrix, operands=(a, b), called=(), dot=dims)
    work, missing = work_of(dot, 128)
    assert missing == ()
    assert work.flops == (("bf16", 2 * side**3),)
    assert work.padded == 2 * 136 * 256 * 256  # rows to 8 sublanes, columns and depth to 2 x 128
    assert work.sizes == (1, side, side, side)
