"""A candidate file that is made of a module beside it."""

from parts import candidate

CANDIDATES = (candidate("neighbour-cpu-layer"),)
