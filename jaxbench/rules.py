"""What one execution of one HLO op computes: one registered rule an opcode.

What has no rule is said to be missing, never taken as nothing.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil, log2, prod

from jaxbench.hlo.convolution import ConvolutionSizes, convolution_sizes, count_taps, round_up
from jaxbench.hlo.module import Computation, Op
from jaxbench.hlo.shape import Shape

Flops = tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one execution of one op computes.

    `products` are those of `flops` in matrix products; `padded` is `flops` with matrix tiles filled
    up; `sizes` are (batch, rows, columns, depth) of the largest product, `in_windows` the part of
    `products` that convolutions with windows do.
    """

    flops: Flops = ()
    products: Flops = ()
    padded: int = 0
    sizes: tuple[int, ...] = ()
    in_windows: int = 0

    @staticmethod
    def of(dtype: str, flops: int, *, padded: int | None = None) -> "Work":
        return Work(
            flops=((dtype, flops),) if flops else (),
            padded=flops if padded is None else padded,
        )

    @staticmethod
    def product(
        dtype: str, flops: int, sizes: tuple[int, ...], *, padded: int | None = None
    ) -> "Work":
        """A matrix product of `sizes` (batch, rows, columns, depth)."""
        counted = ((dtype, flops),) if flops else ()
        return Work(
            flops=counted,
            products=counted,
            padded=flops if padded is None else padded,
            sizes=sizes if flops else (),
        )

    def __add__(self, other: "Work") -> "Work":
        return Work(
            flops=merge_counts(self.flops, other.flops),
            products=merge_counts(self.products, other.products),
            padded=self.padded + other.padded,
            sizes=max(self.sizes, other.sizes, key=_volume),
            in_windows=self.in_windows + other.in_windows,
        )


def _volume(sizes: tuple[int, ...]) -> int:
    return prod(sizes) if sizes else 0


def merge_counts(
    first: tuple[tuple[str, int], ...], second: tuple[tuple[str, int], ...]
) -> tuple[tuple[str, int], ...]:
    """Adds up two tuples of (key, number)."""
    if not first or not second:
        return first or second
    total = Counter(dict(first))
    total.update(dict(second))
    return tuple(sorted(total.items()))


Rule = Callable[[Op, int], Work]
RULES: dict[str, Rule] = {}
NO_WORK = Work()


def rule(*opcodes: str) -> Callable[[Rule], Rule]:
    """Registers what these opcodes compute: `f(op, mxu)` is the `Work` of one execution."""

    def register(function: Rule) -> Rule:
        for opcode in opcodes:
            assert opcode not in RULES, f"{opcode} has two rules"
            RULES[opcode] = function
        return function

    return register


# Ops that neither compute nor move, and the later halves of asynchronous pairs, which count at
# their start.
_FREE_OPCODES = """
add-dependency after-all bitcast constant domain get-tuple-element opt-barrier
optimization-barrier parameter partition-id replica-id tuple all-gather-done all-reduce-done
async-done async-update collective-permute-done copy-done recv-done send-done
"""
FREE = frozenset(_FREE_OPCODES.split())

# One operation for each element of the result.
_ELEMENTWISE = """
abs add and atan2 cbrt ceil clamp cosine count-leading-zeros divide erf exponential
exponential-minus-one floor log log-plus-one logistic maximum minimum multiply negate not or
popcnt power remainder round-nearest-afz round-nearest-even rsqrt shift-left
shift-right-arithmetic shift-right-logical sign sine sqrt stochastic-convert subtract tan
tanh xor map acos acosh asin asinh atanh cosh sinh
"""


@rule(*_ELEMENTWISE.split())
def _elementwise(op: Op, mxu: int) -> Work:
    """One operation for each element; a transcendental function counts one too."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size) if op.shape.dtype != "pred" else NO_WORK


# Moves, comparisons, random bits and collectives.
_MOVES = """
bitcast-convert broadcast compare complex concatenate convert copy copy-start
dynamic-reshape dynamic-slice dynamic-update-slice gather imag infeed iota is-finite outfeed
pad real recv reduce-precision reshape reverse rng rng-bit-generator
rng-get-and-update-state select send set-dimension-size get-dimension-size slice sort topk
transpose all-gather all-gather-start all-reduce all-reduce-start all-to-all
collective-broadcast collective-permute collective-permute-start ragged-all-to-all
reduce-scatter
"""


@rule(*_MOVES.split())
def _moves(op: Op, mxu: int) -> Work:
    """No FLOPs; the additions of a reduction across devices count none either."""
    del op, mxu
    return NO_WORK


@rule("dot")
def _dot(op: Op, mxu: int) -> Work:
    """2 * batch * M * N * K; padded: M to 8, N and K to the matrix unit."""
    assert op.dot is not None
    left, right = op.operands[0].shape, op.operands[1].shape
    depth = prod(left.dims[dim] for dim in op.dot.lhs_contracting)
    batch = prod(left.dims[dim] for dim in op.dot.lhs_batch)
    if not op.shape.size or not depth:
        return NO_WORK
    rows, columns = left.size // (depth * batch), right.size // (depth * batch)
    flops = 2 * batch * rows * columns * depth
    padded = flops
    if mxu > 1:
        padded = 2 * batch * round_up(rows, 8) * round_up(columns, mxu) * round_up(depth, mxu)
    sizes = (batch, rows, columns, depth)
    return Work.product(_matmul_dtype(op), flops, sizes, padded=padded)


def _matmul_dtype(op: Op) -> str:
    """The wider of the two operands' types: the rate at which the product runs."""
    return max((operand.shape for operand in op.operands[:2]), key=_item_bytes).dtype


