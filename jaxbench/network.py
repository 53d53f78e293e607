"""Seconds that collectives take: by algorithm and size, on the links that their groups cross.

On TPUs an all-gather or reduce-scatter over a torus uses all links of all its axes both ways; on
GPUs of one NVLink domain it takes what NCCL was measured to take; across hosts or slices the
data-centre network is the narrowest place. A group is placed on the target from its device numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jaxbench.errors import JaxbenchError, UnknownPeakError
from jaxbench.hlo.groups import ReplicaGroups
from jaxbench.target import Chip, Target, chip_table

# How often the largest buffer goes through the links of one device.
_PASSES = {"all-reduce": 2.0}
_HOP_S = 1e-6  # scaling book, "TPUs": about a microsecond a hop
_HOST_LINK_BYTES_PER_S = 32.0e9  # assumed: PCIe 4 x16, one way


class GroupError(JaxbenchError, ValueError):
    """The replica groups of a program contradict each other or its target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One replica group on one target.

    Attributes:
      size: Devices in it.
      num_domains: Slices (TPU) or hosts (GPU) that it spans.
      axes: (chips, whether the axis closes) along each torus axis that the group spans in one
        slice; empty on GPUs.
      is_pairwise: Its devices exchange with one partner each, as in a permute.
    """

    size: int
    num_domains: int = 1
    axes: tuple[tuple[int, bool], ...] = ()
    is_pairwise: bool = False

    @property
    def inside(self) -> int:
        """Devices in one slice or host."""
        return max(1, self.size // self.num_domains)


@functools.lru_cache(maxsize=4096)
def place_group(
    groups: ReplicaGroups | None, pairs: tuple[tuple[int, int], ...], target: Target
) -> Group:
    """Places the first of equal groups on the target.

    Device numbers count slices (or hosts) first, then the devices of one as the mesh has them.
    Inside a slice JAX lays each mesh axis along whole torus axes where their sizes allow; so a
    group of n devices is taken to span the fewest axes whose chips multiply to n.

    Raises:
      GroupError: if a device stands twice, does not exist, or groups differ in size.
    """
    domain = _domain_devices(target)
    if pairs:
        _check_devices([device for pair in pairs for device in pair], target, unique=False)
        crosses = any(source // domain != end // domain for source, end in pairs)
        return Group(size=2, num_domains=2 if crosses else 1, axes=((2, False),), is_pairwise=True)
    if groups is None:
        return Group(size=1)
    _check_groups(groups, target)
    first = groups.devices[0]
    domains = len({device // domain for device in first})
    size = len(first)
    if target.kind != "tpu":
        return Group(size=size, num_domains=domains)
    return Group(size=size, num_domains=domains, axes=_torus_axes(size // domains, target))


def _domain_devices(target: Target) -> int:
    """Devices of one slice, or of one host of GPUs."""
    return target.topology[-1] if target.kind == "gpu" else target.num_devices // target.num_slices


def _check_groups(groups: ReplicaGroups, target: Target) -> None:
    sizes = {len(group) for group in groups.listed}
    if len(sizes) > 1:
        raise GroupError(
            f"Replica groups of {sorted(sizes)} devices in one collective: XLA makes them equal. "
            "The HLO is of a version that this jaxbench does not read."
        )
    _check_devices([device for group in groups.devices for device in group], target, unique=True)


def _check_devices(devices: list[int], target: Target, *, unique: bool) -> None:
    if devices and not 0 <= min(devices) <= max(devices) < target.num_devices:
        raise GroupError(
            f"Replica groups name device {max(devices)}, but {target.name} has "
            f"{target.num_devices}. Give the target that the program was compiled for."
        )
    if unique and len(set(devices)) < len(devices):
        raise GroupError(
            "Replica groups name a device twice in one collective: each is in one group. "
            "The HLO is damaged, or of a version that this jaxbench does not read."
        )


def _torus_axes(size: int, target: Target) -> tuple[tuple[int, bool], ...]:
    """The torus axes that a group of `size` devices of one slice spans."""
    chip = chip_table()[target.chip]
    chips = max(1, size // chip.devices_per_chip) if size > 1 else 1
    axes = [
        (length, _closes(length, index, target, chip))
        for index, length in enumerate(target.topology)
        if length > 1
    ]
    for count in range(len(axes) + 1):
        for some in itertools.combinations(axes, count):
            if math.prod(length for length, _ in some) == chips:
                return some
    return ((chips, False),)  # a part of an axis


def _closes(length: int, index: int, target: Target, chip: Chip) -> bool:
    """Whether an axis is a ring: in cubes of four on 3-D tori, at a pod's full side on 2-D ones."""
    del index, target
    if chip.topology_dims == 3:
        return length % 4 == 0
    return length == max(chip.max_topology)


