"""Which ops make a step slow: each op's measured time beside what it does and what was predicted.

Nothing is dropped. An op that was measured and has no cost (a loop's own work), and one that was
priced and never seen, are rows too; so is the time in which no op ran.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from jaxbench.cost import OpCost
from jaxbench.hlo.module import Module, Op, split_op_name
from jaxbench.ops import opclass
from jaxbench.trace import MeasuredStep

Pass = Literal["forward", "backward", "optimizer", "unknown"]
BETWEEN = "(between ops)"
_OPTIMIZER = "optimizer"  # the scope that a program gives to its update
_WRAPPED = re.compile(r"\w+\((.*)\)")


@dataclass(frozen=True, kw_only=True, slots=True)
class OpRow:
    """One op of a step. All numbers are totals over its executions in one step of one device.

    Attributes:
      op_pass: `unknown` where the compiler kept no name: its copies, what it made of many ops.
      op_class: From `classify_ops`; empty without a module.
      num_executions: Of a loop, its iterations.
      product_flops: FLOPs of its products where nothing is skipped, see `opclass.product_flops`.
      predicted_s: None if it has no cost. bound: What binds it in the prediction.
      measured_s: None if it was never seen.
    """

    name: str
    opcode: str
    scope: str = ""
    op_pass: Pass = "unknown"
    op_class: str = ""
    num_executions: float = 1.0
    flops: int = 0
    product_flops: int = 0
    hbm_bytes: int = 0
    predicted_s: float | None = None
    bound: str = ""
    measured_s: float | None = None

    @property
    def ratio(self) -> float | None:
        """Measured over predicted time; None if one of them is missing or nothing."""
        return self.measured_s / self.predicted_s if self.measured_s and self.predicted_s else None

    @property
    def flops_per_s(self) -> float | None:
        """Measured rate of its FLOPs."""
        return self.flops / self.measured_s if self.measured_s else None

    @property
    def bytes_per_s(self) -> float | None:
        """Measured rate of the bytes that it moves between memory and cores."""
        return self.hbm_bytes / self.measured_s if self.measured_s else None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpGroup:
    """The ops of one module, pass or class, added up; a missing time counts as none."""

    name: str
    num_ops: int
    measured_s: float
    predicted_s: float
    flops: int
    hbm_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOps:
    """All ops of a measured step, the longest first.

    Attributes:
      step_s: Measured; the rows' seconds, what is between them among those, add up to it.
      num_steps: Steps measured. num_dropped: Steps left out before them.
    """

    rows: tuple[OpRow, ...]
    step_s: float
    num_steps: int
    num_dropped: int
    platform: str
    module: str

    @property
    def between_s(self) -> float:
        """Seconds in which no op ran."""
        return sum(row.measured_s or 0.0 for row in self.rows if row.name == BETWEEN)

    @property
    def busy_s(self) -> float:
        """Seconds in which any op ran."""
        return sum(row.measured_s or 0.0 for row in self.rows if row.name != BETWEEN)

    @property
    def without_cost(self) -> tuple[OpRow, ...]:
        """What was measured and has no cost."""
        return tuple(r for r in self.rows if r.predicted_s is None and r.name != BETWEEN)

    @property
    def not_seen(self) -> tuple[OpRow, ...]:
        """What has a cost and was never seen."""
        return tuple(row for row in self.rows if row.measured_s is None)

    def share(self, row: OpRow) -> float:
        """Returns the row's part of the step."""
        return (row.measured_s or 0.0) / self.step_s if self.step_s else 0.0

    def by_pass(self) -> tuple[OpGroup, ...]:
        """Returns forward, backward, optimizer and the rest, the longest first."""
        return self._grouped(lambda row: row.op_pass)

    def by_class(self) -> tuple[OpGroup, ...]:
        """Returns the classes of work, the longest first."""
        return self._grouped(lambda row: row.op_class or row.opcode)

    def by_module(self, depth: int = 2) -> tuple[OpGroup, ...]:
        """Returns the modules to this depth of their scopes, both passes in one."""
        return self._grouped(lambda row: "/".join(module_path(row.scope)[:depth]))

    def _grouped(self, key: Callable[[OpRow], str]) -> tuple[OpGroup, ...]:
        groups: defaultdict[str, list[OpRow]] = defaultdict(list)
        for row in self.rows:
            groups[BETWEEN if row.name == BETWEEN else key(row) or "(no scope)"].append(row)
        found = [_add_up(name, rows) for name, rows in groups.items()]
        return tuple(sorted(found, key=lambda group: (-group.measured_s, group.name)))

    def to_json(self, depth: int = 2) -> dict[str, Any]:
        """Returns everything as JSON-ready values, derived ones too."""
        rows = [
            {
                **asdict(row),
                "ratio": row.ratio,
                "flops_per_s": row.flops_per_s,
                "bytes_per_s": row.bytes_per_s,
                "share": self.share(row),
            }
            for row in self.rows
        ]
        groups = {"passes": self.by_pass(), "modules": self.by_module(depth)}
        return {
            **{name: getattr(self, name) for name in _OF_STEP},
            "busy_s": self.busy_s,
            "between_s": self.between_s,
            "rows": rows,
            **{name: [asdict(group) for group in found] for name, found in groups.items()},
        }

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> StepOps:
        """Reads what `to_json` gave; derived values are worked out again."""
        names = [field.name for field in fields(OpRow)]
        rows = tuple(OpRow(**{name: row[name] for name in names}) for row in values["rows"])
        return StepOps(rows=rows, **{name: values[name] for name in _OF_STEP})


