"""Video modules: a queue of maps to one map of now, by recurrence, convolution or attention.

Letters: `B` batch, `T` frames from old to new, `X` `Y` the map's edges, `D` channels.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import constrain
from jaxbench.models.blocks.attention import Attention
from jaxbench.models.blocks.convolution import Conv, ConvNorm
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.weights import Linear

Queue = Float[Array, "B T X Y D"]
Map = Float[Array, "B X Y D"]


class ConvGru(nnx.Module):
    """h = (1 - z) h + z tanh(W x + U (r h)), gates z and r of x and h; all are 3x3 convolutions.

    What the frames add is convolved for all at once; only the state goes frame by frame.

    Source: Ballas et al., "Delving Deeper into Convolutional Networks", ICLR 2016.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.frame = Conv(dim, 3 * dim, kernel=(3, 3), bias=True, rngs=rngs)
        self.gates = Conv(dim, 2 * dim, kernel=(3, 3), rngs=rngs)
        self.candidate = Conv(dim, dim, kernel=(3, 3), rngs=rngs)

    @jax.named_scope("gru")
    def __call__(self, x: Queue) -> Map:
        frames = self.frame(x.reshape(-1, *x.shape[2:]))
        frames = jnp.moveaxis(frames.reshape(*x.shape[:-1], -1), 1, 0)

        def step(state: Map, frame: Float[Array, "B X Y _"]) -> tuple[Map, None]:
            update, reset, fresh = jnp.split(frame, 3, axis=-1)
            more_update, more_reset = jnp.split(self.gates(state), 2, axis=-1)
            update, reset = nnx.sigmoid(update + more_update), nnx.sigmoid(reset + more_reset)
            fresh = jnp.tanh(fresh + self.candidate(reset * state))
            state = (1 - update) * state + update * fresh
            return constrain(state, ("batch", None, None, None)), None

        state, _ = jax.lax.scan(step, jnp.zeros_like(x[:, 0]), frames)
        return state


class VideoConvolution(nnx.Module):
    """Two 3x3x3 convolutions over time and space beside a shortcut, read at the newest frame."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        kernel = (3, 3, 3)
        self.first = ConvNorm(dim, dim, kernel=kernel, norm="group", rngs=rngs)
        self.second = ConvNorm(dim, dim, kernel=kernel, norm="group", activation=None, rngs=rngs)

    @jax.named_scope("video_convolution")
    def __call__(self, x: Queue) -> Map:
        return nnx.relu(x + self.second(self.first(x)))[:, -1]


class VideoAttention(nnx.Module):
    """A transformer layer over the frames of each cell, causal, read at the newest frame."""

    def __init__(self, dim: int, *, num_heads: int, mlp_dim: int, rngs: nnx.Rngs) -> None:
        self.attention_norm = LayerNorm(dim)
        self.attention = Attention(dim, num_heads, causal=True, theta=100.0, rngs=rngs)
        self.mlp_norm = LayerNorm(dim)
        self.mlp = FeedForward(dim, mlp_dim, rngs=rngs)

    @jax.named_scope("video_attention")
    def __call__(self, x: Queue) -> Map:
        B, T, X, Y, D = x.shape
        tokens = jnp.moveaxis(x, 1, 3).reshape(B * X * Y, T, D)
        tokens = constrain(tokens, ("batch", None, None))
        newest = (tokens + self.attention(self.attention_norm(tokens)))[:, -1]
        newest = newest + self.mlp(self.mlp_norm(newest))
        return newest.reshape(B, X, Y, D)


class LinearRecurrence(nnx.Module):
    """h = a h + (1 - a) v, gate a and value v by 3x3 convolutions of the frame alone.

    As nothing depends on the state but the state, it is summed as a tree over the frames, in
    float32.

    Source: Martin and Cundy, "Parallelizing Linear Recurrent Neural Nets", ICLR 2018.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs) -> None:
        self.frame = Conv(dim, 2 * dim, kernel=(3, 3), bias=True, rngs=rngs)
        self.out = Linear(dim, dim, ("conv_in", "conv_out"), rngs=rngs)

    @jax.named_scope("linear_recurrence")
    def __call__(self, x: Queue) -> Map:
        frames = self.frame(x.reshape(-1, *x.shape[2:])).reshape(*x.shape[:-1], -1)
        gate, value = jnp.split(frames.astype(jnp.float32), 2, axis=-1)
        keep = nnx.sigmoid(gate)

        def join(old: tuple[Queue, Queue], new: tuple[Queue, Queue]) -> tuple[Queue, Queue]:
            return old[0] * new[0], old[1] * new[0] + new[1]

        _, state = jax.lax.associative_scan(join, (keep, (1 - keep) * value), axis=1)
        return x[:, -1] + self.out(state[:, -1].astype(x.dtype))