def collective_s(kind: str, size_bytes: float, group: Group, target: Target) -> float:
    """Returns the seconds of one collective.

    TPU, inside a slice: passes * bytes * (n - 1) / n / bandwidth + hops, where all axes carry at
    once: two links each where the axis closes, else one. An all-to-all is bound by the bisection:
    a quarter of the longest ring's devices times bytes cross each link. Over the data-centre
    network each device moves its part through its own share of it.

    Args:
      size_bytes: The largest buffer of one device: what an all-gather makes, what a reduce-scatter
        takes, what an all-reduce, all-to-all or permute moves.

    Raises:
      UnknownPeakError: if the chip has no figure for the network that the group crosses.

    Source: scaling-book, "How to Scale Your Model", chapters TPUs and sharding; for GPUs
    network.toml.
    """
    if group.size <= 1 or not size_bytes or target.kind == "cpu":
        # Devices faked on one machine copy through its memory, priced elsewhere.
        return 0.0
    chip = chip_table()[target.chip]
    inside_s = 0.0
    if group.inside > 1 or (group.is_pairwise and group.num_domains == 1):
        inside_s = (_torus_s if target.kind == "tpu" else _nvlink_s)(kind, size_bytes, group, chip)
    if group.num_domains == 1:
        return inside_s
    return inside_s + _network_s(kind, size_bytes, group, chip)


def _torus_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    link = _need(chip, "link_bytes_per_s") * chip.link_efficiency
    axes = group.axes or ((2, False),)
    hops_s = _HOP_S * sum(length / 2 if closes else length - 1 for length, closes in axes)
    if kind in ("all-to-all", "ragged-all-to-all"):
        length, closes = max(axes)
        return size_bytes * length / (8 if closes else 4) / link + hops_s + chip.collective_s
    bandwidth = link if group.is_pairwise else sum(link * (2 if ring else 1) for _, ring in axes)
    share = 1.0 if group.is_pairwise else (group.inside - 1) / group.inside
    return _PASSES.get(kind, 1.0) * size_bytes * share / bandwidth + hops_s + chip.collective_s


def _nvlink_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    fits = _fits()
    row = fits.get(chip.name, {}).get(kind)
    scale = 1.0
    if row is None:
        known = _LIKE.get(chip.name)
        if known is None:
            raise UnknownPeakError(
                f"No collectives of chip {chip.name!r} in network.toml. Add them with their source."
            )
        scale = _need(chip, "link_bytes_per_s") / _need(chip_table()[known], "link_bytes_per_s")
        row = fits[known].get(kind) or fits[known]["collective-permute"]
    if "knots" in row:
        return _interpolate(row["knots"], size_bytes) / scale
    ranks = math.log2(max(2, group.inside))
    start_s = (row["latency_s"] + row["root"] * math.sqrt(size_bytes)) * ranks ** row["growth"]
    return start_s + size_bytes / (row["bytes_per_s"] * scale * ranks ** -row["decay"])


# Chips without measured collectives, and whose they take at their own link's rate.
_LIKE = {
    "gpu-a100": "gpu-h100",
    "gpu-h100": "gpu-h100",
    "gpu-h200": "gpu-h100",
    "gpu-b200": "gpu-b200",
    "gpu-gb200": "gpu-gb200",
}


@functools.cache
def _fits() -> dict[str, dict[str, Any]]:
    text = resources.files("jaxbench").joinpath("network.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def _interpolate(knots: list[list[float]], size_bytes: float) -> float:
    """Piecewise linear in logarithms; beyond the ends at the rate of the last, flat before."""
    if size_bytes >= knots[-1][0]:
        return knots[-1][1] * size_bytes / knots[-1][0]
    if size_bytes <= knots[0][0]:
        return knots[0][1]
    after = next(index for index, (size, _) in enumerate(knots) if size >= size_bytes)
    (x0, y0), (x1, y1) = knots[after - 1], knots[after]
    share = math.log(size_bytes / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** share


def _network_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    """Across slices or hosts: each device sends its part of the buffer through its own share."""
    bandwidth = _need(chip, "network_bytes_per_s") * chip.network_efficiency
    if group.is_pairwise:
        return size_bytes / bandwidth + chip.network_latency_s
    crossing = (group.num_domains - 1) / group.num_domains / group.inside
    return _PASSES.get(
        kind, 1.0
    ) * size_bytes * crossing / bandwidth + chip.network_latency_s * math.log2(group.num_domains)


def host_copy_s(size_bytes: float, target: Target) -> float:
    """Returns the seconds of a copy between a device's memory and its host's."""
    chip = chip_table()[target.chip]
    return size_bytes / (chip.host_bytes_per_s or _HOST_LINK_BYTES_PER_S)


def _need(chip: Chip, name: str) -> float:
    value = getattr(chip, name)
    if not value:
        raise UnknownPeakError(
            f"No {name} for chip {chip.name!r}. Add it to chips.toml with its source."
        )
    return value
