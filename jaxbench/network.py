"""Seconds of a collective, from where its devices stand and what their links carry.

A TPU slice is a torus whose axes close into rings only at some lengths; a collective uses the links
of every axis that its group spans, less what the groups beside it take of them. GPUs of one NVLink
domain take what NCCL was measured to take (network.toml). Across slices or hosts the data-centre
network is the narrowest place.

A device number is a position in the mesh's grid of devices, not a place. Where the places are not
given, the layout is the one that `jax.experimental.mesh_utils` gives to the mesh that the groups
imply, over stand-ins for the devices: no compiler is loaded. Slices or hosts are taken to be the
slowest part of the numbers, as `create_hybrid_device_mesh` makes them of a first mesh axis that
divides.
"""

from __future__ import annotations

import functools
import math
import tomllib
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

import numpy as np

from jaxbench.errors import JaxbenchError, UnknownPeakError
from jaxbench.hlo.groups import ReplicaGroups
from jaxbench.target import Chip, Target, chip_table

_HOP_S = 1e-6  # scaling book, "TPUs": about a microsecond a hop
_EXCHANGES = ("all-to-all", "ragged-all-to-all")
_PERMUTES = ("collective-permute", "send", "recv")
_KINDS = (
    *("all-gather", "reduce-scatter", "all-reduce", "collective-broadcast"),
    *_EXCHANGES,
    *_PERMUTES,
)
# Kinds that were not measured, and whose constants they take.
_MEASURED_AS = {
    "ragged-all-to-all": "all-to-all",
    "collective-broadcast": "all-gather",
    "send": "collective-permute",
    "recv": "collective-permute",
}
# Chips without measured collectives, and whose they take, with the rates of their own links.
_MEASURED_ON = {"gpu-a100": "gpu-h100", "gpu-h200": "gpu-h100"}
# What JAX calls the chips, by which mesh_utils knows their small topologies.
_DEVICE_KINDS = {
    "tpu-v2": "TPU v2",
    "tpu-v3": "TPU v3",
    "tpu-v4": "TPU v4",
    "tpu-v5e": "TPU v5 lite",
    "tpu-v5p": "TPU v5",
    "tpu-v6e": "TPU v6 lite",
    "tpu-7x": "TPU7x",
}


