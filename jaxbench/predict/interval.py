"""By which factor a prediction may be wrong, from the published steps that it was held against."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Any, Literal

from jaxbench.cost import Cost
from jaxbench.target import chip_table

Kind = Literal["products", "convolutions", "kernels"]
# A chip's own row counts from so many cases on; with fewer it takes that of all like it.
ENOUGH = 3


def kind_of(cost: Cost) -> Kind:
    """Returns what most of a program's work is: library products, windows, or hand-made kernels."""
    if any(op.target == "tpu_custom_call" or "fmha" in op.target for op in cost.ops):
        return "kernels"
    windows = sum(op.window_flops for op in cost.ops)
    return "convolutions" if 2 * windows > cost.matmul_flops else "products"


def error_factor(chip: str, kind: Kind) -> tuple[float, str]:
    """Returns (factor, on what it rests) for predictions of such programs on a chip.

    Nine of ten published steps lie within the factor, of the chip and kind if there are enough,
    else of the same kind on all TPUs or GPUs, else of all on these: another kind on the same chip
    says nothing. A CPU has none published: twice is taken.
    """
    platform = chip_table()[chip].kind
    rows = _rows()
    for name, some in ((chip, kind), (platform, kind), (platform, "all")):
        row = rows.get(name, {}).get(some)
        if row is not None and (row["cases"] >= ENOUGH or (name, some) == (platform, "all")):
            what = "steps" if some == "all" else f"steps of {some}"
            return row[
                "factor"
            ], f"within {row['factor']:.2f} of {row['cases']} published {what}" + (
                "" if name == chip else f" on all {platform.upper()}s"
            )
    return 2.0, "no published steps on such a chip: a factor of two is taken"


@functools.cache
def _rows() -> Mapping[str, Mapping[str, Any]]:
    text = resources.files("jaxbench.predict").joinpath("interval.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)
