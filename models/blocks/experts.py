"""Routed experts: how do tokens get to their experts, and back?

- `ragged`: tokens sorted by expert, one product whose groups are as long as they come;
- `dense`: every expert sees every token, weighted; the same function, `E / K` times the products;
- `onehot`: products with one-hot dispatch and combine, each expert with so many slots and no more:
  what overflows is dropped. `onehot_full` has a slot for every token, so nothing is dropped;
- `choice`: experts choose tokens instead of tokens experts; every slot is filled.

The router's product has the dtype of all others, its softmax is in float32. The one-hot ones work
on groups of at most `GROUP` tokens of one sequence, as GShard does.

Letters: `B` batch (of groups), `T` tokens, `S` tokens of a group, `D` model, `F` feed-forward of an
expert, `E` experts, `C` slots of an expert, `K` experts of a token.

Sources: Lepikhin et al., "GShard", ICLR 2021; Fedus et al., "Switch Transformers", JMLR 2022; Gale
et al., "MegaBlocks", MLSys 2023; Zhou et al., "Mixture-of-Experts with Expert Choice Routing",
NeurIPS 2022.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxbench.candidate import constrain
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.weights import Linear, weight

CAPACITY = 1.25  # slots of an expert over those it needs when all get the same. Source: Switch
GROUP = 1024

Dispatch = Literal["ragged", "dense", "onehot", "onehot_full", "choice"]
Balance = Literal["batch", "sequence"]

Weights = tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]]
Gates = Float[Array, "B T K"]
Chosen = Int[Array, "B T K"]


def route(probs: Float[Array, "B T E"], top_k: int, *, normalise: bool) -> tuple[Gates, Chosen]:
    """Gives each token its `top_k` most probable experts, and their probabilities as gates."""
    gates, chosen = jax.lax.top_k(probs, top_k)
    if normalise:
        gates = gates / jnp.sum(gates, axis=-1, keepdims=True)
    return gates, chosen


def balance_loss(probs: Float[Array, "B T E"], chosen: Chosen, over: Balance) -> Float[Array, ""]:
    """E sum_e f_e P_e: f the share of tokens that chose expert e, P its mean probability.

    Over the batch f sums to `top_k`, over sequences to one, as the published programs have it.
    Sources: Fedus et al., 2022, eq. 4-6; DeepSeek-V2, eq. 23-25.
    """
    E = probs.shape[-1]
    hits = jnp.sum(jax.nn.one_hot(chosen, E, dtype=jnp.float32), axis=2)
    if over == "batch":
        return E * jnp.sum(jnp.mean(hits, axis=(0, 1)) * jnp.mean(probs, axis=(0, 1)))
    shares = jnp.mean(hits, axis=1) / chosen.shape[-1]
    return E * jnp.mean(jnp.sum(shares * jnp.mean(probs, axis=1), axis=-1))


@jax.custom_vjp
def add_loss(x: Float[Array, "B T D"], extra: Float[Array, ""]) -> Float[Array, "B T D"]:
    """Gives x as it is; the gradient is as if `extra` had been added to the loss of the step."""
    return x


add_loss.defvjp(lambda x, _: (x, None), lambda _, grad: (grad, jnp.ones((), jnp.float32)))


def slots_by_token(
    gates: Float[Array, "B S K"], chosen: Int[Array, "B S K"], num_experts: int, num_slots: int
) -> tuple[Float[Array, "B S E C"], Float[Array, "B S E C"]]:
    """Gives tokens the slots of their experts, in order, first choices of all before second ones.

    Returns:
      One where a token has that slot, and its gate there. What comes after the last slot has none.
    """
    B, S, K = chosen.shape
    picked = jax.nn.one_hot(chosen, num_experts, dtype=jnp.int32)
    queue = jnp.swapaxes(picked, 1, 2).reshape(B, K * S, num_experts)
    place = (jnp.cumsum(queue, axis=1) - 1).reshape(B, K, S, num_experts)
    place = jnp.sum(jnp.swapaxes(place, 1, 2) * picked, axis=-1)
    slot = jax.nn.one_hot(place, num_slots, dtype=gates.dtype)
    pairs = picked.astype(gates.dtype)[..., None] * slot[..., None, :]
    return jnp.sum(pairs, axis=2), jnp.sum(gates[..., None, None] * pairs, axis=2)


def slots_by_expert(
    probs: Float[Array, "B S E"], num_slots: int
) -> tuple[Float[Array, "B S E C"], Float[Array, "B S E C"]]:
    """Gives each expert its `num_slots` most probable tokens. Returns as `slots_by_token`."""
    gates, tokens = jax.lax.top_k(jnp.swapaxes(probs, 1, 2), num_slots)
    dispatch = jax.nn.one_hot(tokens, probs.shape[1], dtype=probs.dtype, axis=1)
    return dispatch, dispatch * gates[:, None]


def through_slots(
    x: Float[Array, "B S D"],
    dispatch: Float[Array, "B S E C"],
    combine: Float[Array, "B S E C"],
    experts: Weights,
) -> Float[Array, "B S D"]:
    """Carries tokens into slots, through the experts and back by products with one-hot tables."""
    gate, up, down = experts
    slots = jnp.einsum("BSEC,BSD->BECD", dispatch.astype(x.dtype), x)
    slots = constrain(slots, ("batch", None, None, None))
    hidden = jnp.einsum("BECD,EDF->BECF", slots, gate)
    hidden = nnx.silu(hidden) * jnp.einsum("BECD,EDF->BECF", slots, up)
    slots = jnp.einsum("BECF,EFD->BECD", hidden, down)
    return jnp.einsum("BSEC,BECD->BSD", combine.astype(x.dtype), slots)


def through_all(
    x: Float[Array, "B T D"], gates: Gates, chosen: Chosen, experts: Weights
) -> Float[Array, "B T D"]:
    """Sends every token through every expert; the gates of those not chosen are zero."""
    gate, up, down = experts
    picked = jax.nn.one_hot(chosen, gate.shape[0], dtype=gates.dtype)
    shares = jnp.sum(picked * gates[..., None], axis=2).astype(x.dtype)
    hidden = jnp.einsum("BTD,EDF->BTEF", x, gate)
    hidden = nnx.silu(hidden) * jnp.einsum("BTD,EDF->BTEF", x, up)
    return jnp.einsum("BTEF,EFD->BTD", hidden * shares[..., None], down)


def through_sorted(
    x: Float[Array, "B T D"], gates: Gates, chosen: Chosen, experts: Weights
) -> Float[Array, "B T D"]:
    """Sorts (token, expert) pairs by expert; each expert's pairs are one group of a ragged product.

    Each device sorts its own tokens: which of them stand beside each other changes nothing.
    """
    axes = dict(get_logical_axis_rules() or ()).get("batch")
    if not axes:
        return _through_sorted(x, gates, chosen, *experts)
    own, whole = PartitionSpec(axes), PartitionSpec()
    sharded = jax.shard_map(
        _through_sorted,
        in_specs=(own, own, own, whole, whole, whole),
        out_specs=own,
        axis_names={axes} if isinstance(axes, str) else set(axes),
    )
    return sharded(x, gates, chosen, *experts)


def _through_sorted(
    x: Array, gates: Array, chosen: Array, gate: Array, up: Array, down: Array
) -> Array:
    K = chosen.shape[-1]
    tokens, experts = x.reshape(-1, x.shape[-1]), chosen.reshape(-1)
    order = jnp.argsort(experts, stable=True)
    sizes = jnp.sum(jax.nn.one_hot(experts, gate.shape[0], dtype=jnp.int32), axis=0)
    rows = tokens[order // K]
    hidden = nnx.silu(jax.lax.ragged_dot(rows, gate, sizes))
    hidden = hidden * jax.lax.ragged_dot(rows, up, sizes)
    rows = jax.lax.ragged_dot(hidden, down, sizes)[jnp.argsort(order)]
    return jnp.sum(rows.reshape(*chosen.shape, -1) * gates.astype(x.dtype)[..., None], axis=2)


def through_onehot(
    x: Float[Array, "B T D"], gates: Gates, chosen: Chosen, experts: Weights, *, full: bool
) -> Float[Array, "B T D"]:
    """Gives every expert in every group `CAPACITY` times its fair share of slots, or all."""
    E, K = experts[0].shape[0], chosen.shape[-1]
    tokens, gates, chosen = grouped(x), grouped(gates), grouped(chosen)
    S = tokens.shape[1]
    num_slots = S if full else min(S, math.ceil(CAPACITY * K * S / E))
    dispatch, combine = slots_by_token(gates, chosen, E, num_slots)
    return through_slots(tokens, dispatch, combine, experts).reshape(x.shape)


def through_choice(
    x: Float[Array, "B T D"], probs: Float[Array, "B T E"], experts: Weights, *, top_k: int
) -> Float[Array, "B T D"]:
    """Lets every expert choose its tokens in every group, `top_k` a token on average."""
    tokens, probs = grouped(x), grouped(probs)
    num_slots = top_k * tokens.shape[1] // experts[0].shape[0]
    dispatch, combine = slots_by_expert(probs, num_slots)
    return through_slots(tokens, dispatch, combine, experts).reshape(x.shape)


def grouped(x: Array) -> Array:
    """Cuts sequences [B, T, ...] into groups of at most `GROUP` tokens, [B * T / S, S, ...]."""
    size = min(GROUP, x.shape[1])
    if x.shape[1] % size:
        raise ValueError(f"{x.shape[1]} tokens do not divide into groups of {size}.")
    return x.reshape(-1, size, *x.shape[2:])


THROUGH: dict[str, Callable[..., Array]] = {
    "ragged": through_sorted,
    "dense": through_all,
    "onehot": lambda *given: through_onehot(*given, full=False),
    "onehot_full": lambda *given: through_onehot(*given, full=True),
}


class Experts(nnx.Module):
    """A router, SwiGLU experts of which a token sees few, and a shared one that all tokens see.

    Args:
      hidden: Width of one expert.
      top_k: Experts of a token; with `choice`, on average.
      num_shared: The shared expert's width over `hidden`; none if zero.
      normalise: Whether the gates of a token's experts sum to one.
      balance: Over what the balance loss takes its means; `choice` needs no such loss.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        top_k: int,
        num_shared: int = 0,
        normalise: bool = True,
        balance: Balance = "batch",
        balance_weight: float = 0.01,
        dispatch: Dispatch = "ragged",
        rngs: nnx.Rngs,
    ) -> None:
        E, D, F = num_experts, dim, hidden
        self.top_k, self.normalise, self.dispatch = top_k, normalise, dispatch
        self.balance: Balance = balance
        self.balance_weight = balance_weight
        self.router = Linear(D, E, ("embed", None), bias=False, rngs=rngs)
        self.gate = weight(rngs, (E, D, F), (None, "embed", "mlp"), fan_in=D)
        self.up = weight(rngs, (E, D, F), (None, "embed", "mlp"), fan_in=D)
        self.down = weight(rngs, (E, F, D), (None, "mlp", "embed"), fan_in=F)
        wide = num_shared * hidden
        self.shared = (
            FeedForward(D, wide, activation="silu", gated=True, rngs=rngs) if wide else None
        )

    @jax.named_scope("experts")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        with jax.named_scope("router"):
            probs = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
        gate, up, down = (part[...].astype(x.dtype) for part in (self.gate, self.up, self.down))
        if self.dispatch == "choice":
            y = through_choice(x, probs, (gate, up, down), top_k=self.top_k)
        else:
            gates, chosen = route(probs, self.top_k, normalise=self.normalise)
            y = THROUGH[self.dispatch](x, gates, chosen, (gate, up, down))
            extra = balance_loss(probs, chosen, self.balance)
            y = add_loss(y, self.balance_weight * extra)
        return y if self.shared is None else y + self.shared(x)
