"""What kind of work an op is, for a device whose kernels are not known: from its HLO alone.

Ops of one class are done by the same code, so that one law of FLOPs and bytes fits them: a library
or XLA's own loops, reading in order or not.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from jaxbench.hlo.convolution import convolution_sizes
from jaxbench.hlo.module import Computation, Module, Op

LOOP, CONDITION, BETWEEN, OTHER = "loop overhead", "loop condition", "between ops", "other"
_LARGE_FLOPS = 2**21
_PRODUCTS = ("dot", "convolution", "ragged-dot")
# The first of these that an op does, or holds, names its class.
_MOVES = {
    "random bits": ("rng-bit-generator", "rng", "rng-get-and-update-state", "shift-right-logical"),
    "sort": ("sort", "topk"),
    "scatter": ("scatter", "select-and-scatter"),
    "gather": ("gather",),
    "reduction": ("reduce", "reduce-window"),
    "update": ("dynamic-update-slice",),
    "transpose": ("transpose", "reverse"),
}
_ANY_LOOP = "XLA's loops"
_LOOPS = ("elementwise", "transcendental", "copy", "transpose", "update", "gather", "scatter")
# Roots and whole powers are no slower than a multiplication.
_TRANSCENDENTAL = """
atan2 cosine erf exponential exponential-minus-one log log-plus-one logistic sine tan tanh
"""
_COPIES = """
bitcast broadcast concatenate constant convert copy dynamic-slice get-tuple-element iota pad
parameter reshape select slice tuple
"""


def classify_ops(module: Module) -> dict[str, str]:
    """Returns the class of each op that is scheduled, by name."""
    conditions = {op.called[1] for op in module.all_ops() if op.opcode == "while"}
    return {
        op.name: CONDITION if computation in conditions else classify(op)
        for computation in scheduled(module)
        for op in computation.ops
    }


def scheduled(module: Module) -> tuple[Computation, ...]:
    """Returns the computations whose ops run as ops: the entry and what loops and calls run."""
    found = {module.entry: None}
    waiting = [module.entry]
    while waiting:
        for op in waiting.pop().ops:
            if op.opcode in ("while", "conditional", "call", "async-start"):
                new = [called for called in op.called if called not in found]
                found.update(dict.fromkeys(new))
                waiting.extend(new)
    return tuple(found)


def classify(op: Op) -> str:
    """Returns the class of one op. Libraries' fusions are apart from XLA's own loops."""
    if op.opcode == "while":
        return LOOP
    ops = tuple(_inside(op))
    how = "library" if op.fusion_kind == "kCustom" else "XLA"
    for one in ops:
        if one.opcode == "convolution":
            return _classify_convolution(op, one, how)
        if one.opcode in _PRODUCTS:
            dtype = max((x.shape for x in one.operands[:2]), key=lambda shape: shape.bytes).dtype
            size = "large" if product_flops(op) >= _LARGE_FLOPS else "small"
            return f"product {dtype} {size}, {how}"
    opcodes = {one.opcode for one in ops}
    for name, members in _MOVES.items():
        if opcodes.intersection(members):
            return f"{name}, {how}" if name == "reduction" else name
    if opcodes.intersection(_TRANSCENDENTAL.split()):
        return "transcendental"
    if opcodes.issubset(_COPIES.split()):
        return "copy"
    return "elementwise" if op.opcode == "fusion" else OTHER


def _classify_convolution(op: Op, convolution: Op, how: str) -> str:
    """Forward, or a gradient. That of an input dilates what comes back, where there are strides.

    That of a filter has a window as large as the image, which it dilates; XLA:CPU computes it for
    all groups at once.
    """
    window, dims = convolution.window, convolution.convolution
    assert dims is not None
    positions = prod(convolution.shape.dims[dim] for dim in dims.output_spatial)
    grouped = convolution.feature_group_count > 1
    backward = _may_go_back(op.op_name)
    if any(dim.base_dilation > 1 for dim in window):
        direction = "input gradient"
    elif convolution.batch_group_count > 1 or (
        backward and not grouped and prod(dim.size for dim in window) > positions
    ):
        direction = "filter gradient"
    else:
        direction = "input gradient" if backward else "forward"
    return f"convolution {direction}{', grouped' if grouped else ''}, {how}"


def broader(op_class: str) -> str:
    """Returns the class that one with few samples falls into, of any direction, size and dtype.

    Empty for a class that is like no other.
    """
    name, _, how = op_class.rpartition(", ")
    if name:
        kind = name.split()[0] + (", grouped" if name.endswith("grouped") else "")
        return f"any {kind}, {how}"
    return _ANY_LOOP if op_class in _LOOPS else ""


def _may_go_back(op_name: str) -> bool:
    """Whether an op with this name may belong to the backward pass: nameless ones may, too."""
    return not op_name or "transpose(" in op_name


def product_flops(op: Op) -> int:
    """FLOPs of an op's products where nothing is skipped: padding and dilation count as well."""
    total = 0
    for one in _inside(op):
        if one.opcode == "convolution":
            sizes = convolution_sizes(one)
            taps = prod(dim.size for dim in one.window)
            total += 2 * one.shape.size * taps * sizes.in_features
        elif one.opcode == "dot" and one.dot is not None:
            left = one.operands[0].shape
            total += 2 * one.shape.size * prod(left.dims[dim] for dim in one.dot.lhs_contracting)
    return total


def _inside(op: Op) -> Iterator[Op]:
    """The op itself, or all that a fusion fuses."""
    if op.opcode != "fusion":
        yield op
        return
    for one in op.called[0].ops:
        yield from _inside(one)
