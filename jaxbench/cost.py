"""What a compiled program costs one device in one step: FLOPs, bytes, cycles.

One registered rule an opcode says what one op computes; `jaxbench.hlo.traffic` says what it moves.
Loops count their trips. What has no rule is listed under `unpriced`, never dropped.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import ceil, log2, prod

from jaxbench.hlo.convolution import convolution_sizes, count_taps, round_up
from jaxbench.hlo.loops import trip_count
from jaxbench.hlo.module import Computation, Module, Op
from jaxbench.hlo.shape import Shape
from jaxbench.hlo.traffic import hbm_bytes

Flops = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one execution of one op computes; `products` are
    those of `flops` in matrix products; `padded` is `flops` with matrix tiles filled up."""

    flops: Flops = ()
    products: Flops = ()
    padded: int = 0

    @staticmethod
    def of(dtype: str, flops: int, *, padded: int | None = None, matmul: bool = False) -> "Work":
        return Work(
            flops=((dtype, flops),) if flops else (),
            products=((dtype, flops),) if flops and matmul else (),
            padded=flops if padded is None else padded,
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=_merge(self.flops, other.flops),
            products=_merge(self.products, other.products),
            padded=self.padded + other.padded,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCost:
    """One scheduled op. All numbers are totals over its `count` executions in one step.

    `opcode` is what is done: an asynchronous start carries its inner opcode (`all-gather`), the
    done costs nothing. `cycles` is XLA:TPU's own estimate, None where it has none. `moved_bytes` is
    the dense size of operands and results, wherever they lie: the weight of the op in
    `unpriced_share`.
    """

    name: str
    opcode: str
    scope: str
    count: int = 1
    flops: Flops = ()
    matmul_flops: int = 0
    product_dtype: str = ""
    padded_flops: int = 0
    hbm_bytes: int = 0
    collective: str | None = None
    collective_bytes: int = 0
    group_size: int = 1
    cycles: int | None = None
    moved_bytes: int = 0

    def __mul__(self, trips: int) -> "OpCost":
        return replace(
            self,
            count=self.count * trips,
            flops=tuple((dtype, flops * trips) for dtype, flops in self.flops),
            matmul_flops=self.matmul_flops * trips,
            padded_flops=self.padded_flops * trips,
            hbm_bytes=self.hbm_bytes * trips,
            collective_bytes=self.collective_bytes * trips,
            cycles=None if self.cycles is None else self.cycles * trips,
            moved_bytes=self.moved_bytes * trips,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Costs of one device and one step. `Cost()` is zero; `a + b` is both, `a * n` is a loop.

    `collective_bytes` maps (kind, group size) to bytes that one device sends. `unpriced` counts
    executed ops without a rule, by opcode or custom-call target; `unpriced_bytes` is what they
    move. All totals are sums over `ops`.
    """

    ops: tuple[OpCost, ...] = ()
    unpriced: tuple[tuple[str, int], ...] = ()
    unpriced_bytes: int = 0
    flops_by_dtype: Flops = field(init=False)
    matmul_flops: int = field(init=False)
    padded_flops: int = field(init=False)
    hbm_bytes: int = field(init=False)
    collective_bytes: tuple[tuple[tuple[str, int], int], ...] = field(init=False)
    cycles: int = field(init=False)
    moved_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        flops: Counter[str] = Counter()
        wire: Counter[tuple[str, int]] = Counter()
        for op in self.ops:
            flops.update(dict(op.flops))
            if op.collective:
                wire[op.collective, op.group_size] += op.collective_bytes
        totals = {
            "flops_by_dtype": tuple(sorted(flops.items())),
            "matmul_flops": sum(op.matmul_flops for op in self.ops),
            "padded_flops": sum(op.padded_flops for op in self.ops),
            "hbm_bytes": sum(op.hbm_bytes for op in self.ops),
            "collective_bytes": tuple(sorted(wire.items())),
            "cycles": sum(op.cycles or 0 for op in self.ops),
            "moved_bytes": sum(op.moved_bytes for op in self.ops),
        }
        for name, value in totals.items():
            object.__setattr__(self, name, value)

    @property
    def hlo_flops(self) -> int:
        """All FLOPs, of every dtype, without padding."""
        return sum(flops for _, flops in self.flops_by_dtype)

    @property
    def ops_without_cycles(self) -> int:
        """Executions of ops for which the compiler gives no cycles."""
        return sum(op.count for op in self.ops if op.cycles is None)

    @property
    def unpriced_share(self) -> float:
        """Share of the bytes moved by executed ops that falls to ops without a rule."""
        whole = self.moved_bytes + self.unpriced_bytes
        return self.unpriced_bytes / whole if whole else 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            ops=self.ops + other.ops,
            unpriced=_merge(self.unpriced, other.unpriced),
            unpriced_bytes=self.unpriced_bytes + other.unpriced_bytes,
        )

    def __mul__(self, trips: int) -> "Cost":
        if trips == 0:
            return Cost()
        return Cost(
            ops=tuple(op * trips for op in self.ops),
            unpriced=tuple((label, count * trips) for label, count in self.unpriced),
            unpriced_bytes=self.unpriced_bytes * trips,
        )


def _merge(
    first: tuple[tuple[str, int], ...], second: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    """Adds up two tuples of (key, number)."""
    if not first or not second:
        return first or second
    total = Counter(dict(first))
    total.update(dict(second))
    return tuple(sorted(total.items()))


# --- What one op computes -------------------------------------------------------------------------

Rule = Callable[[Op, int], Work]
RULES: dict[str, Rule] = {}
NO_WORK = Work()


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Registers what these opcodes compute: `f(op, mxu)` is the `Work` of one execution."""

    def register(function: Rule) -> Rule:
        for opcode in opcodes:
            assert opcode not in RULES, f"{opcode} has two rules"
            RULES[opcode] = function
        return function

    return register


# One operation for each element of the result.
_ELEMENTWISE = """
abs add and atan2 cbrt ceil clamp cosine count-leading-zeros divide erf exponential
exponential-minus-one floor log log-plus-one logistic maximum minimum multiply negate not or
popcnt power remainder round-nearest-afz round-nearest-even rsqrt shift-left
shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan
tanh xor map acos acosh asin asinh atanh cosh sinh
"""


@rule(*_ELEMENTWISE.split())
def _elementwise(op: Op, mxu: int) -> Work:
    """One operation for each element; a transcendental function counts one too."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size) if op.shape.dtype != "pred" else NO_WORK


# Moves, comparisons, random bits and collectives.
_MOVES = """
bitcast-convert broadcast compare complex concatenate convert copy copy-start
dynamic-reshape dynamic-slice dynamic-update-slice gather imag infeed iota is-finite outfeed
pad real recv reduce-precision reshape reverse rng rng-bit-generator
rng-get-and-update-state select send set-dimension-size get-dimension-size slice sort topk
transpose all-gather all-gather-start all-reduce all-reduce-start all-to-all
collective-broadcast collective-permute collective-permute-start ragged-all-to-all
reduce-scatter
"""


@rule(*_MOVES.split())
def _moves(op: Op, mxu: int) -> Work:
    """No FLOPs; the additions of a reduction across devices count none either."""
    del op, mxu
    return NO_WORK


@rule("dot")
def _dot(op: Op, mxu: int) -> Work:
    """2 * batch * M * N * K; padded: M to 8, N and K to the matrix unit."""
    assert op.dot is not None
    left, right = op.operands[0].shape, op.operands[1].shape
    depth = prod(left.dims[dim] for dim in op.dot.lhs_contracting)
    batch = prod(left.dims[dim] for dim in op.dot.lhs_batch)
    if not op.shape.size or not depth:
        return NO_WORK
    rows, columns = left.size // (depth * batch), right.size // (depth * batch)
    flops = 2 * batch * rows * columns * depth
    padded = flops
    if mxu > 1:
        padded = 2 * batch * round_up(rows, 8) * round_up(columns, mxu) * round_up(depth, mxu)
    return Work.of(_matmul_dtype(op), flops, padded=padded, matmul=True)


def _matmul_dtype(op: Op) -> str:
    """The wider of the two operands' types: the rate at which the product runs."""
    return max((operand.shape for operand in op.operands[:2]), key=_item_bytes).dtype


def _item_bytes(shape: Shape) -> float:
    return shape.bytes / max(shape.size, 1)


@rule("convolution")
def _convolution(op: Op, mxu: int) -> Work:
    """2 * batch * taps * features; XLA:TPU writes ordinary matmuls so, too."""
    sizes = convolution_sizes(op)
    padded = sizes.padded_flops(mxu) if sizes.flops else 0
    return Work.of(_matmul_dtype(op), sizes.flops, padded=padded, matmul=True)


@rule("reduce")
def _reduce(op: Op, mxu: int) -> Work:
    """One operation for each element that goes in."""
    del mxu
    source = op.operands[0].shape
    return Work.of(source.dtype, source.size)


@rule("reduce-window")
def _reduce_window(op: Op, mxu: int) -> Work:
    """One operation for each element of the window that lies on the base."""
    del mxu
    base, out = op.operands[0].shape, op.shape.leaves[0]
    dims = zip(op.window, base.dims, out.dims, strict=True)
    return Work.of(base.dtype, prod(count_taps(window, size, end) for window, size, end in dims))


@rule("select-and-scatter")
def _select_and_scatter(op: Op, mxu: int) -> Work:
    """One addition for each element of the source; the comparisons that select are not counted."""
    del mxu
    return Work.of(op.shape.dtype, op.operands[1].shape.size)


@rule("scatter")
def _scatter(op: Op, mxu: int) -> Work:
    """One operation for each element of the updates."""
    del mxu
    updates = op.operands[-1].shape
    return Work.of(updates.dtype, updates.size)


@rule("fft")
def _fft(op: Op, mxu: int) -> Work:
    """5 N log2 N a transform. Source: Cooley and Tukey, as FFTW counts it."""
    del mxu
    points = max(op.operands[0].shape.size, op.shape.size)
    length = prod(op.shape.dims[-1:]) or 1
    return Work.of(op.shape.dtype, ceil(5 * points * log2(max(length, 2))))


@rule("cholesky")
def _cholesky(op: Op, mxu: int) -> Work:
    """n^3 / 3 a matrix. Source: Golub and Van Loan, Matrix Computations, 4.2."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size * op.shape.dims[-1] // 3)


@rule("triangular-solve")
def _triangular_solve(op: Op, mxu: int) -> Work:
    """n^2 for each right-hand side. Source: Golub and Van Loan, Matrix Computations, 3.1."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size * op.operands[0].shape.dims[-1])


def _library_matmul(op: Op, mxu: int) -> Work:
    """A matmul that a library does (cuBLAS, oneDNN): 2 * output * depth.

    The depth comes from the sizes: for A [b, m, k] and B [b, k, n], |A| |B| / |C| = b k^2; b is the
    product of the leading dimensions of C.
    """
    del mxu
    out = op.shape.elements[0] if op.shape.is_tuple else op.shape
    left, right = op.operands[0].shape, op.operands[1].shape
    batch = prod(out.dims[:-2])
    depth = round((left.size * right.size / max(out.size * batch, 1)) ** 0.5)
    return Work.of(_matmul_dtype(op), 2 * out.size * depth, matmul=True)


def _author_estimate(op: Op) -> Work | None:
    """What the author of a Pallas kernel says that it computes, if he says so."""
    estimate = op.config.get("custom_call_config", {}).get("cost_estimate")
    if not estimate:
        return None
    flops = int(estimate.get("flops", 0)) + int(estimate.get("transcendentals", 0))
    largest = max((*op.operands, op), key=lambda o: (o.shape.dtype[0] in "bf", o.shape.bytes))
    dtype = largest.shape.leaves[0].dtype
    return Work.of(dtype, flops)


# Custom calls that only give a buffer another name or shape; they neither compute nor move.
_FREE_TARGETS = frozenset((
    "AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndicesInBound",
))  # fmt: skip
# Custom calls that rearrange or select: they move their operands and results once, without FLOPs.
_MOVING_TARGETS = frozenset((
    "GatherScatterIndicesBitpacked", "TopK", "__gpu$TopK", "PartialReduce", "X64Combine",
    "X64SplitLow", "X64SplitHigh", "MoveToHost", "MoveToDevice", "SliceToDynamic",
    "PadToStatic", "__cub$DeviceRadixSort",
))  # fmt: skip
_LIBRARY_MATMULS = ("__cublas$", "__onednn$matmul", "__triton_gemm")


def work_of(op: Op, mxu: int) -> tuple[Work, tuple[tuple[str, int], ...]]:
    """What one execution of `op` computes, fused ops included, and what in it has no rule."""
    if op.opcode == "fusion":
        return _fused_work(op.called[0], mxu)
    if op.opcode == "custom-call":
        work = _custom_call_work(op, mxu)
        return (NO_WORK, ((op.custom_call_target, 1),)) if work is None else (work, ())
    found = RULES.get(op.opcode)
    if found is None:
        return NO_WORK, () if op.opcode in FREE else ((op.opcode, 1),)
    return found(op, mxu), ()


def _fused_work(computation: Computation, mxu: int) -> tuple[Work, tuple[tuple[str, int], ...]]:
    flops: Counter[str] = Counter()
    unpriced: Counter[str] = Counter()
    products: Counter[str] = Counter()
    padded = 0
    for op in computation.ops:
        work, missing = work_of(op, mxu)
        products.update(dict(work.products))
        padded += work.padded
        for dtype, amount in work.flops:
            flops[dtype] += amount
        for label, count in missing:
            unpriced[label] += count
    work = Work(
        flops=tuple(sorted(flops.items())), products=tuple(sorted(products.items())), padded=padded
    )
    return work, tuple(sorted(unpriced.items()))


def _custom_call_work(op: Op, mxu: int) -> Work | None:
    target = op.custom_call_target
    if target in _FREE_TARGETS or target in _MOVING_TARGETS:
        return NO_WORK
    if target.startswith("__cudnn$conv") and op.convolution is not None:
        return _convolution(op, mxu)
    if target.startswith(_LIBRARY_MATMULS):
        return _library_matmul(op, mxu)
    return _author_estimate(op)


# --- What goes over the wire ----------------------------------------------------------------------

_WIRE: dict[str, Callable[[int, int], int]] = {
    # Bytes that one of n devices sends, from the bytes of its own operands, with the ring
    # algorithm. Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce", JPDC 2009.
    "all-gather": lambda size, n: size * (n - 1),
    "all-reduce": lambda size, n: -(-2 * size * (n - 1) // n),
    "reduce-scatter": lambda size, n: -(-size * (n - 1) // n),
    "all-to-all": lambda size, n: -(-size * (n - 1) // n),
    "ragged-all-to-all": lambda size, n: -(-size * (n - 1) // n),
    "collective-permute": lambda size, n: size if n > 1 else 0,
    "collective-broadcast": lambda size, n: size if n > 1 else 0,
    "send": lambda size, n: size,
}


def _collective_kind(op: Op) -> str | None:
    kind = op.opcode.removesuffix("-start")
    return kind if kind in _WIRE and not op.is_host_transfer else None


def _collective_bytes(op: Op, kind: str) -> int:
    """Bytes on the wire for one execution; an all-gather's out * (n - 1) / n is in * (n - 1)."""
    operands = op.operands[:1] if kind in ("send", "ragged-all-to-all") else op.operands
    size = sum(operand.shape.bytes for operand in operands)
    return _WIRE[kind](size, 2 if kind == "send" else op.group_size)


def _fused_collective(op: Op, started: frozenset[int]) -> tuple[Op, str] | None:
    """The collective that a fusion starts, with its kind; None if it starts none.

    XLA:TPU repeats an asynchronous collective in the fusion that starts it, in those that overlap
    with it and in the one that ends it: only the start counts. An all-reduce of which the fusion
    keeps a slice is a reduce-scatter.
    """
    ops = op.called[0].ops
    inner = next((fused for fused in ops if _collective_kind(fused)), None)
    if inner is None:
        return None
    starts = any(fused.custom_call_target == "AsyncCollectiveStart" for fused in ops)
    if inner.channel_id in started and not starts:
        return None
    kind = _collective_kind(inner) or inner.opcode
    if kind == "all-reduce" and op.shape.bytes < inner.shape.bytes:
        kind = "reduce-scatter"
    return inner, kind


def _started_channels(module: Module) -> frozenset[int]:
    """Channels of the collectives that a fusion starts and others go on with."""
    return frozenset(
        op.channel_id
        for computation in module.computations
        if any(op.custom_call_target == "AsyncCollectiveStart" for op in computation.ops)
        for op in computation.ops
        if _collective_kind(op)
    )


# --- The walk over the schedule -------------------------------------------------------------------

# Ops that neither compute nor move, and the later halves of asynchronous pairs, which count at
# their start.
_FREE_OPCODES = """
add-dependency after-all bitcast constant domain get-tuple-element opt-barrier
optimization-barrier parameter partition-id replica-id tuple all-gather-done all-reduce-done
async-done async-update collective-permute-done copy-done recv-done send-done
"""
FREE = frozenset(_FREE_OPCODES.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pricer:
    """Prices the computations of one module."""

    module: Module
    mxu: int
    started: frozenset[int]

    def computation(self, computation: Computation) -> Cost:
        return _total(self.op(op) for op in computation.ops if op.opcode not in FREE)

    def op(self, op: Op) -> Cost:
        if op.opcode == "while":
            return self._loop(op)
        if op.opcode == "conditional":
            branches = [self.computation(branch) for branch in op.called]
            return max(branches, key=lambda c: (c.padded_flops + c.hbm_bytes, c.moved_bytes))
        if op.opcode == "call":
            return self.computation(op.called[0])
        if op.opcode == "async-start":
            return self._async(op)
        return self._leaf(op)

    def _loop(self, op: Op) -> Cost:
        """Body and condition times the trips; with unknown trips the loop is unpriced."""
        body, condition = (self.computation(called) for called in op.called)
        trips = trip_count(op, self.module)
        if trips is None:
            lost = body + condition
            size = lost.moved_bytes + lost.unpriced_bytes
            return Cost(unpriced=(("while", 1),), unpriced_bytes=size)
        return body * trips + condition * (trips + 1)

    def _async(self, op: Op) -> Cost:
        """The wrapped ops, all under the name of the start."""
        inner = self.computation(op.called[0])
        renamed = tuple(replace(cost, name=op.name) for cost in inner.ops)
        return Cost(ops=renamed, unpriced=inner.unpriced, unpriced_bytes=inner.unpriced_bytes)

    def _leaf(self, op: Op) -> Cost:
        if op.custom_call_target in _FREE_TARGETS:
            return Cost()
        work, missing = work_of(op, self.mxu)
        moved = op.shape.bytes + sum(operand.shape.bytes for operand in dict.fromkeys(op.operands))
        if missing and op.opcode != "fusion":
            return Cost(unpriced=missing, unpriced_bytes=moved)
        kind, wire, group_size = self._collective(op)
        cost = OpCost(
            name=op.name,
            opcode=op.opcode.removesuffix("-start") if kind else op.opcode,
            scope=op.scope,
            flops=work.flops,
            matmul_flops=sum(flops for _, flops in work.products),
            product_dtype=max(work.products, key=lambda item: item[1])[0] if work.products else "",
            padded_flops=work.padded,
            hbm_bytes=hbm_bytes(op),
            collective=kind,
            collective_bytes=wire,
            group_size=group_size,
            cycles=op.estimated_cycles,
            moved_bytes=moved,
        )
        if missing:
            return Cost(ops=(replace(cost, moved_bytes=0),), unpriced=missing, unpriced_bytes=moved)
        return Cost(ops=(cost,))

    def _collective(self, op: Op) -> tuple[str | None, int, int]:
        """(kind, bytes on the wire, devices in a group) of one execution."""
        if op.opcode == "fusion":
            found = _fused_collective(op, self.started)
            if found is None:
                return None, 0, 1
            inner, kind = found
            return kind, _collective_bytes(inner, kind), inner.group_size
        kind = _collective_kind(op)
        if kind is None:
            return None, 0, 1
        return kind, _collective_bytes(op, kind), op.group_size


def _total(costs: Iterable[Cost]) -> Cost:
    """The sum of many costs, at the price of one."""
    ops: list[OpCost] = []
    unpriced: Counter[str] = Counter()
    lost = 0
    for cost in costs:
        ops.extend(cost.ops)
        unpriced.update(dict(cost.unpriced))
        lost += cost.unpriced_bytes
    return Cost(ops=tuple(ops), unpriced=tuple(sorted(unpriced.items())), unpriced_bytes=lost)


def price_module(module: Module, *, mxu: int = 1) -> Cost:
    """Prices one step of one device from its optimised HLO.

    FLOPs = sum over executed ops of their rule; bytes = sum over scheduled ops of what crosses HBM;
    both times the trips of the loops around them. A conditional counts its most expensive branch.

    Assumes that each fused op runs once for each of its elements, and that every buffer in HBM is
    moved in full tiles. Ops that only move (sort, random bits) count no FLOPs.

    Args:
      module: From `read_module`, of an executable's HLO (scheduled and partitioned).
      mxu: Side of the matrix unit, for `padded_flops`: 128, on v6e and 7x 256; 1 pads nothing.

    Returns:
      The cost, and in `unpriced` all that has no rule or no known trip count.
    """
    return _Pricer(module=module, mxu=mxu, started=_started_channels(module)).computation(
        module.entry
    )
