"""What a compiled program costs one device in one step: FLOPs, bytes, cycles, in their order.

`jaxbench.rules` says what one op computes, `jaxbench.hlo.traffic` what it moves. Loops count their
trips. What has no rule is listed under `unpriced`, never dropped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

from jaxbench.hlo.groups import ReplicaGroups
from jaxbench.hlo.loops import trip_count
from jaxbench.hlo.module import Computation, Module, Op
from jaxbench.hlo.traffic import hbm_bytes, in_host_memory
from jaxbench.rules import FREE, FREE_TARGETS, Flops, merge_counts, work_of

# Where an op runs: `compute` is the tensor core or the GPU's main stream, `dma` copies between the
# memories of one chip, `collective` the network, `host` copies over the host link.
Stream = Literal["compute", "dma", "collective", "host"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OpCost:
    """One scheduled op. All numbers are totals over its `count` executions.

    `opcode` is what is done: an asynchronous start carries its inner opcode (`all-gather`), the
    done costs nothing. `cycles` is XLA:TPU's own estimate, None where it has none. `moved_bytes` is
    the dense size of operands and results, wherever they lie: the weight of the op in
    `unpriced_share`. `sizes` are (batch, rows, columns, depth) of its largest product;
    `window_flops` are those of `matmul_flops` in convolutions with windows.
    `buffer_bytes` is the largest buffer of a collective: what an all-gather makes, what a
    reduce-scatter takes; `host_bytes` is what goes over the host link. `starts` names what a `Wait`
    ends, for an op that runs beside those after it; it is empty for one that they wait for.
    """

    name: str
    opcode: str
    scope: str
    count: int = 1
    flops: Flops = ()
    matmul_flops: int = 0
    window_flops: int = 0
    product_dtype: str = ""
    sizes: tuple[int, ...] = ()
    padded_flops: int = 0
    hbm_bytes: int = 0
    host_bytes: int = 0
    collective: str | None = None
    collective_bytes: int = 0
    buffer_bytes: int = 0
    group_size: int = 1
    groups: ReplicaGroups | None = field(default=None, repr=False)
    pairs: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    cycles: int | None = None
    moved_bytes: int = 0
    target: str = ""
    stream: Stream = "compute"
    starts: str = ""

    def __mul__(self, trips: int) -> OpCost:
        return replace(
            self,
            count=self.count * trips,
            flops=tuple((dtype, flops * trips) for dtype, flops in self.flops),
            matmul_flops=self.matmul_flops * trips,
            window_flops=self.window_flops * trips,
            padded_flops=self.padded_flops * trips,
            hbm_bytes=self.hbm_bytes * trips,
            host_bytes=self.host_bytes * trips,
            collective_bytes=self.collective_bytes * trips,
            buffer_bytes=self.buffer_bytes * trips,
            cycles=None if self.cycles is None else self.cycles * trips,
            moved_bytes=self.moved_bytes * trips,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Wait:
    """The end of an asynchronous op: what comes after it waits for `token`."""

    token: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Loop:
    """Steps that are done `trips` times."""

    trips: int
    steps: tuple[Step, ...]


Step = OpCost | Wait | Loop


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Costs of one device and one step. `Cost()` is zero; `a + b` is both, `a * n` is a loop.

    `steps` is the schedule. `collective_bytes` maps (kind, group size) to bytes that one device
    sends. `unpriced` counts executed ops without a rule, by opcode or custom-call target;
    `unpriced_bytes` is what they move. All totals are sums over `ops`, the steps with their trips.
    """

    steps: tuple[Step, ...] = ()
    unpriced: tuple[tuple[str, int], ...] = ()
    unpriced_bytes: int = 0
    ops: tuple[OpCost, ...] = field(init=False, repr=False)
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
        ops = tuple(_executed(self.steps, 1))
        for op in ops:
            flops.update(dict(op.flops))
            if op.collective:
                wire[op.collective, op.group_size] += op.collective_bytes
        totals = {
            "ops": ops,
            "flops_by_dtype": tuple(sorted(flops.items())),
            "matmul_flops": sum(op.matmul_flops for op in ops),
            "padded_flops": sum(op.padded_flops for op in ops),
            "hbm_bytes": sum(op.hbm_bytes for op in ops),
            "collective_bytes": tuple(sorted(wire.items())),
            "cycles": sum(op.cycles or 0 for op in ops),
            "moved_bytes": sum(op.moved_bytes for op in ops),
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

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            steps=self.steps + other.steps,
            unpriced=merge_counts(self.unpriced, other.unpriced),
            unpriced_bytes=self.unpriced_bytes + other.unpriced_bytes,
        )

    def __mul__(self, trips: int) -> Cost:
        if trips == 0:
            return Cost()
        return Cost(
            steps=(Loop(trips=trips, steps=self.steps),) if self.steps else (),
            unpriced=tuple((label, count * trips) for label, count in self.unpriced),
            unpriced_bytes=self.unpriced_bytes * trips,
        )