def _item_bytes(shape: Shape) -> float:
    return shape.bytes / max(shape.size, 1)


@rule("convolution")
def _convolution(op: Op, mxu: int) -> Work:
    """2 * batch * taps * features; XLA:TPU writes ordinary matmuls so, too."""
    sizes = convolution_sizes(op)
    padded = sizes.padded_flops(mxu) if sizes.flops else 0
    work = Work.product(_matmul_dtype(op), sizes.flops, _as_product(sizes), padded=padded)
    has_window = prod(dim.size for dim in op.window) > 1 and sizes.taps > sizes.positions
    return replace(work, in_windows=sizes.flops if has_window else 0)


def _as_product(sizes: ConvolutionSizes) -> tuple[int, int, int, int]:
    """(batch, rows, columns, depth) of the product that a convolution is, groups as its batch."""
    rows = sizes.batch * sizes.positions
    depth = max(1, round(sizes.taps * sizes.in_features / sizes.positions))
    return sizes.groups, rows, sizes.out_features // sizes.groups, depth


@rule("reduce")
def _reduce(op: Op, mxu: int) -> Work:
    """One operation for each element that goes in."""
    del mxu
    source = op.operands[0].shape
    return Work.of(source.dtype, source.size)


@rule("reduce-window")
def _reduce_window(op: Op, mxu: int) -> Work:
    """One operation for each element of the window that lies on the base."""
    del mxu
    base, out = op.operands[0].shape, op.shape.leaves[0]
    dims = zip(op.window, base.dims, out.dims, strict=True)
    return Work.of(base.dtype, prod(count_taps(window, size, end) for window, size, end in dims))


@rule("select-and-scatter")
def _select_and_scatter(op: Op, mxu: int) -> Work:
    """One addition for each element of the source; the comparisons that select are not counted."""
    del mxu
    return Work.of(op.shape.dtype, op.operands[1].shape.size)


@rule("scatter")
def _scatter(op: Op, mxu: int) -> Work:
    """One operation for each element of the updates."""
    del mxu
    updates = op.operands[-1].shape
    return Work.of(updates.dtype, updates.size)


@rule("fft")
def _fft(op: Op, mxu: int) -> Work:
    """5 N log2 N a transform. Source: Cooley and Tukey, as FFTW counts it."""
    del mxu
    points = max(op.operands[0].shape.size, op.shape.size)
    length = prod(op.shape.dims[-1:]) or 1
    return Work.of(op.shape.dtype, ceil(5 * points * log2(max(length, 2))))


