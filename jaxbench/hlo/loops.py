"""How often a `while` runs: what the backend wrote beside it, or what its condition and body say.

XLA:CPU and XLA:GPU write `known_trip_count`. XLA:TPU does not, moves constants into and out of the
loop state, and fuses the counter's arithmetic. So the counter is followed as `scale * state[index]
+ offset` through copies, tuples, fusions, calls and enclosing or earlier loops.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from jaxbench.hlo.module import Computation, Module, Op

_TRANSPARENT = frozenset(
    [
        "copy",
        "bitcast",
        "convert",
        "reshape",
        "copy-done",
        "optimization-barrier",
        "bitcast-convert",
    ]
)
_FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}
_MAX_DEPTH = 200
Path = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Affine:
    """scale * state[index] + offset; `index` is a place in the loop's state, or None."""

    index: Path | None
    scale: int
    offset: int

    def scaled(self, factor: int) -> "_Affine":
        return _Affine(self.index, self.scale * factor, self.offset * factor)


class _Frame:
    """One computation with a meaning for its parameters; remembers what it worked out."""

    def __init__(self, parameter: Callable[[int, Path], _Affine | None], depth: int = 0) -> None:
        self._parameter = parameter
        self._known: dict[tuple[Op, Path], _Affine | None] = {}
        self.depth = depth

    def value(self, op: Op, path: Path = ()) -> _Affine | None:
        """The value of `op`, or of the element `path` of it, if it is affine in the state."""
        if (op, path) not in self._known:
            self._known[op, path] = None  # while it is worked out: no value, so no endless walk
            if self.depth < _MAX_DEPTH:
                self.depth += 1
                self._known[op, path] = self._work_out(op, path)
                self.depth -= 1
        return self._known[op, path]

    def inside(self, op: Op) -> "_Frame":
        """The frame of the computation that the fusion or call `op` runs."""
        return _Frame(lambda number, path: self.value(op.operands[number], path), self.depth)

    def _work_out(self, op: Op, path: Path) -> _Affine | None:
        opcode = op.opcode
        if opcode == "constant":
            return _Affine(None, 0, op.literal[0]) if op.literal and op.shape.size == 1 else None
        if opcode == "parameter":
            return self._parameter(op.parameter_number, path)
        if opcode == "get-tuple-element":
            return self.value(op.operands[0], (op.tuple_index, *path))
        if opcode == "tuple":
            return self.value(op.operands[path[0]], path[1:]) if path else None
        if opcode == "copy-start":
            return self.value(op.operands[0], path[1:])
        if opcode in _TRANSPARENT:
            return self.value(op.operands[0], path)
        if opcode in ("fusion", "call") and op.called:
            return self.inside(op).value(op.called[0].root, path)
        if opcode == "while":
            return _after_loop(op, path, self)
        return self._arithmetic(op)

    def _arithmetic(self, op: Op) -> _Affine | None:
        if op.opcode not in ("add", "subtract", "multiply", "negate") or op.shape.size != 1:
            return None
        values = [self.value(operand) for operand in op.operands]
        if any(value is None for value in values):
            return None
        first, *rest = [value for value in values if value is not None]
        if op.opcode == "negate":
            return first.scaled(-1)
        second = rest[0]
        if op.opcode == "multiply":
            return _product(first, second)
        return _sum(first, second.scaled(-1) if op.opcode == "subtract" else second)


def _sum(first: _Affine, second: _Affine) -> _Affine | None:
    if first.index is not None and second.index is not None and first.index != second.index:
        return None
    index = first.index if second.index is None else second.index
    return _Affine(index, first.scale + second.scale, first.offset + second.offset)


def _product(first: _Affine, second: _Affine) -> _Affine | None:
    if second.index is None:
        return first.scaled(second.offset)
    return second.scaled(first.offset) if first.index is None else None


def _body_and_condition(op: Op) -> tuple[Computation, Computation]:
    """XLA serializes the two called computations of a while as (body, condition)."""
    body, condition = op.called
    return body, condition


def _loop_frame(depth: int = 0) -> _Frame:
    """The frame of a loop's body or condition: its one parameter is the state."""
    return _Frame(lambda _, path: _Affine(path, 1, 0), depth)


def _step(op: Op, index: Path, depth: int = 0) -> int | None:
    """What one trip adds to the state at `index`: 0 for an invariant, None if it is no constant."""
    body, _ = _body_and_condition(op)
    after = _loop_frame(depth).value(body.root, index)
    if after is None or after.index != index or after.scale != 1:
        return None
    return after.offset


def _after_loop(op: Op, path: Path, frame: _Frame) -> _Affine | None:
    """The element `path` of a loop's result, if the loop leaves it alone or counts with it."""
    step = _step(op, path, frame.depth)
    if step is None:
        return None
    before = frame.value(op.operands[0], path)
    if step == 0 or before is None:
        return before
    trips = _count(op, frame)
    return (
        None if trips is None else _Affine(before.index, before.scale, before.offset + step * trips)
    )


