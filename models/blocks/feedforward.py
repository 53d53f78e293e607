"""The feed-forward half of a transformer layer, plain or gated, with any activation."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.models.blocks.weights import Linear

Activation = Literal["relu", "relu2", "silu", "gelu", "gelu_tanh"]

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "relu": nnx.relu,
    "relu2": lambda x: jnp.square(nnx.relu(x)),
    "silu": nnx.silu,
    "gelu": lambda x: nnx.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nnx.gelu(x, approximate=True),
}


class FeedForward(nnx.Module):
    """act(x W1) W2, or (act(x W1) * x W3) W2 where gated. Source: Shazeer, "GLU Variants", 2020."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        activation: Activation = "gelu_tanh",
        gated: bool = False,
        bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        self.activation = activation
        self.up = Linear(dim, hidden, ("embed", "mlp"), bias=bias, rngs=rngs)
        self.gate = Linear(dim, hidden, ("embed", "mlp"), bias=bias, rngs=rngs) if gated else None
        self.down = Linear(hidden, dim, ("mlp", "embed"), bias=bias, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "*dims D"]) -> Float[Array, "*dims D"]:
        act = ACTIVATIONS[self.activation]
        if self.gate is None:
            return self.down(act(self.up(x)))
        return self.down(act(self.gate(x)) * self.up(x))
