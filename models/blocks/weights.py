"""Parameters with logical axes, and the linear layer made of them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

Axes = tuple[str | None, ...]


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, *, fan_in: int) -> nnx.Param:
    """Draws a float32 parameter with deviation 1 / sqrt(fan_in); `axes` names its dims."""
    init = nnx.initializers.normal(fan_in**-0.5)
    return nnx.Param(nnx.with_partitioning(init, axes)(rngs.params(), shape, jnp.float32))


def constant(shape: tuple[int, ...], axes: Axes, value: float) -> nnx.Param:
    """Makes a float32 parameter that is `value` everywhere."""
    init = nnx.with_partitioning(nnx.initializers.constant(value), axes)
    return nnx.Param(init(jax.random.key(0), shape, jnp.float32))


class Linear(nnx.Module):
    """x W, and + b where `bias`; over the last dim of any number of dims.

    Args:
      axes: Logical axes of the input and the output dim, such as ("embed", "mlp").
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        axes: Axes = (None, None),
        *,
        bias: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.kernel = weight(rngs, (num_in, num_out), axes, fan_in=num_in)
        self.bias = constant((num_out,), axes[1:], 0.0) if bias else None

    @jax.named_scope("linear")
    def __call__(self, x: Float[Array, "*dims C"]) -> Float[Array, "*dims F"]:
        y = jnp.einsum("...C,CF->...F", x, self.kernel[...].astype(x.dtype))
        if self.bias is None:
            return y
        return y + spread(self.bias[...], x)


def spread(vector: Float[Array, " C"], like: Float[Array, "*dims _"]) -> Float[Array, "*ones C"]:
    """Gives a vector over the last dim the rank and the dtype of `like`."""
    return vector.astype(like.dtype).reshape((1,) * (like.ndim - 1) + vector.shape)
