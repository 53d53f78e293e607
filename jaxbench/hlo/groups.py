"""Which devices take part in a collective: the four notations of XLA's replica groups, made one."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaGroups:
    """`num_groups` groups of `group_size` devices each.

    `listed` holds the groups where the program lists them. Else they are the rows of iota(dims)
    transposed by `perm`, with the numbers looked up in `device_ids` if there are any. `axes` names
    the mesh axes that span a group, with the sizes of their part in it, where the program says so.
    """

    num_groups: int
    group_size: int
    listed: tuple[tuple[int, ...], ...] = ()
    dims: tuple[int, ...] = ()
    perm: tuple[int, ...] = ()
    device_ids: tuple[int, ...] = ()
    axes: tuple[tuple[str, int], ...] = ()

    @property
    def devices(self) -> tuple[tuple[int, ...], ...]:
        """The device numbers, group by group."""
        if self.listed:
            return self.listed
        ids = np.array(self.device_ids) if self.device_ids else np.arange(prod(self.dims))
        rows = ids.reshape(self.dims).transpose(self.perm).reshape(self.num_groups, -1)
        return tuple(tuple(int(device) for device in row) for row in rows)


def read_groups(proto: Any) -> ReplicaGroups | None:
    """The replica groups of one instruction message, or None if it has none."""
    if proto.HasField("mesh_groups"):
        return _from_mesh(proto.mesh_groups)
    if proto.HasField("iota_groups"):
        return _from_iota(proto.iota_groups)
    if proto.HasField("device_list"):
        if proto.device_list.HasField("iota"):
            return _from_iota(proto.device_list.iota)
        return _from_list(proto.device_list.groups)
    return _from_list(proto.replica_groups)


def _from_list(groups: Any) -> ReplicaGroups | None:
    listed = tuple(tuple(group.replica_ids) for group in groups)
    if not listed or not listed[0]:
        return None
    return ReplicaGroups(num_groups=len(listed), group_size=len(listed[0]), listed=listed)


def _from_iota(iota: Any) -> ReplicaGroups:
    dims = tuple(iota.reshape_dims)
    return ReplicaGroups(
        num_groups=iota.num_groups,
        group_size=iota.group_size,
        dims=dims,
        perm=tuple(iota.transpose_perm) or tuple(range(len(dims))),
    )


def _from_mesh(mesh_groups: Any) -> ReplicaGroups:
    """Groups from mesh axes; an axis in use in part is split into (major, part, minor)."""
    mesh = mesh_groups.mesh
    parts: dict[int, list[tuple[int, int]]] = {}
    for ref in mesh_groups.axes:
        size = mesh.axes[ref.index].size
        sub = ref.sub_axis
        part = (sub.pre_size, sub.size) if ref.HasField("sub_axis") else (1, size)
        parts.setdefault(ref.index, []).append(part)
    dims: list[int] = []
    position: dict[tuple[int, tuple[int, int]], int] = {}
    for index, axis in enumerate(mesh.axes):
        _split_axis(index, axis.size, sorted(parts.get(index, [])), dims, position)
    used = [
        position[ref.index, (ref.sub_axis.pre_size, ref.sub_axis.size)]
        if ref.HasField("sub_axis")
        else position[ref.index, (1, mesh.axes[ref.index].size)]
        for ref in mesh_groups.axes
    ]
    perm = [dim for dim in range(len(dims)) if dim not in used] + used
    group_size = prod(dims[dim] for dim in used)
    names = [mesh.axes[ref.index].name for ref in mesh_groups.axes]
    return ReplicaGroups(
        num_groups=prod(dims) // group_size,
        group_size=group_size,
        dims=tuple(dims),
        perm=tuple(perm),
        device_ids=tuple(mesh.device_ids),
        axes=tuple(zip(names, (dims[dim] for dim in used), strict=True)),
    )


def _split_axis(
    index: int,
    size: int,
    parts: list[tuple[int, int]],
    dims: list[int],
    position: dict[tuple[int, tuple[int, int]], int],
) -> None:
    """Appends the factors of one mesh axis to `dims` and notes where each used part stands."""
    done = 1
    for pre_size, part in parts:
        if pre_size > done:
            dims.append(pre_size // done)
        position[index, (pre_size, part)] = len(dims)
        dims.append(part)
        done = pre_size * part
    if done < size or not parts:
        dims.append(size // done)


def permute_group_size(pairs: tuple[tuple[int, int], ...]) -> int:
    """Devices in the longest chain of a collective permute: the ring that the data goes round."""
    target = dict(pairs)
    starts = [source for source in target if source not in set(target.values())]
    longest, seen = 1, set[int]()
    for first in starts + list(target):
        device, length = first, 0
        while device not in seen:
            seen.add(device)
            length += 1
            device = target.get(device, first)
        longest = max(longest, length)
    return longest