@rule("cholesky")
def _cholesky(op: Op, mxu: int) -> Work:
    """n^3 / 3 a matrix. Source: Golub and Van Loan, Matrix Computations, 4.2."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size * op.shape.dims[-1] // 3)


@rule("triangular-solve")
def _triangular_solve(op: Op, mxu: int) -> Work:
    """n^2 for each right-hand side. Source: Golub and Van Loan, Matrix Computations, 3.1."""
    del mxu
    return Work.of(op.shape.dtype, op.shape.size * op.operands[0].shape.dims[-1])


def _library_matmul(op: Op, mxu: int) -> Work:
    """A matmul that a library does (cuBLAS, oneDNN): 2 * output * depth.

    The depth comes from the sizes: for A [b, m, k] and B [b, k, n], |A| |B| / |C| = b k^2; b is the
    product of the leading dimensions of C.
    """
    del mxu
    out = op.shape.elements[0] if op.shape.is_tuple else op.shape
    left, right = op.operands[0].shape, op.operands[1].shape
    batch = prod(out.dims[:-2])
    depth = round((left.size * right.size / max(out.size * batch, 1)) ** 0.5)
    sizes = (batch, out.size // max(batch * out.dims[-1], 1), out.dims[-1], depth)
    return Work.product(_matmul_dtype(op), 2 * out.size * depth, sizes)


def _author_estimate(op: Op) -> Work | None:
    """What the author of a Pallas kernel says that it computes, if he says so."""
    estimate = op.config.get("custom_call_config", {}).get("cost_estimate")
    if not estimate:
        return None
    flops = int(estimate.get("flops", 0)) + int(estimate.get("transcendentals", 0))
    largest = max((*op.operands, op), key=lambda o: (o.shape.dtype[0] in "bf", o.shape.bytes))
    dtype = largest.shape.leaves[0].dtype
    return Work.of(dtype, flops)


# JAX's Pallas kernels of flash attention, by name: products of scores' size that each does. Source:
# jax/experimental/pallas/ops/tpu/flash_attention.py and splash_attention at 0.12.
_FLASH_PRODUCTS = {
    "flash_attention": 2,  # scores, then values
    "flash_mha_bwd_dkv": 4,  # scores, dV, dP, dK
    "flash_mha_bwd_dq": 3,  # scores, dP, dQ
    "splash_mha_fwd": 2,
    "splash_mha_dkv": 5,  # scores, dV, dP, dK and, fused, dQ
    "splash_mha_dq": 3,
}
_FLASH_BLOCK = 512


def _flash_work(op: Op, mxu: int) -> Work | None:
    """Flash attention: so many products [T, H] x [H, S] a head, of which causal masks skip a half.

    The mask is inside the kernel, which is not read: it is taken to be causal, as it is wherever
    jaxbench's own candidates call one. Blocks on the diagonal are whole: (n + 1) / 2n of n blocks.
    """
    name = op.op_name.rpartition("/")[2] + op.name
    products = next((n for known, n in _FLASH_PRODUCTS.items() if known in name), None)
    arrays = [x.shape for x in op.operands if len(x.shape.dims) == 4 and x.shape.dtype != "s32"]
    if products is None or len(arrays) < 2:
        return None
    query, key = arrays[:2]
    heads = query.dims[0] * query.dims[1]
    rows, columns, depth = query.dims[2], key.dims[2], query.dims[3]
    blocks = max(1, columns // _FLASH_BLOCK)
    kept = (blocks + 1) / (2 * blocks) if rows == columns else 1.0
    flops = round(2 * products * heads * rows * columns * depth * kept)
    padded = flops * round_up(depth, mxu) // depth
    return Work.product(query.dtype, flops, (heads, rows, columns, depth), padded=padded)


def _cudnn_attention(op: Op) -> Work:
    """cuDNN's attention: 2 products of scores' size a head forward, 5 backward; half if causal."""
    query, key = op.operands[0].shape, op.operands[1].shape
    batch, rows, heads, depth = query.dims
    columns = key.dims[1]
    products = 5 if "Backward" in op.custom_call_target else 2
    options = op.config.get("cudnn_fmha_backend_config", {})
    kept = 0.5 if "CAUSAL" in str(options.get("mask_type", "")) else 1.0
    flops = round(2 * products * batch * heads * rows * columns * depth * kept)
    return Work.product(query.dtype, flops, (batch * heads, rows, columns, depth))


# Custom calls that only give a buffer another name or shape; they neither compute nor move.
FREE_TARGETS = frozenset((
    "AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "SliceId", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape",
    "AssumeGatherIndicesInBound",
))  # fmt: skip
# Custom calls that rearrange or select: they move their operands and results once, without FLOPs.
_MOVING_TARGETS = frozenset((
    "GatherScatterIndicesBitpacked", "TopK", "__gpu$TopK", "PartialReduce", "X64Combine",
    "X64SplitLow", "X64SplitHigh", "MoveToHost", "MoveToDevice", "SliceToDynamic",
    "PadToStatic", "ZeroCrop", "__cub$DeviceRadixSort",
))  # fmt: skip
_LIBRARY_MATMULS = ("__cublas$", "__onednn$matmul", "__triton_gemm")


def work_of(op: Op, mxu: int) -> tuple[Work, tuple[tuple[str, int], ...]]:
    """What one execution of `op` computes, fused ops included, and what in it has no rule."""
    if op.opcode == "fusion":
        return _fused_work(op.called[0], mxu)
    if op.opcode == "custom-call":
        work = _custom_call_work(op, mxu)
        return (NO_WORK, ((op.custom_call_target, 1),)) if work is None else (work, ())
    found = RULES.get(op.opcode)
    if found is None:
        return NO_WORK, () if op.opcode in FREE else ((op.opcode, 1),)
    return found(op, mxu), ()


def _fused_work(computation: Computation, mxu: int) -> tuple[Work, tuple[tuple[str, int], ...]]:
    flops: Counter[str] = Counter()
    unpriced: Counter[str] = Counter()
    products: Counter[str] = Counter()
    sizes: tuple[int, ...] = ()
    padded = in_windows = 0
    for op in computation.ops:
        work, missing = work_of(op, mxu)
        sizes = max(sizes, work.sizes, key=_volume)
        in_windows += work.in_windows
        products.update(dict(work.products))
        padded += work.padded
        for dtype, amount in work.flops:
            flops[dtype] += amount
        for label, count in missing:
            unpriced[label] += count
    work = Work(
        flops=tuple(sorted(flops.items())),
        products=tuple(sorted(products.items())),
        padded=padded,
        sizes=sizes,
        in_windows=in_windows,
    )
    return work, tuple(sorted(unpriced.items()))


def _custom_call_work(op: Op, mxu: int) -> Work | None:
    target = op.custom_call_target
    if target in FREE_TARGETS or target in _MOVING_TARGETS:
        return NO_WORK
    if target.startswith("__cudnn$conv") and op.convolution is not None:
        return _convolution(op, mxu)
    if target.startswith("__cudnn$fmha"):
        return _cudnn_attention(op)
    if target.startswith(_LIBRARY_MATMULS):
        return _library_matmul(op, mxu)
    return _author_estimate(op) or _flash_work(op, mxu)
