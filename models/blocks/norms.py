"""Normalisations, chosen by name: statistics in float32, the result in the input's dtype."""

from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.models.blocks.weights import constant, spread

NormKind = Literal["batch", "group", "layer", "rms", "none"]

# A variable of its own kind: averages change in the step, and no gradient goes through them.
_Average = nnx.BatchStat


class BatchNorm(nnx.Module):
    """(x - mean) / deviation over the whole global batch and all pixels, per channel.

    Keeps running averages for inference as training steps do. Source: Ioffe and Szegedy, ICML 2015.
    """

    def __init__(
        self, dim: int, *, momentum: float = 0.9, epsilon: float = 1e-5, scale: float = 1.0
    ) -> None:
        self.momentum, self.epsilon = momentum, epsilon
        self.scale = constant((dim,), ("conv_out",), scale)
        self.bias = constant((dim,), ("conv_out",), 0.0)
        self.mean = _Average(jnp.zeros((dim,), jnp.float32))
        self.variance = _Average(jnp.ones((dim,), jnp.float32))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
        x32, dims = x.astype(jnp.float32), tuple(range(x.ndim - 1))
        mean = jnp.mean(x32, axis=dims)
        # One pass over the data, as XLA fuses it; rounding may leave a variance below zero.
        variance = jnp.maximum(jnp.mean(x32 * x32, axis=dims) - mean * mean, 0.0)
        keep = self.momentum
        self.mean[...] = keep * self.mean[...] + (1 - keep) * jax.lax.stop_gradient(mean)
        self.variance[...] = keep * self.variance[...] + (1 - keep) * jax.lax.stop_gradient(
            variance
        )
        factor = self.scale[...] * jax.lax.rsqrt(variance + self.epsilon)
        shift = self.bias[...] - mean * factor
        return (x32 * spread(factor, x32) + spread(shift, x32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Normalises each sample over its pixels and groups of channels. Source: Wu and He, ECCV 2018.

    The first dim is the batch; at least one group, of `dim / num_groups` channels.
    """

    def __init__(self, dim: int, *, num_groups: int = 32, epsilon: float = 1e-5) -> None:
        self.num_groups, self.epsilon = min(num_groups, dim), epsilon
        if dim % self.num_groups:
            raise ValueError(f"{dim} channels do not divide into {self.num_groups} groups.")
        self.scale = constant((dim,), ("conv_out",), 1.0)
        self.bias = constant((dim,), ("conv_out",), 0.0)

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "B *dims C"]) -> Float[Array, "B *dims C"]:
        grouped = x.astype(jnp.float32).reshape(
            x.shape[0], -1, self.num_groups, x.shape[-1] // self.num_groups
        )
        mean = jnp.mean(grouped, axis=(1, 3), keepdims=True)
        variance = jnp.mean(jnp.square(grouped - mean), axis=(1, 3), keepdims=True)
        y = ((grouped - mean) * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        return (y * spread(self.scale[...], y) + spread(self.bias[...], y)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation over the last dim. Source: Ba et al., 2016."""

    def __init__(self, dim: int, *, epsilon: float = 1e-6, bias: bool = True) -> None:
        self.epsilon = epsilon
        self.scale = constant((dim,), (None,), 1.0)
        self.bias = constant((dim,), (None,), 0.0) if bias else None

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
        x32 = x.astype(jnp.float32)
        mean = jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
        y = (x32 - mean) * jax.lax.rsqrt(variance + self.epsilon) * spread(self.scale[...], x32)
        return (y if self.bias is None else y + spread(self.bias[...], y)).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim. Source: Zhang and Sennrich, NeurIPS 2019."""

    def __init__(self, dim: int, *, epsilon: float = 1e-5) -> None:
        self.epsilon = epsilon
        self.scale = constant((dim,), (None,), 1.0)

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.epsilon)
        return (x32 * inverse * spread(self.scale[...], x32)).astype(x.dtype)


class Scale(nnx.Module):
    """x * scale + bias: what remains of a norm when it does not normalise."""

    def __init__(self, dim: int) -> None:
        self.scale = constant((dim,), ("conv_out",), 1.0)
        self.bias = constant((dim,), ("conv_out",), 0.0)

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims C"]:
        return x * spread(self.scale[...], x) + spread(self.bias[...], x)


def make_norm(kind: NormKind, dim: int) -> nnx.Module:
    """Makes the norm of that name over `dim` channels, with the defaults of its source."""
    makers = {
        "batch": BatchNorm,
        "group": GroupNorm,
        "layer": LayerNorm,
        "rms": RMSNorm,
        "none": Scale,
    }
    return makers[kind](dim)
