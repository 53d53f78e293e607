"""An optimised HLO module as immutable values: ops in schedule order, operands resolved."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from jaxbench.hlo.groups import ReplicaGroups, permute_group_size, read_groups
from jaxbench.hlo.schema import HloReadError, decode
from jaxbench.hlo.shape import Shape, ShapeReader

MAX_LITERAL = 16  # constants with more elements are not decoded
UNKNOWN_CYCLES = 2**63 - 1  # what XLA:TPU writes where it has no estimate
# Parts of an op's name that JAX's own machinery adds; what is left are the scopes of the user.
_WRAPPERS = frozenset(
    [
        "eval_jaxpr",
        "closed_call",
        "core_call",
        "while",
        "body",
        "cond",
        "scan",
        "checkpoint",
        "remat",
        "rematted_computation",
        "pjit",
        "custom_jvp_call",
        "custom_vjp_call",
        "custom_vjp_call_jaxpr",
        "shard_map",
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowDim:
    """One spatial dimension of a window: how many taps, and how they move over the base."""

    size: int
    stride: int = 1
    padding_low: int = 0
    padding_high: int = 0
    window_dilation: int = 1
    base_dilation: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvolutionDims:
    """Which dimension of input, kernel and output is batch, feature or space."""

    input_batch: int
    input_feature: int
    input_spatial: tuple[int, ...]
    kernel_input_feature: int
    kernel_output_feature: int
    kernel_spatial: tuple[int, ...]
    output_batch: int
    output_feature: int
    output_spatial: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DotDims:
    """Contracted and batch dimensions of both operands of a dot."""

    lhs_contracting: tuple[int, ...]
    rhs_contracting: tuple[int, ...]
    lhs_batch: tuple[int, ...]
    rhs_batch: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Op:
    """One HLO instruction. Two ops are equal only if they are the same one.

    The fields from `parameter_number` on are set only for the opcodes that have them. `aliases` are
    (index in the result, operand, index in the operand) of buffers that the op hands on.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple["Op", ...] = field(repr=False)
    called: tuple["Computation", ...] = field(repr=False)
    op_name: str = ""
    control_predecessors: tuple[str, ...] = ()
    backend_config: bytes = field(default=b"", repr=False)
    parameter_number: int = 0
    tuple_index: int = 0
    dimensions: tuple[int, ...] = ()
    fusion_kind: str = ""
    literal: tuple[int, ...] | None = None
    window: tuple[WindowDim, ...] = ()
    convolution: ConvolutionDims | None = None
    dot: DotDims | None = None
    feature_group_count: int = 1
    batch_group_count: int = 1
    slice_sizes: tuple[int, ...] = ()
    slice_bounds: tuple[tuple[int, int, int], ...] = ()
    channel_id: int = 0
    custom_call_target: str = ""
    groups: ReplicaGroups | None = None
    source_target_pairs: tuple[tuple[int, int], ...] = ()
    aliases: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...] = ()
    direction: str = ""
    thread: str = ""
    is_host_transfer: bool = False

    @property
    def scope(self) -> str:
        """Named scopes around the op, `jvp` and `transpose` kept, JAX's wrappers dropped."""
        return split_op_name(self.op_name)[0]

    @property
    def primitive(self) -> str:
        """The JAX primitive that the op came from."""
        return split_op_name(self.op_name)[1]

    @property
    def group_size(self) -> int:
        """Devices in one group of a collective; 1 for what is no collective, or names no group."""
        if self.source_target_pairs:
            return permute_group_size(self.source_target_pairs)
        return self.groups.group_size if self.groups else 1

    @property
    def num_groups(self) -> int:
        return self.groups.num_groups if self.groups else 1

    @property
    def config(self) -> Mapping[str, Any]:
        """The backend's own notes, where they are JSON."""
        if not self.backend_config.startswith(b"{"):
            return {}
        try:
            return json.loads(self.backend_config)
        except ValueError:
            return {}

    @property
    def estimated_cycles(self) -> int | None:
        """XLA:TPU's own estimate for one execution; None where it has none."""
        if b'"estimated_cycles"' not in self.backend_config:
            return None
        cycles = int(self.config.get("window_config", {}).get("estimated_cycles", UNKNOWN_CYCLES))
        return None if cycles >= UNKNOWN_CYCLES else cycles


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Computation:
    """Ops in the order in which they run; the root is not always the last."""

    name: str
    ops: tuple[Op, ...] = field(repr=False)
    root: Op
    is_fusion: bool
    is_scheduled: bool
    thread: str

    @property
    def parameters(self) -> tuple[Op, ...]:
        """Its parameters, by number."""
        found = [op for op in self.ops if op.opcode == "parameter"]
        return tuple(sorted(found, key=lambda op: op.parameter_number))

    def users(self) -> dict[Op, list[Op]]:
        """For each op that is used, the ops that read it."""
        users: dict[Op, list[Op]] = {}
        for op in self.ops:
            for operand in dict.fromkeys(op.operands):
                users.setdefault(operand, []).append(op)
        return users


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Module:
    """One compiled program for one device of the mesh.

    `aliases` are (index in the result, parameter number, index in the parameter) of donated
    buffers.
    """

    name: str
    entry: Computation
    computations: tuple[Computation, ...] = field(repr=False)
    aliases: tuple[tuple[tuple[int, ...], int, tuple[int, ...]], ...]

    def all_ops(self) -> Iterator[Op]:
        """Every op of every computation, fused ones too."""
        return (op for computation in self.computations for op in computation.ops)


