"""A layer with 2^38 parameters, 1 TiB: it exists as shapes only, and fits no device."""

from parts import candidate

CANDIDATES = (candidate("huge-paper-layer", features=2**19),)
