"""Shapes with their layout: element type, dimensions, tiles, memory space, and their bytes."""

from dataclasses import dataclass
from math import prod

from jaxbench.hlo.schema import HloReadError, decode

# xla_data.proto, PrimitiveType: number -> (name, bits of one element in memory).
_ELEMENTS = {
    1: ("pred", 8), 2: ("s8", 8), 3: ("s16", 16), 4: ("s32", 32), 5: ("s64", 64),
    6: ("u8", 8), 7: ("u16", 16), 8: ("u32", 32), 9: ("u64", 64),
    10: ("f16", 16), 11: ("f32", 32), 12: ("f64", 64), 13: ("tuple", 0), 14: ("opaque", 0),
    15: ("c64", 64), 16: ("bf16", 16), 17: ("token", 0), 18: ("c128", 128),
    19: ("f8e5m2", 8), 20: ("f8e4m3fn", 8), 21: ("s4", 8), 22: ("u4", 8),
    23: ("f8e4m3b11fnuz", 8), 24: ("f8e5m2fnuz", 8), 25: ("f8e4m3fnuz", 8),
    26: ("s2", 8), 27: ("u2", 8), 28: ("f8e4m3", 8), 29: ("f8e3m4", 8),
    30: ("s1", 8), 31: ("u1", 8), 32: ("f4e2m1fn", 8), 33: ("f8e8m0fnu", 8), 34: ("buffer", 0),
}  # fmt: skip
_COMBINE = -(2**63)  # in a tile: this dimension is merged with the next minor one


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One array, or a tuple of shapes.

    `bytes` is the dense size. `padded_bytes` is the size with each tile filled up, as it lies in
    memory: with tiles T(8,128)(2,1) the two most minor physical dimensions are rounded up to 8 and
    128. Both add up over a tuple.

    Source: https://openxla.org/xla/tiled_layout
    """

    dtype: str
    dims: tuple[int, ...] = ()
    minor_to_major: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    memory_space: int = 0
    elements: tuple["Shape", ...] = ()
    size: int
    bytes: int
    padded_bytes: int

    @property
    def is_tuple(self) -> bool:
        return self.dtype == "tuple"

    @property
    def leaves(self) -> tuple["Shape", ...]:
        """The arrays in it, in order, tuples opened."""
        if not self.is_tuple:
            return (self,)
        return tuple(leaf for element in self.elements for leaf in element.leaves)


def tiled_size(physical: tuple[int, ...], tiles: tuple[tuple[int, ...], ...]) -> int:
    """Elements of an array with its tiles filled up; `physical` dimensions are major to minor."""
    dims = list(physical)
    for tile in tiles:
        dims = _apply_tile(dims, tile)
    return prod(dims)


def _apply_tile(dims: list[int], tile: tuple[int, ...]) -> list[int]:
    """The dimensions after one tiling: outer ones, then those of the tile."""
    dims = [1] * (len(tile) - len(dims)) + dims
    kept, minor = dims[: len(dims) - len(tile)], dims[len(dims) - len(tile) :]
    outer: list[int] = []
    inner: list[int] = []
    merged = 1
    for size, step in zip(minor, tile, strict=True):
        merged *= size
        if step == _COMBINE:
            continue
        outer.append(-(-merged // step))
        inner.append(step)
        merged = 1
    return kept + outer + inner


def shape_from_proto(proto: object) -> Shape:
    """Builds a `Shape` from a decoded message."""
    number: int = proto.element_type  # pyright: ignore[reportAttributeAccessIssue]
    if number not in _ELEMENTS:
        raise HloReadError(
            f"Unknown element type {number} in a shape (known: 1 to {max(_ELEMENTS)}). "
            "Add its row to jaxbench/hlo/shape.py from xla_data.proto."
        )
    dtype, bits = _ELEMENTS[number]
    if dtype == "tuple":
        return _tuple_shape(proto)
    return _array_shape(proto, dtype, bits)


def _tuple_shape(proto: object) -> Shape:
    protos = proto.tuple_shapes  # pyright: ignore[reportAttributeAccessIssue]
    elements = tuple(shape_from_proto(element) for element in protos)
    return Shape(
        dtype="tuple",
        elements=elements,
        size=0,
        bytes=sum(element.bytes for element in elements),
        padded_bytes=sum(element.padded_bytes for element in elements),
    )


def _array_shape(proto: object, dtype: str, bits: int) -> Shape:
    dims = tuple(proto.dimensions)  # pyright: ignore[reportAttributeAccessIssue]
    layout = proto.layout  # pyright: ignore[reportAttributeAccessIssue]
    order = tuple(layout.minor_to_major)
    tiles = tuple(tuple(tile.dimensions) for tile in layout.tiles)
    bits = layout.element_size_in_bits or bits
    size = prod(dims)
    physical = tuple(dims[dim] for dim in reversed(order)) if order else dims
    padded = tiled_size(physical, tiles) if tiles and size else size
    return Shape(
        dtype=dtype,
        dims=dims,
        minor_to_major=order,
        tiles=tiles,
        memory_space=layout.memory_space,
        size=size,
        bytes=-(-size * bits // 8),
        padded_bytes=-(-padded * bits // 8),
    )


class ShapeReader:
    """Decodes each distinct serialized shape once; a module repeats few shapes many times."""

    def __init__(self) -> None:
        self._known: dict[bytes, Shape] = {}

    def read(self, data: bytes) -> Shape:
        shape = self._known.get(data)
        if shape is None:
            shape = self._known[data] = shape_from_proto(decode("Shape", data))
        return shape