class GroupError(JaxbenchError, ValueError):
    """The replica groups of a program contradict each other or its target."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """The part of one torus axis that a group spans.

    Attributes:
      length: Chips of the group along it.
      closes: Whether they form a ring.
      sharers: Groups that use the same links, this one included.
    """

    length: int
    closes: bool
    sharers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One replica group, or the pairs of one permute, on one target.

    Attributes:
      size: Devices in it.
      num_domains: Slices (TPU) or hosts (GPU) that it spans.
      axes: The torus axes that it spans inside a slice; empty on GPUs and inside one chip.
      cores: Devices of one chip that are in it (TPU).
      pattern: Of a permute: `one-way`, `swap` or `ring`; else empty.
      load: Of a permute: messages over the busiest link of the torus; 0 where none leaves its chip.
      hops: Of a permute: links that the longest message passes.
    """

    size: int
    num_domains: int = 1
    axes: tuple[Axis, ...] = ()
    cores: int = 1
    pattern: str = ""
    load: int = 0
    hops: int = 0

    @property
    def inside(self) -> int:
        """Devices in one slice or host."""
        return max(1, self.size // self.num_domains)


@dataclass(frozen=True, kw_only=True, slots=True)
class Smooth:
    """t = (latency + root sqrt(bytes)) k^growth + rank_s ranks + bytes / (rate k^-decay).

    k is log2(ranks): trees grow with it, rings with the ranks themselves.
    """

    latency_s: float
    growth: float
    rank_s: float
    root: float
    bytes_per_s: float
    decay: float

    def seconds(self, size_bytes: float, *, ranks: int, speed: float = 1.0) -> float:
        """Seconds, where the links have `speed` times the rate of the measured ones."""
        scale = math.log2(max(2, ranks))
        start_s = (self.latency_s + self.root * math.sqrt(size_bytes)) * scale**self.growth
        wire_s = size_bytes / (self.bytes_per_s * speed * scale**-self.decay)
        return start_s + self.rank_s * ranks + wire_s


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """t = latency + root sqrt(bytes) + max over steps of min(bytes / rate, cap); none for the last.

    NCCL gives a permute more channels at some sizes, so its time stands still after each.
    """

    latency_s: float
    root: float
    bytes_per_s: tuple[float, ...]
    cap_s: tuple[float, ...]

    def seconds(self, size_bytes: float, *, ranks: int, speed: float = 1.0) -> float:
        """Seconds, where the links have `speed` times the rate of the measured ones."""
        del ranks
        caps = (*self.cap_s, math.inf)
        wire_s = max(
            min(size_bytes / rate, cap) for rate, cap in zip(self.bytes_per_s, caps, strict=True)
        )
        return self.latency_s + self.root * math.sqrt(size_bytes) + wire_s / speed


@functools.lru_cache(maxsize=4096)
def place_group(
    groups: ReplicaGroups | None,
    pairs: tuple[tuple[int, int], ...],
    target: Target,
    coords: tuple[tuple[int, ...], ...] | None = None,
) -> Group:
    """Places the first of equal groups, or all pairs of a permute, on the target.

    Args:
      groups: Device numbers in any notation; None if the op has none.
      pairs: Source and target of each message of a permute; else empty.
      coords: For each device number (slice, *torus axes, core); None takes the natural layout.

    Raises:
      GroupError: if a device stands twice, does not exist, or groups differ in size.
    """
    if not pairs and groups is None:
        return Group(size=1)
    if coords is not None and len(coords) != target.num_devices:
        raise GroupError(
            f"{len(coords)} coordinates for {target.name}, which has {target.num_devices} devices. "
            "Give one for each device of the mesh, in its order."
        )
    if pairs:
        return _place_pairs(np.array(pairs), target, coords)
    assert groups is not None
    numbers = _group_numbers(groups, target)[0]
    domains = _domains(target, coords)
    num_domains = len(np.unique(domains[numbers]))
    group = Group(size=len(numbers), num_domains=num_domains)
    if target.kind != "tpu":
        return group
    inside = numbers[domains[numbers] == domains[numbers[0]]]
    axes, cores = _torus_axes(_places(inside, target, coords), target)
    return Group(size=len(numbers), num_domains=num_domains, axes=axes, cores=cores)


def _group_numbers(groups: ReplicaGroups, target: Target) -> np.ndarray:
    """The device numbers, a row a group."""
    if groups.listed:
        sizes = sorted({len(group) for group in groups.listed})
        if len(sizes) > 1:
            raise GroupError(
                f"Replica groups of {sizes} devices in one collective: XLA makes them equal. "
                "The HLO is of a version that this jaxbench does not read."
            )
        numbers = np.array(groups.listed)
    else:
        ids = (
            np.array(groups.device_ids) if groups.device_ids else np.arange(math.prod(groups.dims))
        )
        numbers = ids.reshape(groups.dims).transpose(groups.perm).reshape(groups.num_groups, -1)
    _check_numbers(numbers.ravel(), target)
    if len(np.unique(numbers)) < numbers.size:
        raise GroupError(
            "Replica groups name a device twice in one collective: each is in one group. "
            "The HLO is damaged, or of a version that this jaxbench does not read."
        )
    return numbers


def _check_numbers(numbers: np.ndarray, target: Target) -> None:
    wrong = numbers[(numbers < 0) | (numbers >= target.num_devices)]
    if len(wrong):
        raise GroupError(
            f"Replica groups name device {wrong.max()}, but {target.name} has "
            f"{target.num_devices}. Give the target that the program was compiled for."
        )


def _domains(target: Target, coords: tuple[tuple[int, ...], ...] | None) -> np.ndarray:
    """The slice or host of each device number."""
    if coords is not None:
        return np.array([place[0] for place in coords])
    per_domain = target.topology[-1] if target.kind == "gpu" else _slice_devices(target)
    return np.arange(target.num_devices) // per_domain


def _slice_devices(target: Target) -> int:
    return target.num_devices // target.num_slices


def _places(
    numbers: np.ndarray, target: Target, coords: tuple[tuple[int, ...], ...] | None
) -> np.ndarray:
    """(*torus axes, core) of devices of one slice."""
    if coords is not None:
        return np.array([coords[number][1:] for number in numbers])
    if len(numbers) == _slice_devices(target):
        return _host_order(target)  # all of them, in whatever order: JAX need not be asked
    inside = numbers % _slice_devices(target)
    return _natural_places(target, _implied_mesh(inside, _slice_devices(target)))[inside]


def _implied_mesh(numbers: np.ndarray, num_devices: int) -> tuple[int, ...]:
    """The mesh of one slice whose axes a group spans whole: (0, 1, 8, 9) of 16 is of 2x4x2."""
    shape: list[int] = []
    starts, done = np.sort(numbers), 1
    while len(starts) > 1:
        stride = int(starts[1] - starts[0])
        steps = np.diff(starts) != stride
        count = int(steps.argmax()) + 1 if steps.any() else len(starts)
        blocks = starts[: len(starts) // count * count].reshape(-1, count)
        if len(starts) % count or stride % done or (np.diff(blocks, axis=1) != stride).any():
            return (num_devices,)  # spans no axes whole
        shape += [stride // done, count]
        done, starts = stride * count, blocks[:, 0]
    if num_devices % done:
        return (num_devices,)
    return tuple(size for size in reversed([*shape, num_devices // done]) if size > 1) or (1,)


@dataclass(frozen=True, slots=True)
class _StandIn:
    """What mesh_utils reads of a device."""

    coords: tuple[int, ...]
    core_on_chip: int
    device_kind: str
    id: int
    platform: ClassVar[str] = "tpu"
    process_index: ClassVar[int] = 0


@functools.lru_cache(maxsize=256)
def _host_order(target: Target) -> np.ndarray:
    """(*torus axes, core): host by host, the first torus axis fastest, then the cores."""
    chip = chip_table()[target.chip]
    dims = target.topology
    places = np.indices((*dims, chip.devices_per_chip)).reshape(len(dims) + 1, -1).T
    hosts = places[:, :-1] // np.array(chip.host_bounds)
    return places[np.lexsort((places[:, -1], *places[:, :-1].T, *hosts.T))]


@functools.lru_cache(maxsize=256)
def _natural_places(target: Target, mesh: tuple[int, ...]) -> np.ndarray:
    """(*torus axes, core) by device number, as make_mesh lays a mesh over one slice."""
    from jax.experimental import mesh_utils

    chip = chip_table()[target.chip]
    dims = target.topology
    places = _host_order(target)
    if math.prod(dims) > 1:
        kind = _DEVICE_KINDS[chip.name]
        padding = (0,) * (3 - len(dims))
        devices = [
            _StandIn((*place, *padding), core, kind, number)
            for number, (*place, core) in enumerate(places.tolist())
        ]
        grid = mesh_utils.create_device_mesh(mesh, devices, allow_split_physical_axes=True)
        places = places[[device.id for device in grid.flat]]
    return places


def _torus_axes(places: np.ndarray, target: Target) -> tuple[tuple[Axis, ...], int]:
    """The axes that devices of one slice span, and how many of one chip are among them."""
    chip = chip_table()[target.chip]
    num_chips = len(np.unique(places[:, :-1], axis=0))
    cores = len(places) // num_chips
    # The other devices of its chips are in other groups, which use the same links.
    beside = chip.devices_per_chip // cores
    spanned = [np.unique(places[:, dim]) for dim in range(len(target.topology))]
    if math.prod(len(line) for line in spanned) != num_chips:
        return (Axis(length=num_chips, closes=False, sharers=beside),), cores  # no box
    axes = []
    for line, length in zip(spanned, target.topology, strict=True):
        if len(line) == 1:
            continue
        gaps = np.diff(line)
        stride = int(gaps.min())
        closes = _closes(length, chip) and len(line) * stride == length and (gaps == stride).all()
        axes.append(Axis(length=len(line), closes=bool(closes), sharers=stride * beside))
    return tuple(axes), cores


def _closes(length: int, chip: Chip) -> bool:
    """Whether a whole axis is a ring: cubes of four on 3-D tori, a pod's full side on 2-D ones."""
    return length % 4 == 0 if chip.topology_dims == 3 else length == max(chip.max_topology)


def permute_pattern(pairs: tuple[tuple[int, int], ...]) -> str:
    """Which of the measured permutes pairs are: `one-way`, `swap` or `ring`."""
    sent = set(pairs)
    if not {source for source, _ in pairs} & {end for _, end in pairs}:
        return "one-way"
    return "swap" if all((end, source) in sent for source, end in pairs) else "ring"


def _place_pairs(
    pairs: np.ndarray, target: Target, coords: tuple[tuple[int, ...], ...] | None
) -> Group:
    _check_numbers(pairs.ravel(), target)
    for side, role in enumerate(("sends", "receives")):
        if len(np.unique(pairs[:, side])) < len(pairs):
            raise GroupError(
                f"A device {role} twice in one permute: each {role} at most once. "
                "The HLO is damaged, or of a version that this jaxbench does not read."
            )
    pattern = permute_pattern(tuple(map(tuple, pairs.tolist())))
    domains = _domains(target, coords)[pairs]
    crosses = bool((domains[:, 0] != domains[:, 1]).any())
    num_devices = len(np.unique(pairs))
    load, hops = 0, 0
    inside = pairs[domains[:, 0] == domains[:, 1]]
    if target.kind == "tpu" and len(inside):
        load, hops = _link_load(*_pair_places(inside, target, coords), target)
    return Group(
        size=num_devices,
        num_domains=2 if crosses else 1,
        pattern=pattern,
        load=load,
        hops=hops,
    )


def _pair_places(
    pairs: np.ndarray, target: Target, coords: tuple[tuple[int, ...], ...] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Places of the sources and of the ends; the mesh is taken from the first chain of pairs."""
    if coords is not None:
        places = np.array([place[1:] for place in coords])
        return places[pairs[:, 0]], places[pairs[:, 1]]
    num_devices = _slice_devices(target)
    chain, following = [int(pairs[0, 0])], dict(pairs.tolist())
    while (end := following.get(chain[-1])) is not None and end != chain[0]:
        chain.append(end)
    places = _natural_places(target, _implied_mesh(np.array(chain) % num_devices, num_devices))
    return places[pairs[:, 0] % num_devices], places[pairs[:, 1] % num_devices]


def _link_load(starts: np.ndarray, ends: np.ndarray, target: Target) -> tuple[int, int]:
    """Messages over the busiest link and links of the longest way, axis after axis."""
    chip = chip_table()[target.chip]
    at, goal = starts[:, :-1].copy(), ends[:, :-1]
    hops, load = np.zeros(len(at), int), 0
    for dim, length in enumerate(target.topology):
        way = goal[:, dim] - at[:, dim]
        if _closes(length, chip):
            way = (way + (length - 1) // 2) % length - (length - 1) // 2
        hops += np.abs(way)
        for sign in (1, -1):
            used = np.zeros(target.topology, int)
            here, left = at.copy(), np.maximum(way * sign, 0)
            while (moving := left > 0).any():
                np.add.at(used, tuple(here[moving].T), 1)
                here[moving, dim] = (here[moving, dim] + sign) % length
                left[moving] -= 1
            load = max(load, int(used.max()))
        at[:, dim] = goal[:, dim]
    return load, int(hops.max())


def collective_s(kind: str, size_bytes: float, group: Group, target: Target) -> float:
    """Returns the seconds of one collective.

    TPU, inside a slice: bytes * (chips - 1) / chips / bandwidth + hops, where every axis carries at
    once: two links where it closes, else one, each over the groups that share it. An all-reduce is
    a reduce-scatter and an all-gather. An all-to-all is bound by the bisection: (chips along an
    axis) / 8 of a chip's bytes cross each link of a ring. A permute is bound by its busiest link.
    Over the data-centre network each device moves its part through its own share of it.

    Args:
      kind: all-gather, reduce-scatter, all-reduce, all-to-all, ragged-all-to-all,
        collective-permute, collective-broadcast, send or recv.
      size_bytes: The largest buffer of one device: what an all-gather makes, what a reduce-scatter
        takes, what an all-reduce, all-to-all or permute moves.

    Raises:
      UnknownPeakError: if the chip has no figure for the network that the group crosses.
      ValueError: if no such collective is known.

    Source: scaling-book, "How to Scale Your Model", chapters TPUs and sharding; for GPUs
    network.toml.
    """
    if kind not in _KINDS:
        raise ValueError(f"Unknown collective {kind!r}. Known: {', '.join(_KINDS)}.")
    if group.size <= 1 or not size_bytes or target.kind == "cpu":
        # Devices faked on one machine copy through its memory, priced elsewhere.
        return 0.0
    chip = chip_table()[target.chip]
    inside, across = group.inside > 1, group.num_domains > 1
    if group.pattern:
        inside = not across or group.load > 0
    inside_s = across_s = 0.0
    if inside:
        inside_s = (_torus_s if target.kind == "tpu" else _nvlink_s)(kind, size_bytes, group, chip)
    if across:
        across_s = _network_s(kind, size_bytes, group, chip)
    # The pairs of a permute go their ways at once; other collectives go inside, then across.
    return max(inside_s, across_s) if group.pattern else inside_s + across_s


def _torus_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    if group.pattern:
        return _permute_s(size_bytes, group, chip)
    link = _need(chip, "link_bytes_per_s") * chip.link_efficiency
    half_ways = (axis.length / 2 if axis.closes else axis.length - 1 for axis in group.axes)
    hops_s = _HOP_S * sum(half_ways)
    # What goes between the devices of one chip goes beside the links: the longer of the two counts.
    chip_s = 0.0
    if group.cores > 1:
        share = (group.cores - 1) / group.cores
        chip_s = size_bytes * share / _need(chip, "core_link_bytes_per_s")
    if kind in _EXCHANGES:
        crossing = (axis.length * axis.sharers / (8 if axis.closes else 4) for axis in group.axes)
        wire_s = group.cores * size_bytes * max(crossing, default=0.0) / link
        return max(wire_s, chip_s) + hops_s + chip.collective_s
    wire_s = 0.0
    if group.axes:
        num_chips = math.prod(axis.length for axis in group.axes)
        share = 1.0 if kind == "collective-broadcast" else (num_chips - 1) / num_chips
        links = sum((2 if axis.closes else 1) / axis.sharers for axis in group.axes)
        wire_s = size_bytes * share / (links * link)
    if kind != "all-reduce":
        return max(wire_s, chip_s) + hops_s + chip.collective_s
    phase_s = max(wire_s / chip.all_reduce_efficiency, chip_s) + hops_s
    return 2 * phase_s + chip.collective_s


def _permute_s(size_bytes: float, group: Group, chip: Chip) -> float:
    if not group.load:  # between devices of one chip
        return size_bytes / _need(chip, "core_link_bytes_per_s") + chip.collective_s
    link = _need(chip, "link_bytes_per_s") * chip.link_efficiency
    return size_bytes * group.load / link + _HOP_S * group.hops + chip.collective_s


def _nvlink_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    measured_on = _MEASURED_ON.get(chip.name, chip.name)
    models = _models().get(measured_on)
    if models is None:
        raise UnknownPeakError(
            f"No collectives of chip {chip.name!r} in network.toml. Add them with their source."
        )
    speed = _need(chip, "link_bytes_per_s") / _need(chip_table()[measured_on], "link_bytes_per_s")
    name = _MEASURED_AS.get(kind, kind)
    if name == "collective-permute":
        # GB200 was measured with rings and swaps only, which took the same.
        model = models.get(f"{name}.{group.pattern}") or models[f"{name}.swap"]
    else:
        model = models[name]
    return model.seconds(size_bytes, ranks=group.inside, speed=speed)


@functools.cache
def _models() -> dict[str, dict[str, Smooth | Steps]]:
    """The rows of network.toml by chip, then by kind and, of a permute, its pattern."""
    text = resources.files("jaxbench").joinpath("network.toml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Smooth | Steps]] = {}
    for chip, kinds in tomllib.loads(text).items():
        found[chip] = {}
        for kind, row in kinds.items():
            if kind != "collective-permute":
                found[chip][kind] = Smooth(**row)
                continue
            for pattern, steps in row.items():
                found[chip][f"{kind}.{pattern}"] = _read_steps(steps)
    return found


def _read_steps(row: dict[str, Any]) -> Steps:
    return Steps(
        latency_s=row["latency_s"],
        root=row["root"],
        bytes_per_s=tuple(row["bytes_per_s"]),
        cap_s=tuple(row["cap_s"]),
    )


def _network_s(kind: str, size_bytes: float, group: Group, chip: Chip) -> float:
    """Across slices or hosts: each device sends its part of the buffer through its own share."""
    bandwidth = _need(chip, "network_bytes_per_s") * chip.network_efficiency
    if group.pattern:
        return size_bytes / bandwidth + chip.network_latency_s
    crossing = (group.num_domains - 1) / group.num_domains
    if kind not in _EXCHANGES:
        crossing /= group.inside  # the rest of its domain sends the rest
    passes = 2 if kind == "all-reduce" else 1
    latency_s = chip.network_latency_s * math.log2(group.num_domains)
    return passes * (size_bytes * crossing / bandwidth) + latency_s


def host_copy_s(size_bytes: float, target: Target) -> float:
    """Returns the seconds of a copy between a device's memory and its host's.

    Raises:
      UnknownPeakError: if the chip has no figure for its host link.
    """
    if target.kind == "cpu":
        return 0.0
    return size_bytes / _need(chip_table()[target.chip], "host_bytes_per_s")


def _need(chip: Chip, name: str) -> float:
    value = getattr(chip, name)
    if not value:
        raise UnknownPeakError(
            f"No {name} for chip {chip.name!r}. Add it to chips.toml with its source."
        )
    return value
