"""Convolutions over any number of spatial dims, channels last.

A `2` marks the edges that a layer puts out.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.models.blocks.norms import NormKind, make_norm
from jaxbench.models.blocks.weights import constant, spread

_SPATIAL = "DHW"


class Conv(nnx.Module):
    """Dense, grouped or depthwise convolution; the kernel's length is the number of spatial dims.

    Pads so that the output's edge is ceil(edge / stride), unless `padding` says otherwise.

    Args:
      kernel: Edges of the kernel, such as (3, 3).
      groups: Channels are split into so many parts that do not mix; `num_in` is depthwise.
      sharded: Give the output channels their logical axis. XLA's partitioner aborts on grouped
        convolutions whose groups the devices do not divide, so grouped ones are never sharded.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        kernel: tuple[int, ...] = (1, 1),
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        padding: str | tuple[tuple[int, int], ...] = "SAME",
        bias: bool = False,
        sharded: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        if num_in % groups or num_out % groups:
            raise ValueError(f"{num_in} to {num_out} channels do not divide into {groups} groups.")
        self.stride, self.groups, self.dilation, self.padding = stride, groups, dilation, padding
        out = "conv_out" if sharded and groups in (1, num_in) else None
        depth = num_in // groups
        axes = (*(None,) * len(kernel), "conv_in" if groups == 1 else None, out)
        init = nnx.with_partitioning(nnx.initializers.he_normal(), axes)
        self.kernel = nnx.Param(init(rngs.params(), (*kernel, depth, num_out), jnp.float32))
        self.bias = constant((num_out,), (out,), 0.0) if bias else None

    @jax.named_scope("conv")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims2 F"]:
        kernel = self.kernel[...].astype(x.dtype)
        num_spatial = kernel.ndim - 2
        spatial = _SPATIAL[-num_spatial:]
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            window_strides=(self.stride,) * num_spatial,
            padding=self.padding,
            rhs_dilation=(self.dilation,) * num_spatial,
            dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
            feature_group_count=self.groups,
        )
        return y if self.bias is None else y + spread(self.bias[...], y)


class ConvNorm(nnx.Module):
    """Convolution without bias, norm, and the activation if there is one."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        norm: NormKind = "batch",
        activation: Callable[[Any], Any] | None = nnx.relu,
        rngs: nnx.Rngs,
        **convolution: Any,
    ) -> None:
        self.activation = activation
        self.conv = Conv(num_in, num_out, rngs=rngs, **convolution)
        self.norm: Any = make_norm(norm, num_out)

    @jax.named_scope("conv_norm")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims2 F"]:
        y = self.norm(self.conv(x))
        return y if self.activation is None else self.activation(y)


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    """Takes the largest value of 3x3 pixels at stride 2, edges padded by one, as in ResNet's stem.

    The start must be a number of the host: JAX differentiates only what it knows to be a maximum.
    """
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def upsample(x: Float[Array, "B H W C"], factor: int = 2) -> Float[Array, "B H2 W2 C"]:
    """Repeats every pixel `factor` times along both edges."""
    return jnp.repeat(jnp.repeat(x, factor, axis=1), factor, axis=2)
