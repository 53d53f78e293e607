"""Seconds that collectives take: bytes on the wire over the bandwidth of the links that they cross.

A first model: rings, latency ignored. A TPU sends both ways round its ring; a group that fits into
  one slice (TPU) or one host (GPU) uses the chip links, a larger one the network between them.
"""

from __future__ import annotations

from jaxbench.errors import UnknownPeakError
from jaxbench.target import Target, chip_table


def collective_s(wire_bytes: float, group_size: int, target: Target) -> float:
    """Returns seconds for one device to send `wire_bytes` within groups of `group_size`.

    Raises:
      UnknownPeakError: if the chip has no figure for the network that the group crosses.
    """
    chip = chip_table()[target.chip]
    if group_size <= 1 or not wire_bytes:
        return 0.0
    if target.kind == "cpu":
        # Devices faked on one machine: a collective is a copy through its memory, priced as one
        # elsewhere.
        return 0.0
    inside = (
        target.topology[-1] if target.kind == "gpu" else target.num_devices // target.num_slices
    )
    if group_size > inside:
        bandwidth, what = chip.network_bytes_per_s, "network_bytes_per_s"
    else:
        ways = 2 if target.kind == "tpu" and group_size > 2 else 1
        bandwidth, what = (chip.link_bytes_per_s or 0) * ways, "link_bytes_per_s"
    if not bandwidth:
        raise UnknownPeakError(
            f"No {what} for chip {chip.name!r}. Add it to chips.toml with its source."
        )
    return wire_bytes / bandwidth
