"""Decoder as in Llama: RMS norm, rotary positions, grouped queries, SwiGLU, tied table.

Letters: B batch, T query tokens, S key tokens, D model, N query heads, K key heads, G query heads a
  key head, H head, F feed-forward, V vocabulary.

Sources: Touvron et al., "Llama 2", 2023; Ainslie et al., "GQA", EMNLP 2023; Shazeer, "GLU
  Variants", 2020. The `paper` size is Llama 3.2 1B (Meta model card, 2024): 16 layers, D 2048, 32
  heads of 64, 8 key heads, F 8192, V 128256, tied: 1,235,814,400 parameters.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Workload, constrain

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Sizes of one decoder.

    Attributes:
      layers: `scan` compiles one layer and loops over stacked parameters; `unroll` writes all
        layers out.
      remat: `full` keeps only each layer's input for the backward pass.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float = 500_000.0
    layers: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "full"] = "full"

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            allowed = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}: "
                f"each key head serves a whole number of query heads. Use one of {allowed}."
            )


def weight(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], fan_in: int
) -> nnx.Param:
    init = nnx.initializers.normal(fan_in**-0.5)
    return nnx.Param(nnx.with_partitioning(init, axes)(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, with statistics in float32. Source: Zhang and Sennrich, NeurIPS 2019."""

    def __init__(self, dim: int, rngs: nnx.Rngs):
        ones = nnx.with_partitioning(nnx.initializers.ones_init(), (None,))
        self.scale = nnx.Param(ones(rngs.params(), (dim,), jnp.float32))

    @jax.named_scope("norm")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-5)
        return (x32 * inverse * self.scale[...][None, None]).astype(x.dtype)


def rotate(x: Float[Array, "B T N H"], theta: float) -> Float[Array, "B T N H"]:
    """Turns pairs (i, i + H/2) by position / theta^(2i/H). Source: Su et al., "RoFormer", 2021."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position = jnp.arange(x.shape[1], dtype=jnp.float32)
    angle = (position[:, None] * frequency[None])[None, :, None]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention as two einsums and a float32 softmax."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, N, K, H = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.theta = config.rope_theta
        self.query = weight(rngs, (D, N, H), ("embed", "heads", None), D)
        self.key = weight(rngs, (D, K, H), ("embed", "kv_heads", None), D)
        self.value = weight(rngs, (D, K, H), ("embed", "kv_heads", None), D)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), N * H)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        query, key, value = (
            jnp.einsum("BTD,DNH->BTNH", x, weight[...].astype(DTYPE))
            for weight in (self.query, self.key, self.value)
        )
        # Without these the partitioner may do all of attention on every device.
        query = constrain(query, ("batch", None, "heads", None))
        key = constrain(key, ("batch", None, "kv_heads", None))
        value = constrain(value, ("batch", None, "kv_heads", None))
        query, key = rotate(query, self.theta), rotate(key, self.theta)
        B, T, N, H = query.shape
        query = query.reshape(B, T, key.shape[2], N // key.shape[2], H)
        scores = jnp.einsum("BTKGH,BSKH->BKGTS", query, key).astype(jnp.float32) * H**-0.5
        causal = jnp.tri(T, dtype=bool)[None, None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1).astype(DTYPE)
        mixed = jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(DTYPE))


class FeedForward(nnx.Module):
    """SwiGLU: (silu(x W1) * x W3) W2."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.embed_dim, config.mlp_dim
        self.gate = weight(rngs, (D, F), ("embed", "mlp"), D)
        self.up = weight(rngs, (D, F), ("embed", "mlp"), D)
        self.down = weight(rngs, (F, D), ("mlp", "embed"), F)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate = jnp.einsum("BTD,DF->BTF", x, self.gate[...].astype(DTYPE))
        up = jnp.einsum("BTD,DF->BTF", x, self.up[...].astype(DTYPE))
        return jnp.einsum("BTF,FD->BTD", jax.nn.silu(gate) * up, self.down[...].astype(DTYPE))


