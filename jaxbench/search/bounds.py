"""What no compiler can beat: a network's analytic lower bound on one target."""

from __future__ import annotations

from collections.abc import Mapping

from jaxbench.predict.roofline import device_peaks
from jaxbench.search.resolved import Resolved
from jaxbench.target import Target

_TRAIN_FLOPS = 2.0  # times the forward pass; 3 but for blocks whose inputs need no gradient


def lower_bound_s(
    network: Resolved, target: Target, *, cpu_peaks: Mapping[str, float] | None
) -> float:
    """Returns seconds of one step below which the chip's own figures do not let it come.

    Twice the forward pass's product FLOPs over the chip's highest peak in any floating dtype. Bytes
    are left out: small networks live in caches.
    """
    products = device_peaks(target, cpu_peaks).product_flops
    highest = max(peak for dtype, peak in products.items() if "float" in dtype)
    flops = _TRAIN_FLOPS * network.quantities["forward_flops"] * network.samples
    return flops / target.num_devices / highest