def _known_trip_count(op: Op) -> int | None:
    if b"known_trip_count" not in op.backend_config:
        return None
    count = op.config.get("known_trip_count", {}).get("n")
    return None if count is None else int(count)


def _count(op: Op, frame: _Frame) -> int | None:
    """Trips of `op`, whose first state is known in `frame`."""
    known = _known_trip_count(op)
    if known is not None:
        return known
    _, condition = _body_and_condition(op)
    compare, inner = _find_compare(condition.root, _loop_frame(frame.depth))
    if compare is None or len(compare.operands) != 2:
        return None
    sides = [_resolve(op, inner.value(operand), frame) for operand in compare.operands]
    left, right = sides
    if left is None or right is None:
        return None
    return solve_trips(left[0] - right[0], left[1] - right[1], compare.direction)


def _resolve(op: Op, value: _Affine | None, frame: _Frame) -> tuple[int, int] | None:
    """(value before the first trip, change in each trip) of one side of the condition."""
    if value is None or value.index is None:
        return None if value is None else (value.offset, 0)
    step = _step(op, value.index, frame.depth)
    start = frame.value(op.operands[0], value.index)
    if step is None or start is None or start.index is not None:
        return None
    return value.scale * start.offset + value.offset, value.scale * step


def _find_compare(op: Op, frame: _Frame) -> tuple[Op | None, _Frame]:
    """The comparison that decides, and the frame in which its operands have a meaning."""
    if op.opcode == "compare":
        return op, frame
    if op.opcode in _TRANSPARENT:
        return _find_compare(op.operands[0], frame)
    if op.opcode in ("fusion", "call") and op.called:
        return _find_compare(op.called[0].root, frame.inside(op))
    return None, frame


def solve_trips(start: int, step: int, direction: str) -> int | None:
    """Counts the trips of a loop that goes on while `start + k * step` compares so with zero.

    For LT: ceil(-start / step) if start < 0 < step, 0 if start >= 0; the others by symmetry. None
    where the loop does not end, or would end only when the counter overflows.
    """
    if direction in ("GT", "GE"):
        return solve_trips(-start, -step, _FLIPPED[direction])
    if direction == "LT":
        return 0 if start >= 0 else (None if step <= 0 else -(start // step))
    if direction == "LE":
        return 0 if start > 0 else (None if step <= 0 else -start // step + 1)
    if direction == "NE":
        if start == 0:
            return 0
        return -start // step if step and start % step == 0 and -start // step > 0 else None
    if direction == "EQ":
        return 0 if start else (1 if step else None)
    return None


@lru_cache(maxsize=4)
def _callers(module: Module) -> dict[Computation, list[Op]]:
    """For each computation, the ops that run it."""
    callers: dict[Computation, list[Op]] = {}
    for op in module.all_ops():
        for computation in op.called:
            callers.setdefault(computation, []).append(op)
    return callers


@lru_cache(maxsize=4)
def _homes(module: Module) -> dict[Op, Computation]:
    """For each op that runs a computation, and each loop, the computation that it stands in."""
    return {op: home for home in module.computations for op in home.ops if op.called}


def _outer_frame(home: Computation, module: Module, depth: int = 0) -> _Frame:
    """A computation as its only caller sees it; the entry's parameters have no value."""
    callers = _callers(module).get(home, [])
    if len(callers) != 1 or depth > _MAX_DEPTH:
        return _Frame(lambda _, __: None, depth)
    caller = callers[0]
    frame = _outer_frame(_homes(module)[caller], module, depth + 1)
    if caller.opcode == "while":
        return _Frame(lambda _, path: _invariant(caller, path, frame), depth)
    if caller.opcode == "conditional":
        branch = caller.called.index(home)
        return _Frame(lambda _, path: frame.value(caller.operands[branch + 1], path), depth)
    if caller.opcode == "call":
        return frame.inside(caller)
    return _Frame(lambda _, __: None, depth)


def _invariant(op: Op, path: Path, frame: _Frame) -> _Affine | None:
    """The state at `path` in every trip of `op`, if no trip changes it."""
    return frame.value(op.operands[0], path) if _step(op, path, frame.depth) == 0 else None


def trip_count(op: Op, module: Module) -> int | None:
    """How often the body of the `while` op runs; None if that cannot be read from the program.

    Args:
      op: A `while` of `module`.
      module: The module, for constants that enclosing and earlier loops pass on.

    Source: for `known_trip_count`, xla/xla_data.proto, WhileLoopBackendConfig.
    """
    known = _known_trip_count(op)
    if known is not None:
        return known
    return _count(op, _outer_frame(_homes(module)[op], module))