def _executed(steps: Iterable[Step], trips: int) -> Iterator[OpCost]:
    """Every op once, with the totals of all its executions."""
    for step in steps:
        if isinstance(step, OpCost):
            yield step * trips if trips > 1 else step
        elif isinstance(step, Loop):
            yield from _executed(step.steps, trips * step.trips)


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Collective:
    """What an op sends: its kind, the op that names the groups, and whether it only starts it."""

    kind: str
    op: Op
    is_async: bool = False

    @property
    def operand_bytes(self) -> int:
        first_only = self.kind in ("send", "ragged-all-to-all")
        operands = self.op.operands[:1] if first_only else self.op.operands
        return sum(operand.shape.bytes for operand in operands)

    @property
    def group_size(self) -> int:
        return self.op.group_size

    @property
    def wire_bytes(self) -> int:
        """Bytes that one device sends; an all-gather's out * (n - 1) / n is in * (n - 1)."""
        return _WIRE[self.kind](self.operand_bytes, 2 if self.kind == "send" else self.group_size)

    @property
    def buffer_bytes(self) -> int:
        return self.operand_bytes * (self.group_size if self.kind == "all-gather" else 1)


def _collective_kind(op: Op) -> str | None:
    kind = op.opcode.removesuffix("-start")
    return kind if kind in _WIRE and not op.is_host_transfer else None


def _find_collective(op: Op, started: frozenset[int]) -> _Collective | None:
    """The collective that an op does or starts; None if it does none."""
    if op.opcode == "fusion":
        return _fused_collective(op, started)
    kind = _collective_kind(op)
    return _Collective(kind=kind, op=op, is_async=op.opcode.endswith("-start")) if kind else None


