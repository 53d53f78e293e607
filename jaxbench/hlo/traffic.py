"""What one scheduled op reads from and writes to HBM: each buffer once, slices where touched."""

from collections.abc import Iterable

from jaxbench.hlo.module import Computation, Op
from jaxbench.hlo.shape import Shape

HOST = 5
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # opcode: operand that holds the update
# Inside a fusion these are worked out element by element, so a slice after them touches only its
# part.
_ELEMENT_MAPS = frozenset(
    ["bitcast", "copy", "convert", "reshape", "transpose", "bitcast-convert", "reduce-precision"]
)
_RENAMES = frozenset(("bitcast", "reshape"))  # inside a fusion: the same buffer


def in_hbm(shape: Shape) -> bool:
    """Whether an array lies in the main memory.

    Only TPU layouts have tiles, and only there does another memory space than 0 mean on-chip (VMEM
    1, SMEM 6) or host memory (5). XLA:GPU marks buffers of collectives with space 1 although they
    lie in HBM.
    """
    return shape.memory_space == 0 or not shape.tiles


def in_host_memory(shape: Shape) -> bool:
    """Whether a part of a value lies in the host's memory, which only XLA:TPU marks (space 5)."""
    return any(leaf.memory_space == HOST and leaf.tiles for leaf in shape.leaves if leaf.bytes > 4)


def hbm_size(shape: Shape) -> int:
    """Bytes of the parts of `shape` that lie in HBM, tiles filled up."""
    return sum(leaf.padded_bytes for leaf in shape.leaves if in_hbm(leaf))


def hbm_bytes(op: Op) -> int:
    """Bytes that one execution of a scheduled op moves between HBM and the cores.

    A fusion reads each operand once and writes each output once; nothing in between touches HBM. An
    operand that is only sliced counts with its slices; a buffer that is updated in place counts
    with the update, which is written, and is not read. Buffers in on-chip memory count nothing.
    Assumes that what is read twice comes from a cache.
    """
    if op.opcode == "fusion":
        return _fusion_bytes(op)
    if op.opcode in ("copy-start", "collective-permute-start", "send", "recv"):
        return _start_bytes(op)
    if op.opcode in _SLICES:
        return (
            _part(op.operands[0].shape, op.shape.size) + _sum(op.operands[1:]) + hbm_size(op.shape)
        )
    if op.opcode in _UPDATES:
        return _update_bytes(op)
    return _sum(op.operands) + hbm_size(op.shape)


def _sum(operands: Iterable[Op]) -> int:
    return sum(hbm_size(operand.shape) for operand in dict.fromkeys(operands))


def _part(shape: Shape, elements: int) -> int:
    """HBM bytes of `elements` elements of an array."""
    if not in_hbm(shape) or shape.size == 0:
        return 0
    return shape.padded_bytes * min(elements, shape.size) // shape.size


def _start_bytes(op: Op) -> int:
    """The start of a copy: one read, one write; its tuple also names the source and a flag."""
    source = op.operands[0].shape
    return hbm_size(source) + (hbm_size(op.shape.elements[0]) if op.opcode == "copy-start" else 0)


def _update_bytes(op: Op) -> int:
    """An update in place: the update is read and written, a scatter also reads what it adds to."""
    updates = op.operands[_UPDATES[op.opcode]].shape
    touched = _part(op.shape if not op.shape.is_tuple else op.shape.elements[0], updates.size)
    return _sum(op.operands[1:]) + touched * (2 if op.opcode == "scatter" else 1)


def _fusion_bytes(op: Op) -> int:
    computation = op.called[0]
    reader = _Reader()
    read: dict[Op, int] = {}
    for parameter in computation.parameters:
        operand = op.operands[parameter.parameter_number]
        size = hbm_size(operand.shape)
        if size and not operand.shape.is_tuple:
            size = _part(operand.shape, reader.touched(parameter, computation, ()))
        read[operand] = max(read.get(operand, 0), size)
    outputs = zip(op.shape.leaves, _output_ops(computation.root), strict=True)
    written = sum(_part(leaf, reader.written(source, ())) for leaf, source in outputs)
    return sum(read.values()) + written


