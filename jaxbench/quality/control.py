"""The negative control: the base at half its width, which must be found worse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxbench.errors import DataError

# Fields that are widths, by the names that the families give them.
_WIDTH = re.compile(r"(^|_)(stem|channels|widths?|context|neck|embed_dim|mlp_dim|latent_dim)$")
_NOT = re.compile(r"^num_")


def halve_width(described: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the description of a network with every width of its config halved.

    Raises:
      DataError: if its config has none that can be halved.
    """
    config, halved = dict(described["config"]), []
    for name, value in config.items():
        if _WIDTH.search(name) and not _NOT.search(name):
            half = _half(value)
            if half != value:
                config[name] = half
                halved.append(name)
    if not halved:
        raise DataError(
            f"{described['name']} has no width to halve for the negative control: none of its "
            "fields is called stem, channels, width, context, embed_dim or mlp_dim."
        )
    return {
        **described,
        "name": f"{described['name']}-half",
        "config": config,
        "validity": "T2",
        "replaces": f"half of {', '.join(halved)}",
        "base": described["name"],
    }


def _half(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_half(item) for item in value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 2:
        return value // 2
    return value
