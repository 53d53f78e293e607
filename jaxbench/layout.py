"""Layouts: a mesh and the rules from logical axes to its axes. Only here are both known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxbench.errors import LayoutError, UsageError

MESH_AXES = ("data", "fsdp", "tensor")

# A logical axis takes those of its mesh axes that the mesh has. `batch` is of activations, the rest
# of parameters. Source of the scheme: T5X and MaxText logical axis rules.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", ("data", "fsdp")),
    ("embed", ("fsdp",)),
    ("conv_in", ()),
    ("conv_out", ("fsdp",)),
    ("mlp", ("tensor",)),
    ("heads", ("tensor",)),
    ("kv_heads", ("tensor",)),
    ("vocab", ("tensor",)),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Mesh axes with their sizes, in order; at most one is -1, and takes the remaining devices."""

    axes: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Canonical text, which parses to the same layout."""
        return ",".join(axis if size == -1 else f"{axis}={size}" for axis, size in self.axes)

    def rules(self) -> tuple[tuple[str, tuple[str, ...] | None], ...]:
        """Returns the rules reduced to the axes of this mesh; an axis without any is replicated."""
        have = {axis for axis, _ in self.axes}
        reduced = (
            (logical, tuple(axis for axis in axes if axis in have)) for logical, axes in RULES
        )
        return tuple((logical, axes or None) for logical, axes in reduced)


def parse_layout(text: str) -> Layout:
    """Parses `fsdp`, `data`, `data=2,fsdp=8`; an axis without size takes what remains."""
    axes = []
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in MESH_AXES or (size and (not size.isdecimal() or int(size) < 1)):
            raise UsageError(
                f"Layout {text!r} is wrong at {part.strip()!r}. Axes: {', '.join(MESH_AXES)}; "
                "write fsdp, data, or sizes such as data=2,fsdp=8."
            )
        axes.append((axis, int(size) if size else -1))
    names = [axis for axis, _ in axes]
    if len(set(names)) < len(names) or sum(size == -1 for _, size in axes) > 1:
        raise UsageError(
            f"Layout {text!r} names an axis twice or leaves two sizes open: at most one may be "
            f"open."
        )
    return Layout(axes=tuple(axes))


def resolve_layout(layout: Layout, num_devices: int) -> Layout:
    """Gives the open axis its size.

    Raises:
      LayoutError: if the sizes do not make up `num_devices`.
    """
    fixed = math.prod(size for _, size in layout.axes if size != -1)
    open_axis = any(size == -1 for _, size in layout.axes)
    if num_devices % fixed or (not open_axis and fixed != num_devices):
        raise LayoutError(
            f"Layout {layout.name} needs {'a multiple of ' if open_axis else ''}{fixed} devices, "
            f"the target has "
            f"{num_devices}. Change the sizes or the topology."
        )
    return Layout(
        axes=tuple(
            (axis, num_devices // fixed if size == -1 else size) for axis, size in layout.axes
        )
    )


def check_batch(layout: Layout, global_batch: int) -> None:
    """Raises LayoutError unless the batch divides over the resolved mesh's data and FSDP axes."""
    ways = math.prod(size for axis, size in layout.axes if axis in ("data", "fsdp"))
    if global_batch % ways:
        raise LayoutError(
            f"global_batch={global_batch} does not divide over {ways} devices of layout "
            f"{layout.name}. "
            f"Use a multiple of {ways}, or fewer devices."
        )