def _output_ops(root: Op) -> tuple[Op, ...]:
    """The ops that make the leaves of a fusion's result."""
    if root.opcode == "tuple":
        return tuple(leaf for operand in root.operands for leaf in _output_ops(operand))
    return (root,) * len(root.shape.leaves)


class _Reader:
    """Follows buffers through a fused computation and the fusions nested in it.

    `outer` is the chain of (fusion, computation that it stands in) around the computation at hand,
    innermost last.
    """

    def __init__(self) -> None:
        self._users: dict[Computation, dict[Op, list[Op]]] = {}

    def _users_of(self, op: Op, computation: Computation) -> list[Op]:
        if computation not in self._users:
            self._users[computation] = computation.users()
        return self._users[computation].get(op, [])

    def touched(
        self, op: Op, computation: Computation, outer: tuple[tuple[Op, Computation], ...]
    ) -> int:
        """Elements of the array `op` that its users read, at most all."""
        size = op.shape.size
        total = 0
        if op is computation.root:
            total += self._touched_as_result(op, outer)
        for user in self._users_of(op, computation):
            if total >= size:
                break
            total += self._touched_by(user, op, computation, outer)
        return min(total, size)

    def _touched_as_result(self, op: Op, outer: tuple[tuple[Op, Computation], ...]) -> int:
        """What is read of a value that a nested fusion hands on, or that leaves the fusion."""
        if outer:
            fusion, home = outer[-1]
            return self.touched(fusion, home, outer[:-1])
        return 0 if _is_renamed_parameter(op) else op.shape.size

    def _touched_by(
        self, user: Op, op: Op, computation: Computation, outer: tuple[tuple[Op, Computation], ...]
    ) -> int:
        opcode = user.opcode
        if opcode in _SLICES and user.operands[0] is op and op not in user.operands[1:]:
            return user.shape.size
        if opcode in _UPDATES and user.operands[0] is op and op not in user.operands[1:]:
            return self._touched_by_update(user, op)
        if opcode in _ELEMENT_MAPS:
            return self.touched(user, computation, outer)
        if opcode == "tuple":
            return 0 if _is_renamed_parameter(op) else op.shape.size
        if opcode == "fusion":
            inner, chain = user.called[0], (*outer, (user, computation))
            inside = [p for p in inner.parameters if user.operands[p.parameter_number] is op]
            return sum(self.touched(parameter, inner, chain) for parameter in inside)
        return op.shape.size

    def _touched_by_update(self, user: Op, op: Op) -> int:
        """An update in place reads nothing of the buffer, or, if it adds, what it adds to."""
        if not self._is_buffer(op, ()):
            return op.shape.size
        return user.operands[2].shape.size if user.opcode == "scatter" else 0

    def written(self, op: Op, outer: tuple[Op, ...]) -> int:
        """Elements of an output that are written: an update in place writes the update only."""
        if op.opcode in _RENAMES and op.operands:
            return self.written(op.operands[0], outer)
        if op.opcode == "parameter":
            return self.written(outer[-1].operands[op.parameter_number], outer[:-1]) if outer else 0
        if op.opcode == "fusion" and not op.shape.is_tuple:
            return self.written(op.called[0].root, (*outer, op))
        if op.opcode == "copy" and outer and outer[-1].aliases:
            return self.written(op.operands[0], outer)
        if op.opcode in _UPDATES and self._is_buffer(op.operands[0], outer):
            return op.operands[_UPDATES[op.opcode]].shape.size
        return op.shape.size

    def _is_buffer(self, op: Op, outer: tuple[Op, ...]) -> bool:
        """Whether `op` is an operand of the outermost fusion, maybe under another name."""
        if op.opcode == "parameter":
            return not outer or self._is_buffer(outer[-1].operands[op.parameter_number], outer[:-1])
        retiled = op.opcode == "copy" and bool(op.shape.tiles)  # XLA:TPU changes only the tiles
        if op.opcode in _RENAMES or op.opcode in _UPDATES or retiled:
            return self._is_buffer(op.operands[0], outer)
        if op.opcode == "fusion" and not op.shape.is_tuple:
            return self._is_buffer(op.called[0].root, (*outer, op))
        return False


def _is_renamed_parameter(op: Op) -> bool:
    while op.opcode in _RENAMES:
        op = op.operands[0]
    return op.opcode == "parameter"
