"""How many multiplications a convolution truly does: taps on padding and in holes are none."""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from jaxbench.hlo.module import Op, WindowDim
from jaxbench.hlo.schema import HloReadError
from jaxbench.hlo.shape import Shape


@lru_cache(maxsize=65536)
def count_taps(dim: WindowDim, base: int, out: int) -> int:
    """Counts the pairs (output position o, tap k) of one dimension that meet the base.

    o * stride + k * window_dilation - padding_low = p, valid if 0 <= p <= (base - 1) *
    base_dilation and p is a multiple of base_dilation. For each tap the valid o form an arithmetic
    progression, counted in closed form.
    """
    last = (base - 1) * dim.base_dilation
    return sum(
        _count_positions(dim, tap * dim.window_dilation - dim.padding_low, last, out)
        for tap in range(dim.size)
    )


def _count_positions(dim: WindowDim, shift: int, last: int, out: int) -> int:
    """Counts o in [0, out) with 0 <= o * stride + shift <= last, on the grid of base_dilation."""
    low = max(0, -(shift // dim.stride))
    high = min(out - 1, (last - shift) // dim.stride)
    common = gcd(dim.stride, dim.base_dilation)
    if high < low or shift % common:
        return 0
    period = dim.base_dilation // common
    if period == 1:
        return high - low + 1
    first = (-shift // common * pow(dim.stride // common, -1, period)) % period
    return (high - first) // period - (low - 1 - first) // period


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvolutionSizes:
    """A convolution as the mathematics sees it, whatever the roles of its operands.

    FLOPs = 2 * batch * taps * in_features * out_features, where `in_features` is what one output
    feature sums over (features per group) and `taps` is the product over the spatial dimensions of
    `count_taps`.
    """

    batch: int
    positions: int
    taps: int
    in_features: int
    out_features: int
    groups: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.taps * self.in_features * self.out_features

    def padded_flops(self, mxu: int) -> int:
        """FLOPs with the rows filled up to 8 sublanes and features to the `mxu` x `mxu` array.

        Groups narrower than the array lie on its diagonal, as many as fit: a depthwise convolution
        then does `mxu` times its FLOPs. With `mxu=1` nothing is padded.
        """
        if mxu == 1:
            return self.flops
        per_group = self.out_features // self.groups
        packed = min(self.groups, max(1, mxu // max(self.in_features, per_group)))
        blocks = -(-self.groups // packed)
        depth = round_up(self.in_features * packed, mxu)
        width = round_up(per_group * packed, mxu)
        rows = self.batch * self.positions
        return 2 * self.batch * self.taps * blocks * depth * width * round_up(rows, 8) // rows


def round_up(value: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def convolution_sizes(op: Op) -> ConvolutionSizes:
    """Sizes of a `convolution`, or of a custom call that carries its window and dimensions."""
    target = op.custom_call_target
    result = op.shape.elements[0] if op.shape.is_tuple else op.shape
    first, second = op.operands[0].shape, op.operands[1].shape
    if target.endswith("convBackwardInput"):
        return _sizes(op, result, second, first)
    if target.endswith("convBackwardFilter"):
        return _sizes(op, first, result, second)
    return _sizes(op, first, second, result)


def _sizes(op: Op, base: Shape, kernel: Shape, out: Shape) -> ConvolutionSizes:
    dims = op.convolution
    if dims is None:
        raise HloReadError(
            f"The convolution {op.name!r} has no dimension numbers; every convolution that XLA "
            "serializes has them. Serialize the module again."
        )
    taps = prod(
        count_taps(window, base.dims[base_dim], out.dims[out_dim])
        for window, base_dim, out_dim in zip(
            op.window, dims.input_spatial, dims.output_spatial, strict=True
        )
    )
    return ConvolutionSizes(
        batch=out.dims[dims.output_batch],
        positions=prod(out.dims[dim] for dim in dims.output_spatial),
        taps=taps,
        in_features=kernel.dims[dims.kernel_input_feature],
        out_features=out.dims[dims.output_feature],
        groups=op.feature_group_count * op.batch_group_count,
    )
