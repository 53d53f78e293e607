"""Residual pyramids over two or three spatial dims, with dense or factorised convolutions.

Letters: `B` batch, `C` channels in, `F` channels out. A `2` marks the edges that a layer puts out.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import constrain
from jaxbench.models.blocks.convolution import ConvNorm
from jaxbench.models.blocks.norms import NormKind
from jaxbench.models.blocks.weights import Linear

ConvKind = Literal["conv3d", "factorised", "depthwise", "plane"]

# The parts of one convolution of the volume. A 1x3x3 would be cheaper in memory traffic than a
# 3x3x1, but levels are few and the ground is what has to be seen widely.
KERNELS = {
    "conv3d": ((3, 3, 3),),
    "factorised": ((3, 3, 1), (1, 1, 3)),
    "depthwise": ((3, 3, 3), (1, 1, 1)),
    "plane": ((3, 3),),
}


class Step(nnx.Module):
    """One convolution of the volume in the parts of its kind, each with its norm."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        kind: ConvKind,
        norm: NormKind,
        activate: bool,
        rngs: nnx.Rngs,
    ) -> None:
        kernels, parts = KERNELS[kind], []
        for index, kernel in enumerate(kernels):
            inside = index + 1 < len(kernels)
            width = num_in if inside and kind == "depthwise" else num_out
            parts.append(
                ConvNorm(
                    num_in,
                    width,
                    kernel=kernel,
                    groups=num_in if inside and kind == "depthwise" else 1,
                    norm=norm,
                    activation=nnx.relu if inside or activate else None,
                    rngs=rngs,
                )
            )
            num_in = width
        self.parts = nnx.List(parts)

    @jax.named_scope("step")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims F"]:
        for part in self.parts:
            x = part(x)
        return x


class ResidualBlock(nnx.Module):
    """Two steps beside a shortcut, which is linear where the width changes."""

    def __init__(
        self, num_in: int, num_out: int, *, kind: ConvKind, norm: NormKind, rngs: nnx.Rngs
    ) -> None:
        self.first = Step(num_in, num_out, kind=kind, norm=norm, activate=True, rngs=rngs)
        self.second = Step(num_out, num_out, kind=kind, norm=norm, activate=False, rngs=rngs)
        axes = ("conv_in", "conv_out")
        self.shortcut = None if num_in == num_out else Linear(num_in, num_out, axes, rngs=rngs)

    @jax.named_scope("residual")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims F"]:
        y = self.second(self.first(x))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Pyramid(nnx.Module):
    """Residual stages, each at half the resolution of the last, summed back up to the first's."""

    def __init__(
        self,
        num_in: int,
        channels: tuple[int, ...],
        depths: tuple[int, ...],
        *,
        kind: ConvKind,
        norm: NormKind,
        remat: bool,
        rngs: nnx.Rngs,
    ) -> None:
        self.remat = remat
        stages = []
        for num_out, depth in zip(channels, depths, strict=True):
            widths = [(num_in, num_out), *[(num_out, num_out)] * (depth - 1)]
            blocks = [ResidualBlock(i, o, kind=kind, norm=norm, rngs=rngs) for i, o in widths]
            stages.append(nnx.List(blocks))
            num_in = num_out
        self.stages = nnx.List(stages)
        pairs = list(zip(channels[1:], channels[:-1], strict=True))
        axes = ("conv_in", "conv_out")
        self.down = nnx.List([Linear(i, o, axes, rngs=rngs) for i, o in pairs])
        self.merge = nnx.List(
            [Step(o, o, kind=kind, norm=norm, activate=True, rngs=rngs) for _, o in pairs]
        )

    @jax.named_scope("pyramid")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims F"]:
        maps = []
        for blocks in self.stages:
            x = halve(x) if maps else x
            for block in blocks:
                x = run_block(block, x, remat=self.remat)
            maps.append(constrain(x, ("batch", *(None,) * (x.ndim - 1))))
        x = maps.pop()
        for down, merge, skip in zip(
            reversed(self.down), reversed(self.merge), reversed(maps), strict=True
        ):
            x = run_block(merge, skip + enlarge(down(x)), remat=self.remat)
        return x


def run_block(
    block: Any, x: Float[Array, "B *dims C"], *, remat: bool
) -> Float[Array, "B *dims2 F"]:
    """Applies a block, which keeps only its input for the backward pass where `remat`."""
    return nnx.remat(lambda block, x: block(x))(block, x) if remat else block(x)


def halve(x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims2 C"]:
    """Takes the mean of two neighbours along every spatial dim."""
    window = (2,) * (x.ndim - 2)
    return nnx.avg_pool(x, window, strides=window)


def enlarge(x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims2 C"]:
    """Repeats every voxel twice along every spatial dim."""
    for axis in range(1, x.ndim - 1):
        x = jnp.repeat(x, 2, axis=axis)
    return x