_OF_STEP = ("step_s", "num_steps", "num_dropped", "platform", "module")


def _add_up(name: str, rows: Sequence[OpRow]) -> OpGroup:
    return OpGroup(
        name=name,
        num_ops=len(rows),
        measured_s=sum(row.measured_s or 0.0 for row in rows),
        predicted_s=sum(row.predicted_s or 0.0 for row in rows),
        flops=sum(row.flops for row in rows),
        hbm_bytes=sum(row.hbm_bytes for row in rows),
    )


def pass_of(op_name: str) -> Pass:
    """Returns the pass of an op from its scopes.

    JAX writes `transpose(jvp(net))` around what goes back, rematerialised forward work included.
    """
    if not op_name:
        return "unknown"
    if _OPTIMIZER in op_name.split("/"):
        return "optimizer"
    return "backward" if re.search(r"\btranspose\(|rematted_computation", op_name) else "forward"


def module_path(scope: str) -> list[str]:
    """Returns the scopes without `jvp` and `transpose`: forward and backward are one module."""
    path = []
    for part in re.split(r"/(?![^()]*\))", scope):
        while match := _WRAPPED.fullmatch(part):
            part = match[1]
        path.append(part)
    return [part for part in path if part]


def list_ops(
    predicted: Iterable[tuple[OpCost, float, str]], module: Module | None = None
) -> tuple[OpRow, ...]:
    """Lists the ops of a step before it is measured, one row a name, and what is between them.

    Args:
      predicted: From `predict_ops`.
      module: Whose cost that is; with it rows have classes, and loops have rows.
    """
    ops = {op.name: op for c in opclass.scheduled(module) for op in c.ops} if module else {}
    classes = opclass.classify_ops(module) if module else {}
    rows: dict[str, OpRow] = {}
    for cost, seconds, bound in predicted:
        row = _row(cost, seconds * cost.count, bound)
        if cost.name in ops:
            row = _with_op(row, ops[cost.name], classes)
        rows[cost.name] = _merged(rows[cost.name], row) if cost.name in rows else row
    for op in ops.values():
        if op.opcode == "while":
            row = OpRow(name=op.name, opcode=op.opcode, num_executions=_iterations(op, rows))
            rows[op.name] = _with_op(row, op, classes)
    num_ops = sum(row.num_executions for row in rows.values())
    between = OpRow(
        name=BETWEEN, opcode="", op_class=opclass.BETWEEN, num_executions=num_ops, measured_s=None
    )
    return (*rows.values(), between)


def _row(cost: OpCost, predicted_s: float, bound: str) -> OpRow:
    return OpRow(
        name=cost.name,
        opcode=cost.opcode,
        scope=cost.scope,
        op_pass=pass_of(cost.scope),
        num_executions=cost.count,
        flops=sum(flops for _, flops in cost.flops),
        product_flops=cost.matmul_flops,
        hbm_bytes=cost.hbm_bytes,
        predicted_s=predicted_s,
        bound=bound,
    )


def _with_op(row: OpRow, op: Op, classes: Mapping[str, str]) -> OpRow:
    """What only the HLO tells."""
    op_name = op.op_name or _fused_name(op)
    return replace(
        row,
        scope=row.scope or split_op_name(op_name)[0],
        op_pass=pass_of(op_name if "/" in op_name else ""),
        op_class=classes.get(op.name, opclass.OTHER),
        product_flops=round(opclass.product_flops(op) * row.num_executions),
    )


def _fused_name(op: Op) -> str:
    """The name of the last op with a name that a nameless fusion fuses."""
    if op.opcode != "fusion":
        return ""
    names = (fused.op_name for fused in reversed(op.called[0].ops) if "/" in fused.op_name)
    return next(names, "")


def _merged(one: OpRow, other: OpRow) -> OpRow:
    """One op that the cost lists at several places: in a loop and after it."""
    return replace(
        one,
        num_executions=one.num_executions + other.num_executions,
        flops=one.flops + other.flops,
        product_flops=one.product_flops + other.product_flops,
        hbm_bytes=one.hbm_bytes + other.hbm_bytes,
        predicted_s=(one.predicted_s or 0.0) + (other.predicted_s or 0.0),
    )


def _iterations(loop: Op, rows: Mapping[str, OpRow]) -> float:
    """How often the loop's body runs in a step, loops around it included; 0 if that is unknown."""
    inside = [rows[op.name].num_executions for op in loop.called[0].ops if op.name in rows]
    return max(inside, default=0.0)


def join_ops(step: MeasuredStep, listed: Sequence[OpRow]) -> StepOps:
    """Joins what was measured with what was listed, by name.

    Args:
      step: From `read_trace`.
      listed: From `list_ops`, of the same program.
    """
    rows = {row.name: row for row in listed}
    executions = {op.name: op.num_executions for op in step.ops}
    seconds = {**step.op_s, BETWEEN: step.between_s}
    for name, measured_s in seconds.items():
        row = rows.get(name)
        if row is None:
            opcode = re.sub(r"[.\d]+$", "", name)
            count = executions.get(name, 1.0)
            row = OpRow(name=name, opcode=opcode, num_executions=count, op_class=opclass.OTHER)
        rows[name] = replace(row, measured_s=measured_s)
    ordered = sorted(rows.values(), key=lambda row: (-(row.measured_s or 0.0), row.name))
    return StepOps(
        rows=tuple(ordered),
        step_s=step.step_s,
        num_steps=step.num_steps,
        num_dropped=step.num_dropped,
        platform=step.platform,
        module=step.module,
    )
