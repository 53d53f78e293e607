"""Collectives against arithmetic done by hand and figures that others measured."""

import pytest

from jaxbench.errors import UnknownPeakError
from jaxbench.hlo.groups import ReplicaGroups
from jaxbench.network import Group, GroupError, collective_s, host_copy_s, place_group
from jaxbench.target import chip_table, parse_target

RING = Group(size=16, axes=((16, True),))
LINE = Group(size=16, axes=((16, False),))


def iota(num_groups, group_size, dims=None, perm=None):
    dims = dims or (num_groups * group_size,)
    return ReplicaGroups(
        num_groups=num_groups,
        group_size=group_size,
        dims=dims,
        perm=perm or tuple(range(len(dims))),
    )


def listed(*groups):
    return ReplicaGroups(num_groups=len(groups), group_size=len(groups[0]), listed=groups)


def test_ring_all_reduce_moves_its_bytes_twice_both_ways_round():
    target, chip = parse_target("tpu-v5e:16x16"), chip_table()["tpu-v5e"]
    size = 1e9
    wire_s = 2 * size * 15 / 16 / (2 * chip.link_bytes_per_s * chip.link_efficiency)
    hops_s = 8 * 1e-6
    expected = wire_s + hops_s + chip.collective_s
    assert collective_s("all-reduce", size, RING, target) == pytest.approx(expected)


def test_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    target = parse_target("tpu-v5p:4x4x4")
    cube = Group(size=64, axes=((4, True),) * 3)
    gather, reduce, both = (
        collective_s(kind, 1e9, cube, target)
        for kind in ("all-gather", "reduce-scatter", "all-reduce")
    )
    assert gather == reduce
    assert both == pytest.approx(2 * gather, rel=0.01)


def test_closed_axes_are_faster_than_open_ones_and_two_axes_than_one():
    target = parse_target("tpu-v5e:16x16")
    ring, line = (collective_s("all-gather", 1e9, group, target) for group in (RING, LINE))
    assert line == pytest.approx(2 * ring, rel=0.01)
    square = collective_s("all-gather", 1e9, Group(size=256, axes=((16, True),) * 2), target)
    assert square < 0.6 * ring


def test_groups_in_old_and_new_notation_are_one():
    target = parse_target("tpu-v5p:2x2x2")
    old = listed((0, 1, 2, 3), (4, 5, 6, 7))
    assert place_group(old, (), target) == place_group(iota(2, 4), (), target)
    assert place_group(iota(1, 8), (), target).axes == ((2, False),) * 3


def test_group_spans_the_axes_of_its_size():
    target = parse_target("tpu-v4:4x4x8")
    assert place_group(iota(1, 128), (), target).axes == ((4, True), (4, True), (8, True))
    assert place_group(iota(16, 8), (), target).axes == ((8, True),)
    assert place_group(iota(64, 2), (), target).axes == ((2, False),)  # part of an axis


def test_two_devices_a_chip_share_its_links():
    target = parse_target("tpu-7x:2x2x1")
    assert place_group(iota(1, 8), (), target).axes == ((2, False), (2, False))


def test_groups_across_slices_use_the_data_centre_network():
    target, chip = parse_target("tpu-v6e:16x16*2"), chip_table()["tpu-v6e"]
    pairs = place_group(iota(256, 2, (2, 256), (1, 0)), (), target)
    assert (pairs.num_domains, pairs.inside) == (2, 1)
    seconds = collective_s("all-reduce", 606e6, pairs, target)
    # A psum of 606 MB over two slices ran at 4.11 GB/s (AI-Hypercomputer microbenchmarks).
    assert seconds == pytest.approx(606e6 / 4.11e9, rel=0.03)
    assert place_group(iota(2, 256), (), target).num_domains == 1
    assert chip.network_bytes_per_s < chip.link_bytes_per_s


# Published all-gathers of float32 over 2x2x1: (bytes, GB/s).
GATHERS_7X = [(1.05e6, 71.77), (4.19e6, 129.19), (16.78e6, 161.9), (67.11e6, 174.77)]


@pytest.mark.parametrize(("size", "rate"), GATHERS_7X)
def test_gather_on_7x_takes_what_was_published(size, rate):
    target = parse_target("tpu-7x:2x2x1")
    seconds = collective_s("all-gather", size, place_group(iota(1, 8), (), target), target)
    assert seconds == pytest.approx(size / (rate * 1e9), rel=0.08)


# Measured NCCL collectives: (target, kind, largest buffer in bytes, ranks, GB/s).
NCCL = [
    ("gpu-h100:8", "all-gather", 268e6, 8, 368),
    ("gpu-h100:8", "all-reduce", 1.07e9, 8, 227),
    ("gpu-h100:8", "all-to-all", 268e6, 8, 354),
    ("gpu-b200:8", "all-reduce", 134e6, 8, 294),
    ("gpu-b200:8", "reduce-scatter", 537e6 * 4, 4, 805),
    ("gpu-gb200:64", "all-gather", 8.59e9, 64, 685),
]


@pytest.mark.parametrize(("target", "kind", "size", "ranks", "rate"), NCCL)
def test_collective_on_gpus_takes_what_was_measured(target, kind, size, ranks, rate):
    target = parse_target(target)
    group = place_group(iota(target.num_devices // ranks, ranks), (), target)
    # The goal of the fit's median is 12 %.
    assert collective_s(kind, size, group, target) == pytest.approx(size / (rate * 1e9), rel=0.2)


def test_group_across_hosts_of_gpus_uses_their_adapters():
    target = parse_target("gpu-h100:4x8")
    inside, across = (place_group(groups, (), target) for groups in (iota(4, 8), iota(1, 32)))
    assert (inside.num_domains, across.num_domains) == (1, 4)
    assert collective_s("all-gather", 1e9, across, target) > collective_s(
        "all-gather", 1e9, inside, target
    )


def test_permute_between_neighbours_uses_one_link():
    target, chip = parse_target("tpu-v5e:4x4"), chip_table()["tpu-v5e"]
    group = place_group(None, ((0, 1), (1, 0)), target)
    seconds = collective_s("collective-permute", 1e9, group, target)
    assert seconds == pytest.approx(1e9 / (chip.link_bytes_per_s * chip.link_efficiency), rel=0.01)


def test_one_device_and_fake_cpu_devices_send_nothing():
    assert collective_s("all-reduce", 1e9, Group(size=1), parse_target("tpu-v5e")) == 0.0
    assert collective_s("all-reduce", 1e9, Group(size=8), parse_target("cpu:8")) == 0.0


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        (listed((0, 1), (1, 2)), "twice"),
        (listed((0, 1, 2), (3, 4)), r"groups of \[2, 3\]"),
        (listed((0, 16), (1, 2)), "device 16, but tpu-v5e:4x4 has 16"),
    ],
)
def test_contradictory_groups_are_refused(groups, match):
    with pytest.raises(GroupError, match=match):
        place_group(groups, (), parse_target("tpu-v5e:4x4"))


def test_collective_across_a_network_without_a_figure_is_refused():
    target = parse_target("tpu-v3:4x4*2")
    with pytest.raises(UnknownPeakError, match=r"network_bytes_per_s.*tpu-v3"):
        collective_s("all-reduce", 1e9, place_group(iota(1, 64), (), target), target)


def test_host_link_is_slower_than_device_memory():
    target, chip = parse_target("tpu-v6e"), chip_table()["tpu-v6e"]
    assert host_copy_s(1e9, target) > 1e9 / chip.hbm_bytes_per_s
