"""Networks at other widths: the negative control, which must be found worse, and other scales."""

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
    config, halved = _scaled(described, 0.5)
    if not halved:
        raise DataError(f"{described['name']} has no width to halve for the negative control{_SO}")
    return {
        **described,
        "name": f"{described['name']}-half",
        "config": config,
        "validity": "T2",
        "replaces": f"half of {', '.join(halved)}",
        "base": described["name"],
    }


def scale_width(described: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """Returns the description of a network with every width of its config times `scale`.

    Raises:
      DataError: if its config has none, or it is what it was.
    """
    if scale == 1:
        return dict(described)
    config, scaled = _scaled(described, scale)
    if not scaled:
        raise DataError(f"{described['name']} has no width to take times {scale:g}{_SO}")
    return {
        **described,
        "name": f"{described['name']}-x{scale:g}",
        "config": config,
        "base": f"{described['base']}-x{scale:g}",
        "of": described.get("of", described["name"]),
    }


_SO = (
    ": none of its fields is called stem, channels, width, context, embed_dim or mlp_dim, with a "
    "value that can be changed so."
)


def _scaled(described: Mapping[str, Any], scale: float) -> tuple[dict[str, Any], list[str]]:
    """Returns a config with other widths, and the fields that changed."""
    config, changed = dict(described["config"]), []
    for name, value in config.items():
        if _WIDTH.search(name) and not _NOT.search(name):
            config[name] = _times(value, scale)
            if config[name] != value:
                changed.append(name)
    return config, changed


def _times(value: Any, scale: float) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_times(item, scale) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return max(1, int(value * scale)) if value else value
    return value