class Layer(nnx.Module):
    """Attention, then feed-forward, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, rngs)
        self.attention = Attention(config, rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, rngs)
        self.mlp = FeedForward(config, rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = constrain(x, ("batch", None, None))
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def _apply_layer(x: Float[Array, "B T D"], layer: Layer) -> Float[Array, "B T D"]:
    return layer(x)


class Decoder(nnx.Module):
    """Token table, layers, norm, and the table again as the output projection."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.table = weight(
            rngs, (config.vocab_size, config.embed_dim), ("vocab", "embed"), config.embed_dim
        )
        self.stack: Any
        if config.layers == "scan":
            # The stacking dim gets no logical axis: layers are never split over devices.
            stack = nnx.vmap(
                lambda key: Layer(config, nnx.Rngs(params=key)),
                transform_metadata={nnx.PARTITION_NAME: None},
            )
            self.stack = stack(jax.random.split(rngs.params(), config.num_layers))
        else:
            self.stack = nnx.List([Layer(config, rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, rngs)

    @jax.named_scope("decoder")
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        table = self.table[...].astype(DTYPE)
        with jax.named_scope("embed"):
            x = constrain(table[tokens], ("batch", None, None))
        apply = nnx.remat(_apply_layer) if self.config.remat == "full" else _apply_layer
        if self.config.layers == "scan":
            loop = nnx.scan(
                apply,
                in_axes=(nnx.Carry, 0),
                out_axes=nnx.Carry,
                transform_metadata={nnx.PARTITION_NAME: None},
            )
            x = loop(x, self.stack)
        else:
            for layer in self.stack:
                x = apply(x, layer)
        with jax.named_scope("unembed"):
            return jnp.einsum("BTD,VD->BTV", self.norm(x), table)


def token_loss(module: Decoder, batch: dict[str, Any]) -> Float[Array, ""]:
    """Mean cross-entropy of the next token, softmax in float32; `batch["tokens"]` is [B, T + 1]."""
    tokens = batch["tokens"]
    return cross_entropy(module(tokens[:, :-1]), tokens)


def cross_entropy(logits: Float[Array, "B T V"], tokens: Int[Array, "B _"]) -> Float[Array, ""]:
    """Mean cross-entropy, in float32, of logits for the tokens that follow: all but the first."""
    logits = constrain(logits, ("batch", None, "vocab"))
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


_CPU = DecoderConfig(
    num_layers=2,
    embed_dim=128,
    mlp_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    vocab_size=256,
    remat="none",
)
_PAPER = DecoderConfig(
    num_layers=16,
    embed_dim=2048,
    mlp_dim=8192,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    vocab_size=128256,
)
_FLEET = dataclasses.replace(
    _PAPER, num_layers=80, embed_dim=8192, mlp_dim=28672, num_heads=128, num_kv_heads=16
)
_WORK = {
    "cpu": Workload(
        global_batch=4, inputs=(("tokens", Input(shape=(65,), dtype="int32", high=256)),)
    ),
    "paper": Workload(
        global_batch=32, inputs=(("tokens", Input(shape=(2049,), dtype="int32", high=128256)),)
    ),
    "fleet": Workload(
        global_batch=256, inputs=(("tokens", Input(shape=(2049,), dtype="int32", high=128256)),)
    ),
}
_SOURCE = {
    "cpu": "no publication: a Llama-like decoder that steps fast on two cores",
    "paper": "Llama 3.2 1B (Meta model card, 2024); full remat and 32 x 2048 tokens are our choice",
    "fleet": "Llama 3.1 70B (Llama Team, 2024), whose heads are those of head128; full remat, tied "
    "tables and 256 x 2048 tokens are our choice",
}


def _variants(size: str, config: DecoderConfig) -> tuple[Candidate, ...]:
    def variant(change: str, replaces: str, validity: Any, **fields: Any) -> Candidate:
        return Candidate(
            name=f"decoder-{size}-{change}",
            family="decoder",
            size=size,
            config=dataclasses.replace(config, **fields),
            build=Decoder,
            loss=token_loss,
            workload=_WORK[size],
            base=f"decoder-{size}-head64",
            replaces=replaces,
            validity=validity,
            source=_SOURCE[size],
        )

    def heads(width: int) -> dict[str, int]:
        ratio = width // config.head_dim
        return {
            "head_dim": width,
            "num_heads": config.num_heads // ratio,
            "num_kv_heads": config.num_kv_heads // ratio,
        }

    widths = (
        variant("head64", "", "base"),
        variant("head128", "heads of 64 by half as many of 128", "T1", **heads(128)),
        variant("head256", "heads of 64 by a quarter as many", "T1", **heads(256)),
    )
    if size != "cpu":
        # Written out, 16 layers take a TPU's compiler many minutes; the choice is shown at `cpu`.
        return widths
    what = "the loop over layers by layers written out"
    return (*widths, variant("unrolled", what, "T0", layers="unroll"))


CANDIDATES = (*_variants("cpu", _CPU), *_variants("paper", _PAPER), *_variants("fleet", _FLEET))
