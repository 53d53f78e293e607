"""Mixture-of-experts decoders, whose tokens reach their experts in several ways.

Mixtral-like (grouped queries, 8 experts, 2 a token) and DeepSeek-V2-Lite-like (latent attention, a
dense first layer, 64 small experts, 6 a token, 2 shared by all). What `ragged`, `dense`, `onehot`
and `choice` are stands in `blocks/experts.py`.

What differs from the publications: the router's product has the dtype of all others. The loss is
the next token's cross entropy; the balance loss enters by its gradient alone, as in DeepSeek's
program, so that losses of all rivals compare. Rotary positions turn halves, not neighbours, and are
not stretched (YaRN).

Letters: `B` batch, `T` tokens, `D` model, `N` query heads, `H` head, `R` latent, `F` feed-forward
of an expert, `E` experts, `V` vocabulary.

Sources: Jiang et al., "Mixtral of Experts", 2024, table 1; DeepSeek-AI, "DeepSeek-V2", 2024,
section 2 and appendix B.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import Attention, AttentionKind, attend, rotate
from jaxbench.models.blocks.experts import Balance, Dispatch, Experts
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import RMSNorm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, weight

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """What both decoders have.

    Attributes:
      expert_dim: Width of one expert.
      top_k: Experts of a token; with `choice`, on average.
      num_shared: Experts beside the routed ones that see every token; one network, so many times
        as wide.
      normalise: Whether the gates of a token's experts sum to one.
      balance: Over what the balance loss takes its means: the whole batch as in Switch and Mixtral,
        or each sequence as in DeepSeek-V2, which also divides by `top_k`.
      balance_weight: Factor of the balance loss of each layer; `choice` needs none.
    """

    num_layers: int
    embed_dim: int
    num_heads: int
    vocab_size: int
    num_experts: int
    expert_dim: int
    top_k: int
    num_shared: Literal[0, 1, 2]
    normalise: bool
    balance: Balance
    balance_weight: float
    rope_theta: float
    dispatch: Dispatch = "ragged"
    attention: AttentionKind = "einsum"
    layers: Layers = "scan"
    remat: Remat = "full"


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtralConfig(MoeConfig):
    """Grouped queries; all layers are equal."""

    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSeekConfig(MoeConfig):
    """Latent attention, and one dense layer of `dense_dim` before the others.

    Attributes:
      latent_dim: Width that keys and values are made from.
      plain_dim, turned_dim: Parts of a query's or key's head without and with rotary position; the
        turned part of the key is one for all heads.
      value_dim: Width of a value's head.
    """

    dense_dim: int
    latent_dim: int
    plain_dim: int
    turned_dim: int
    value_dim: int


class LatentAttention(nnx.Module):
    """Keys and values of all heads from one narrow vector. Source: DeepSeek-V2, section 2.1.

    Queries are not compressed, as in DeepSeek-V2-Lite.
    """

    def __init__(self, config: DeepSeekConfig, *, rngs: nnx.Rngs) -> None:
        D, N, R = config.embed_dim, config.num_heads, config.latent_dim
        plain, turned, value = config.plain_dim, config.turned_dim, config.value_dim
        self.config = config
        self.query = weight(rngs, (D, N, plain + turned), ("embed", "heads", None), fan_in=D)
        self.compress = Linear(D, R + turned, ("embed", None), bias=False, rngs=rngs)
        self.norm = RMSNorm(R, epsilon=1e-6)
        self.expand = weight(rngs, (R, N, plain + value), ("embed", "heads", None), fan_in=R)
        self.out = weight(rngs, (N, value, D), ("heads", None, "embed"), fan_in=N * value)

    @jax.named_scope("latent_attention")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        config, theta = self.config, self.config.rope_theta
        R, plain = config.latent_dim, config.plain_dim
        query = jnp.einsum("BTD,DNH->BTNH", x, self.query[...].astype(x.dtype))
        latent = self.compress(x)
        expand = self.expand[...].astype(x.dtype)
        heads = jnp.einsum("BTR,RNH->BTNH", self.norm(latent[..., :R]), expand)
        # Without these the partitioner may do all of attention on every device.
        query = constrain(query, ("batch", None, "heads", None))
        heads = constrain(heads, ("batch", None, "heads", None))
        turned = rotate(latent[:, :, None, R:], theta)
        turned = jnp.broadcast_to(turned, (*heads.shape[:3], config.turned_dim))
        key = jnp.concatenate([heads[..., :plain], turned], axis=-1)
        query = jnp.concatenate([query[..., :plain], rotate(query[..., plain:], theta)], axis=-1)
        mixed = attend(query, key, heads[..., plain:], causal=True, kind=config.attention)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


class Layer(nnx.Module):
    """Attention, then experts or one wide network, each behind a norm and beside a residual."""

    def __init__(
        self, config: MixtralConfig | DeepSeekConfig, *, dense_dim: int = 0, rngs: nnx.Rngs
    ) -> None:
        D = config.embed_dim
        self.attention_norm, self.mlp_norm = RMSNorm(D), RMSNorm(D)
        self.attention: Any
        if isinstance(config, DeepSeekConfig):
            self.attention = LatentAttention(config, rngs=rngs)
        else:
            self.attention = Attention(
                D,
                config.num_heads,
                num_kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                causal=True,
                theta=config.rope_theta,
                kind=config.attention,
                rngs=rngs,
            )
        self.mlp: Any
        if dense_dim:
            self.mlp = FeedForward(D, dense_dim, activation="silu", gated=True, rngs=rngs)
        else:
            self.mlp = Experts(
                D,
                config.expert_dim,
                config.num_experts,
                top_k=config.top_k,
                num_shared=config.num_shared,
                normalise=config.normalise,
                balance=config.balance,
                balance_weight=config.balance_weight,
                dispatch=config.dispatch,
                rngs=rngs,
            )

    @jax.named_scope("layer")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = constrain(x, ("batch", None, None))
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Token table, layers, norm and an output table of its own."""

    def __init__(self, config: MixtralConfig | DeepSeekConfig, *, rngs: nnx.Rngs) -> None:
        V, D = config.vocab_size, config.embed_dim
        dense_dim = config.dense_dim if isinstance(config, DeepSeekConfig) else 0
        self.table = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D)
        num_first = 1 if dense_dim else 0
        self.first = Stack(
            lambda rngs: Layer(config, dense_dim=dense_dim, rngs=rngs),
            num_first,
            layers="unroll",
            remat=config.remat,
            rngs=rngs,
        )
        self.stack = Stack(
            lambda rngs: Layer(config, rngs=rngs),
            config.num_layers - num_first,
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = RMSNorm(D)
        self.head = Linear(D, V, ("embed", "vocab"), bias=False, rngs=rngs)

    @jax.named_scope("decoder")
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        with jax.named_scope("embed"):
            x = constrain(self.table[...].astype(DTYPE)[tokens], ("batch", None, None))
        x = self.stack(self.first(x))
        with jax.named_scope("unembed"):
            return self.head(self.norm(x))


def build(config: MixtralConfig | DeepSeekConfig, rngs: nnx.Rngs) -> Decoder:
    """Builds the decoder; works abstractly under `nnx.eval_shape`."""
    return Decoder(config, rngs=rngs)


def loss(module: Decoder, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of the next token; `tokens` is [B, T + 1]."""
    tokens = batch["tokens"]
    logits = constrain(module(tokens[:, :-1]), ("batch", None, "vocab"))
    return cross_entropy(logits, tokens[:, 1:])


CPU_MIXTRAL = MixtralConfig(
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=256,
    num_experts=8,
    expert_dim=64,
    top_k=2,
    num_shared=0,
    normalise=True,
    balance="batch",
    balance_weight=0.02,
    rope_theta=1e6,
    remat="none",
)
CPU_DEEPSEEK = DeepSeekConfig(
    num_layers=3,
    embed_dim=64,
    num_heads=4,
    vocab_size=256,
    num_experts=16,
    expert_dim=32,
    top_k=3,
    num_shared=2,
    normalise=False,
    balance="sequence",
    balance_weight=0.001,
    rope_theta=1e4,
    dense_dim=128,
    latent_dim=32,
    plain_dim=16,
    turned_dim=8,
    value_dim=16,
    remat="none",
)
MIXTRAL_8X7B = MixtralConfig(
    num_layers=32,
    embed_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32_000,
    num_experts=8,
    expert_dim=14_336,
    top_k=2,
    num_shared=0,
    normalise=True,
    balance="batch",
    balance_weight=0.02,
    rope_theta=1e6,
)
MIXTRAL_8X22B = dataclasses.replace(
    MIXTRAL_8X7B,
    num_layers=56,
    embed_dim=6144,
    num_heads=48,
    expert_dim=16_384,
    balance_weight=0.001,
)
DEEPSEEK_LITE = DeepSeekConfig(
    num_layers=27,
    embed_dim=2048,
    num_heads=16,
    vocab_size=102_400,
    num_experts=64,
    expert_dim=1408,
    top_k=6,
    num_shared=2,
    normalise=False,
    balance="sequence",
    balance_weight=0.001,
    rope_theta=1e4,
    dense_dim=10_944,
    latent_dim=512,
    plain_dim=128,
    turned_dim=64,
    value_dim=128,
)

_CPU_SOURCE = "no publication: the paper size's parts, made small to step on two cores"
_OURS = "; batch, full remat and groups of 1024 tokens are our choice"
_SOURCES = {
    "moe-cpu-mixtral": _CPU_SOURCE,
    "moe-cpu-deepseek": _CPU_SOURCE,
    "moe-paper-mixtral-8x7b": "Jiang et al., Mixtral of Experts, 2024, table 1, and "
    "mistralai/Mixtral-8x7B-v0.1's configuration: 46,702,792,704 parameters" + _OURS,
    "moe-paper-deepseek-v2-lite": "DeepSeek-AI, DeepSeek-V2, 2024, appendix B, and "
    "deepseek-ai/DeepSeek-V2-Lite's configuration: 15,706,484,224 parameters" + _OURS,
    "moe-fleet-mixtral-8x22b": "mistralai/Mixtral-8x22B-v0.1's configuration: 140,620,634,112 "
    "parameters" + _OURS,
}


def _tokens(length: int, vocab_size: int, global_batch: int, rate: float = 1e-3) -> Workload:
    """Returns a training step on sequences of `length` tokens and the one that follows."""
    tokens = Input(shape=(length + 1,), dtype="int32", high=vocab_size)
    return Workload(global_batch=global_batch, inputs=(("tokens", tokens),), learning_rate=rate)


Change = tuple[str, str, Validity, dict[str, Any]]

DENSE: Change = ("dense", "sorting by every expert on every token", "T0", {"dispatch": "dense"})
FULL: Change = (
    *("onehotfull", "sorting by one-hot products with a slot for every token", "T0"),
    {"dispatch": "onehot_full"},
)
SAME: tuple[Change, ...] = (
    ("chunked", "whole tables of scores by 512 keys at a time", "T0", {"attention": "chunked"}),
    ("dots", "what is kept for the backward pass by products' results", "T0", {"remat": "dots"}),
)
OTHER: tuple[Change, ...] = (
    ("onehot", "sorting by 1.25 times the fair share of slots", "T2", {"dispatch": "onehot"}),
    ("choice", "tokens' choice of experts by experts' of tokens", "T2", {"dispatch": "choice"}),
)
UNROLLED: Change = ("unrolled", "the loop over layers by layers", "T0", {"layers": "unroll"})


def _mixtral_changes(config: MixtralConfig) -> tuple[Change, ...]:
    """Returns the changes of both sizes; a gate that is always one would teach nothing."""
    one = {"top_k": 1, "normalise": False}
    wide = one | {"num_experts": config.num_experts // 2, "expert_dim": 2 * config.expert_dim}
    return (
        DENSE,
        *OTHER,
        ("top1", "two experts a token by one of half as many, twice as wide", "T2", wide),
        ("shared", "a token's second expert by one for all", "T2", one | {"num_shared": 1}),
        *SAME,
    )


def _deepseek_changes(config: DeepSeekConfig) -> tuple[Change, ...]:
    """Returns the changes of both sizes; sending all tokens to 64 experts is left out."""
    routed = {"num_shared": 0, "top_k": config.top_k + config.num_shared}
    unshared: Change = ("unshared", "shared experts by as many routed ones", "T2", routed)
    return (*OTHER, unshared, *SAME)


def _rivals(
    base: str,
    config: MixtralConfig | DeepSeekConfig,
    workload: Workload,
    *changes: Change,
) -> list[Candidate]:
    """Returns the base and one candidate for each change of its config."""
    same: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base}-{change}" if change else base,
            family="moe",
            size=base.split("-")[1],
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=base,
            replaces=replaces,
            validity=validity,
            source=_SOURCES[base],
        )
        for change, replaces, validity, fields in (same, *changes)
    ]


_CPU_WORK = _tokens(32, 256, 4, 1e-2)
_PAPER_WORK, _LITE_WORK = _tokens(4096, 32_000, 64), _tokens(4096, 102_400, 64)
_FLEET_WORK = _tokens(4096, 32_000, 256)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals(
        *("moe-cpu-mixtral", CPU_MIXTRAL, _CPU_WORK),
        *(*_mixtral_changes(CPU_MIXTRAL), FULL, UNROLLED),
    ),
    *_rivals("moe-cpu-deepseek", CPU_DEEPSEEK, _CPU_WORK, *_deepseek_changes(CPU_DEEPSEEK)),
    *_rivals("moe-paper-mixtral-8x7b", MIXTRAL_8X7B, _PAPER_WORK, *_mixtral_changes(MIXTRAL_8X7B)),
    *_rivals(
        *("moe-paper-deepseek-v2-lite", DEEPSEEK_LITE, _LITE_WORK),
        *_deepseek_changes(DEEPSEEK_LITE),
    ),
    *_rivals("moe-fleet-mixtral-8x22b", MIXTRAL_8X22B, _FLEET_WORK, *SAME),
)