@lru_cache(maxsize=65536)
def split_op_name(op_name: str) -> tuple[str, str]:
    """(scopes, primitive) of a name such as `jit(f)/jvp(net)/while/body/mlp/dot_general`."""
    parts = _split_path(op_name.split(";")[0])
    if len(parts) < 2:
        return "", parts[0] if parts else ""
    kept = [part for part in parts[:-1] if part not in _WRAPPERS and not _is_jit(part)]
    return "/".join(kept), parts[-1]


def _is_jit(part: str) -> bool:
    return part.startswith(("jit(", "pjit(", "checkpoint(", "branch_"))


def _split_path(path: str) -> list[str]:
    """Splits at the slashes that stand outside parentheses."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(path):
        if letter == "/" and depth == 0:
            parts.append(path[start:index])
            start = index + 1
        depth += (letter == "(") - (letter == ")")
    return [part for part in [*parts, path[start:]] if part]


def read_module(data: bytes) -> Module:
    """Reads a serialized HloModuleProto.

    Args:
      data: Result of `as_serialized_hlo_module_proto()` of a compiled module.

    Raises:
      HloReadError: if the bytes are no HLO module, or an op names an operand or a computation that
      is not there.
    """
    proto = decode("Module", data)
    if not proto.computations:
        raise HloReadError(
            f"The {len(data)} bytes hold no computation: they are no compiled HLO module. "
            "Pass the result of `as_serialized_hlo_module_proto()`."
        )
    schedule = {e.computation_id: e.sequence.instruction_ids for e in proto.schedule.sequences}
    shapes = ShapeReader()
    computations: dict[int, Computation] = {}
    for computation in proto.computations:
        order = schedule.get(computation.id)
        computations[computation.id] = _read_computation(computation, order, computations, shapes)
    return Module(
        name=proto.name,
        entry=_look_up(computations, proto.entry_computation_id, "entry computation", proto.name),
        computations=tuple(computations.values()),
        aliases=tuple(
            (tuple(e.output_index), e.parameter_number, tuple(e.parameter_index))
            for e in proto.input_output_alias.entries
        ),
    )


def _look_up(known: Mapping[int, Any], key: int, role: str, owner: str) -> Any:
    try:
        return known[key]
    except KeyError:
        raise HloReadError(
            f"{owner!r} names the {role} {key}, which does not stand before it: the module is cut "
            "off or not in dependency order. Serialize it again."
        ) from None


def _read_computation(
    proto: Any, order: Any, computations: dict[int, Computation], shapes: ShapeReader
) -> Computation:
    names = {instruction.id: instruction.name for instruction in proto.instructions}
    ops: dict[int, Op] = {}
    for instruction in proto.instructions:
        ops[instruction.id] = _read_op(instruction, ops, names, computations, shapes)
    ordered = ops.values() if order is None else (_look_up(ops, i, "op", proto.name) for i in order)
    return Computation(
        name=proto.name,
        ops=tuple(ordered),
        root=_look_up(ops, proto.root_id, "root", proto.name),
        is_fusion=proto.is_fusion,
        is_scheduled=order is not None,
        thread=proto.execution_thread,
    )


def _read_op(
    proto: Any,
    ops: dict[int, Op],
    names: dict[int, str],
    computations: dict[int, Computation],
    shapes: ShapeReader,
) -> Op:
    name, opcode = proto.name, proto.opcode
    read_details = _DETAILS.get(opcode.removesuffix("-start"))
    details = read_details(proto) if read_details else {}
    if opcode == "constant":
        details["literal"] = _read_literal(proto, shapes.read(proto.shape))
    called = proto.called_computation_ids
    before = proto.control_predecessor_ids
    return Op(
        name=name,
        opcode=opcode,
        shape=shapes.read(proto.shape),
        operands=tuple([_look_up(ops, i, "operand", name) for i in proto.operand_ids]),
        called=tuple([_look_up(computations, i, "computation", name) for i in called]),
        op_name=proto.metadata.op_name,
        control_predecessors=tuple([names.get(i, "") for i in before]),
        backend_config=proto.backend_config,
        **details,
    )


def _parameter_details(proto: Any) -> dict[str, Any]:
    return {"parameter_number": proto.parameter_number}


def _element_details(proto: Any) -> dict[str, Any]:
    return {"tuple_index": proto.tuple_index}


def _dimension_details(proto: Any) -> dict[str, Any]:
    return {"dimensions": tuple(proto.dimensions)}


def _compare_details(proto: Any) -> dict[str, Any]:
    return {"direction": proto.comparison_direction}


def _slice_details(proto: Any) -> dict[str, Any]:
    return {
        "slice_sizes": tuple(proto.dynamic_slice_sizes or proto.gather_slice_sizes),
        "slice_bounds": tuple((d.start, d.limit, d.stride) for d in proto.slice_dimensions),
    }


def _call_details(proto: Any) -> dict[str, Any]:
    """Fusions and asynchronous wrappers."""
    return {
        "fusion_kind": proto.fusion_kind,
        "thread": proto.async_execution_thread,
        "aliases": tuple(
            (tuple(a.output_index), a.operand, tuple(a.operand_index))
            for a in proto.output_operand_aliasing
        ),
    }


def _window_details(proto: Any) -> dict[str, Any]:
    """Convolutions, dots, windowed reductions, and the custom calls of libraries that do them."""
    return {
        "window": _read_window(proto.window),
        "convolution": _read_convolution(proto) if proto.HasField("convolution") else None,
        "dot": _read_dot(proto),
        "feature_group_count": proto.feature_group_count or 1,
        "batch_group_count": proto.batch_group_count or 1,
        "custom_call_target": proto.custom_call_target,
    }


def _collective_details(proto: Any) -> dict[str, Any]:
    return {
        "dimensions": tuple(proto.dimensions),
        "channel_id": proto.channel_id,
        "groups": read_groups(proto),
        "source_target_pairs": tuple((p.source, p.target) for p in proto.source_target_pairs),
        "is_host_transfer": proto.is_host_transfer,
    }


def _custom_call_details(proto: Any) -> dict[str, Any]:
    return _call_details(proto) | _window_details(proto)


# What else is read of an op, by opcode without `-start`; most ops need nothing.
_DETAILS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "parameter": _parameter_details,
    "get-tuple-element": _element_details,
    "compare": _compare_details,
    "custom-call": _custom_call_details,
    **dict.fromkeys(("slice", "dynamic-slice", "gather"), _slice_details),
    **dict.fromkeys(("fusion", "async", "async-update", "async-done"), _call_details),
    **dict.fromkeys(("broadcast", "transpose", "reduce", "concatenate"), _dimension_details),
    **dict.fromkeys(
        ("convolution", "dot", "ragged-dot", "reduce-window", "select-and-scatter"),
        _window_details,
    ),
    **dict.fromkeys(
        [
            "all-gather",
            "all-reduce",
            "all-to-all",
            "ragged-all-to-all",
            "reduce-scatter",
            "collective-permute",
            "collective-broadcast",
            "send",
            "recv",
            "send-done",
            "recv-done",
        ],
        _collective_details,
    ),
}


def _read_literal(proto: Any, shape: Shape) -> tuple[int, ...] | None:
    """The values of a small constant of whole numbers."""
    if shape.dtype[0] not in "sup" or shape.size > MAX_LITERAL or shape.is_tuple:
        return None
    literal = decode("Literal", proto.literal)
    if shape.dtype in ("s8", "u8"):
        data = literal.s8s if shape.dtype == "s8" else literal.u8s
        return tuple(byte - 256 * (shape.dtype == "s8" and byte > 127) for byte in data)
    stored = {"pred": literal.preds, "s32": literal.s32s, "s64": literal.s64s}
    stored |= {"u32": literal.u32s, "u64": literal.u64s}
    values = stored.get(shape.dtype)
    return tuple(int(value) for value in values) if values else None


def _read_window(proto: Any) -> tuple[WindowDim, ...]:
    return tuple(
        WindowDim(
            size=dim.size,
            stride=dim.stride or 1,
            padding_low=dim.padding_low,
            padding_high=dim.padding_high,
            window_dilation=dim.window_dilation or 1,
            base_dilation=dim.base_dilation or 1,
        )
        for dim in proto.dimensions
    )


def _read_convolution(proto: Any) -> ConvolutionDims:
    dims = proto.convolution
    return ConvolutionDims(
        input_batch=dims.input_batch,
        input_feature=dims.input_feature,
        input_spatial=tuple(dims.input_spatial),
        kernel_input_feature=dims.kernel_input_feature,
        kernel_output_feature=dims.kernel_output_feature,
        kernel_spatial=tuple(dims.kernel_spatial),
        output_batch=dims.output_batch,
        output_feature=dims.output_feature,
        output_spatial=tuple(dims.output_spatial),
    )


def _read_dot(proto: Any) -> DotDims | None:
    if proto.HasField("dot"):
        dims = proto.dot
    elif proto.HasField("ragged_dot"):
        dims = proto.ragged_dot.dot
    else:
        return None
    return DotDims(
        lhs_contracting=tuple(dims.lhs_contracting),
        rhs_contracting=tuple(dims.rhs_contracting),
        lhs_batch=tuple(dims.lhs_batch),
        rhs_batch=tuple(dims.rhs_batch),
    )