def _fused_collective(op: Op, started: frozenset[int]) -> _Collective | None:
    """The collective that a fusion starts; None if it starts none.

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
    return _Collective(kind=kind, op=inner, is_async=starts)


def _started_channels(module: Module) -> frozenset[int]:
    """Channels of the collectives that a fusion starts and others go on with."""
    return frozenset(
        op.channel_id
        for computation in module.computations
        if any(op.custom_call_target == "AsyncCollectiveStart" for op in computation.ops)
        for op in computation.ops
        if _collective_kind(op)
    )


def _ended_channel(op: Op) -> int | None:
    """The channel of the asynchronous collective that a fusion ends, if it ends one."""
    ops = op.called[0].ops
    if not any(fused.custom_call_target == "AsyncCollectiveDone" for fused in ops):
        return None
    return next((fused.channel_id for fused in ops if _collective_kind(fused)), None)


# --- The walk over the schedule -------------------------------------------------------------------

_DONE = frozenset((
    "all-gather-done", "all-reduce-done", "async-done", "collective-permute-done", "copy-done",
    "recv-done", "send-done",
))  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pricer:
    """Prices the computations of one module."""

    module: Module
    mxu: int
    started: frozenset[int]

    def computation(self, computation: Computation) -> Cost:
        return _total(self.op(op) for op in computation.ops)

    def op(self, op: Op) -> Cost:
        if op.opcode in _DONE:
            return Cost(steps=(Wait(token=_start_of(op).name),))
        if op.opcode in FREE:
            return Cost()
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
        return (condition + body) * trips + condition

    def _async(self, op: Op) -> Cost:
        """The wrapped ops, all under the name of the start."""
        inner = self.computation(op.called[0])
        steps = tuple(
            replace(
                step,
                name=op.name,
                starts=op.name,
                stream="dma" if step.stream == "compute" else step.stream,
            )
            for step in inner.steps
            if isinstance(step, OpCost)
        )
        return Cost(steps=steps, unpriced=inner.unpriced, unpriced_bytes=inner.unpriced_bytes)

    def _leaf(self, op: Op) -> Cost:
        if op.custom_call_target in FREE_TARGETS:
            return Cost()
        work, missing = work_of(op, self.mxu)
        moved = op.shape.bytes + sum(operand.shape.bytes for operand in dict.fromkeys(op.operands))
        if missing and op.opcode != "fusion":
            return Cost(unpriced=missing, unpriced_bytes=moved)
        cost = OpCost(
            name=op.name,
            opcode=op.opcode,
            scope=op.scope,
            flops=work.flops,
            matmul_flops=sum(flops for _, flops in work.products),
            product_dtype=max(work.products, key=lambda item: item[1])[0] if work.products else "",
            sizes=work.sizes,
            window_flops=work.in_windows,
            padded_flops=work.padded,
            hbm_bytes=hbm_bytes(op),
            cycles=op.estimated_cycles,
            moved_bytes=moved,
            target=op.custom_call_target,
        )
        steps = self._placed(op, cost)
        if missing:
            lost = tuple(
                replace(step, moved_bytes=0) if isinstance(step, OpCost) else step for step in steps
            )
            return Cost(steps=lost, unpriced=missing, unpriced_bytes=moved)
        return Cost(steps=steps)

    def _placed(self, op: Op, cost: OpCost) -> tuple[Step, ...]:
        """The op on its stream, after what it ends."""
        waits: tuple[Step, ...] = ()
        if op.opcode == "fusion":
            channel = _ended_channel(op)
            waits = (Wait(token=f"channel {channel}"),) if channel is not None else ()
        collective = _find_collective(op, self.started)
        if collective is not None:
            return (*waits, *_collective_steps(op, cost, collective))
        if op.opcode == "copy-start":
            return (replace(cost, opcode="copy", starts=op.name, **_link(op)),)
        if in_host_memory(op.shape) or any(in_host_memory(x.shape) for x in op.operands):
            return (*waits, replace(cost, **_link(op)))
        return (*waits, cost)


def _collective_steps(op: Op, cost: OpCost, collective: _Collective) -> tuple[Step, ...]:
    """A collective on the network; a fusion that starts one computes beside it."""
    if not collective.is_async:
        token = ""
    elif op.opcode == "fusion":
        token = f"channel {collective.op.channel_id}"
    else:
        token = op.name
    sent = replace(
        cost,
        opcode=cost.opcode.removesuffix("-start"),
        collective=collective.kind,
        collective_bytes=collective.wire_bytes,
        buffer_bytes=collective.buffer_bytes,
        group_size=collective.group_size,
        groups=collective.op.groups,
        pairs=collective.op.source_target_pairs,
        stream="collective",
        starts=token,
    )
    return (sent,)


def _link(op: Op) -> dict:
    """The stream and the bytes over the host link of a copy, a slice or an update."""
    if not (in_host_memory(op.shape) or any(in_host_memory(x.shape) for x in op.operands)):
        return {"stream": "dma"}
    sizes = [
        leaf.bytes
        for shape in (op.shape, *(x.shape for x in op.operands))
        for leaf in shape.leaves
        if leaf.bytes > 4
    ]
    return {"stream": "host", "host_bytes": min(sizes, default=0)}


def _start_of(op: Op) -> Op:
    """The op that starts what this one ends, as far as the same computation says."""
    while op.opcode in (*_DONE, "async-update", "get-tuple-element", "bitcast") and op.operands:
        op = op.operands[0]
    return op


def _total(costs: Iterable[Cost]) -> Cost:
    """The sum of many costs, at the price of one."""
    steps: list[Step] = []
    unpriced: Counter[str] = Counter()
    lost = 0
    for cost in costs:
        steps.extend(cost.steps)
        unpriced.update(dict(cost.unpriced))
        lost += cost.unpriced_bytes
    return Cost(steps=tuple(steps), unpriced=tuple(sorted(unpriced.items())), unpriced_bytes=lost)


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
