"""Optimised HLO as a graph of immutable values: it is read here, and priced elsewhere.

`read_module` turns the bytes of a compiled module into a `Module`; `trip_count` says how often a
loop runs. Needs no JAX: bytes in, values out.
"""

from jaxbench.hlo.loops import trip_count
from jaxbench.hlo.module import Computation, Module, Op, read_module
from jaxbench.hlo.schema import HloReadError
from jaxbench.hlo.shape import Shape

__all__ = ["Computation", "HloReadError", "Module", "Op", "Shape", "read_module", "trip_count"]
