"""Diffusion transformer: noise in image latents predicted from tokens of patches.

As published: patches of the latent become tokens with fixed sine positions; layers are transformer
layers whose norms take shift, scale and gate from the step and the class (adaLN-Zero: the gates
start at zero); the output is the noise and a variance for every latent value. The loss is the
squared error of the noise plus the bound's term for the variance, over 1000 linear betas. What
differs:
- Weights start normal with deviation 1 / sqrt(inputs), where the publication has Xavier's.
- The bound's term of step 0 is the divergence of the other steps; published is a likelihood of
  discrete values there.
- Cross-attention to step and class has no biases; self-attention has them.
- No running average of the weights; dropped classes come with the batch (`drop`, one in ten).
- The positions are computed, so they are not among the parameters; the publication's code counts
  them (294,912 at XL/2).
- `fleet` is ours: eight cameras as one mosaic of two by four latents, attended as a whole.

Letters: `B` batch, `I` `J` rows and columns of a latent, `C` its channels, `T` tokens, `D` model,
`N` heads, `H` head. A `2` marks channels that come out, twice as many.

Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", ICCV 2023, tables 1 and 4:
S/2 33 M, B/2 130 M, L/2 458 M, XL/2 675 M parameters, XL/2 118.6 G multiply-adds at 256 pixels and
524.6 G at 512; loss after Nichol and Dhariwal, "Improved DDPM", ICML 2021.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import Attention, attend
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm, RMSNorm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, constant, spread, weight

DTYPE = jnp.bfloat16
NUM_CHANNELS = 4  # of a latent, as the autoencoder of latent diffusion makes it
NUM_FREQUENCIES = 256  # sines and cosines of a step, before they go through two products

Tokens = Float[Array, "B T D"]
Latents = Float[Array, "B I J C"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DitConfig:
    """Sizes of one network.

    Attributes:
      conditioning: How step and class reach the layers: by shift, scale and gate of the norms; by
        cross-attention; as two more tokens.
      qk_norm: RMS norm of queries and keys over a head.
      num_chunks: Keys are visited in so many parts; 1 computes all scores at once.
      patch: Edge of the square that becomes one token.
      num_classes: Classes without the one that stands for "dropped".
      num_steps: Steps of the diffusion; the betas are scaled to the same end.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    patch: int = 2
    num_classes: int = 1000
    num_steps: int = 1000
    conditioning: Literal["adaln", "cross", "tokens"] = "adaln"
    qk_norm: bool = False
    num_chunks: int = 1
    layers: Layers = "scan"
    remat: Remat = "none"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear betas, as published for 1000 steps and scaled to `num_steps`, and what follows.

    x_t = signal[t] * x_0 + noise[t] * e with signal^2 = prod(1 - beta), signal^2 + noise^2 = 1.
    """

    signal: np.ndarray
    noise: np.ndarray
    log_beta: np.ndarray
    log_posterior: np.ndarray
    mean_error: np.ndarray


def make_schedule(num_steps: int) -> Schedule:
    """Computes the schedule in float64. Source: Ho et al., "DDPM", 2020, equations 4 to 7.

    `mean_error` is the error of the predicted x_{t-1} for an error 1 of the noise; the posterior's
    variance is zero at step 0 and takes step 1's there.
    """
    beta = np.linspace(1e-4, 0.02, num_steps) * (1000 / num_steps)
    kept = np.cumprod(1 - beta)
    posterior = beta * (1 - np.append(1.0, kept[:-1])) / (1 - kept)
    posterior[0] = posterior[1]
    return Schedule(
        signal=np.sqrt(kept),
        noise=np.sqrt(1 - kept),
        log_beta=np.log(beta),
        log_posterior=np.log(posterior),
        mean_error=beta / np.sqrt((1 - beta) * (1 - kept)),
    )


def waves(position: Float[Array, "*dims"], num: int) -> Float[Array, "*dims W"]:
    """Returns cosines and sines of positions at `num / 2` frequencies from 1 down to 1/10000."""
    half = num // 2
    frequency = jnp.exp(-math.log(10_000) / half * jnp.arange(half, dtype=jnp.float32))
    angle = position[..., None] * spread(frequency, position[..., None])
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def grid_waves(rows: int, columns: int, dim: int) -> Float[Array, "1 T D"]:
    """Returns fixed positions of a grid: half of the width tells the column, half the row."""
    row = jnp.repeat(jnp.arange(rows, dtype=jnp.float32), columns)
    column = jnp.tile(jnp.arange(columns, dtype=jnp.float32), rows)
    both = [waves(column, dim // 2), waves(row, dim // 2)]
    return jnp.concatenate(both, axis=-1)[None]


def patchify(x: Latents, patch: int) -> Tokens:
    """Lists the patches row by row, each with its values row by row."""
    B, rows, columns, C = x.shape
    x = x.reshape(B, rows // patch, patch, columns // patch, patch, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, patch * patch * C)


def unpatchify(x: Tokens, rows: int, columns: int, patch: int) -> Latents:
    """Undoes `patchify` for a latent of `rows` by `columns`."""
    x = x.reshape(x.shape[0], rows // patch, columns // patch, patch, patch, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(x.shape[0], rows, columns, -1)


@jax.named_scope("modulate")
def _modulate(x: Tokens, shift: Float[Array, "B 1 D"], scale: Float[Array, "B 1 D"]) -> Tokens:
    """Standardises over the last dim, then scales by 1 + scale and shifts."""
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x32 - mean), axis=-1, keepdims=True)
    y = (x32 - mean) * jax.lax.rsqrt(variance + 1e-6)
    return (y * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(x.dtype)


class ZeroLinear(nnx.Module):
    """x W + b that starts at zero, and so does what it drives."""

    def __init__(self, num_in: int, num_out: int, axes: tuple[str | None, str | None]) -> None:
        self.kernel = constant((num_in, num_out), axes, 0.0)
        self.bias = constant((num_out,), axes[1:], 0.0)

    @jax.named_scope("linear")
    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T F"]:
        y = jnp.einsum("BTC,CF->BTF", x, self.kernel[...].astype(x.dtype))
        return y + spread(self.bias[...], y)


class SelfAttention(nnx.Module):
    """Attention among all tokens; one product makes queries, keys and values, as published."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        self.num_chunks = config.num_chunks
        self.inner = weight(rngs, (D, 3, N, H), ("embed", None, "heads", None), fan_in=D)
        self.inner_bias = constant((3, N, H), (None, "heads", None), 0.0)
        self.norms = nnx.List([RMSNorm(H), RMSNorm(H)]) if config.qk_norm else None
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)
        self.out_bias = constant((D,), (None,), 0.0)

    @jax.named_scope("self_attention")
    def __call__(self, x: Tokens) -> Tokens:
        heads = jnp.einsum("BTD,DANH->ABTNH", x, self.inner[...].astype(x.dtype))
        heads = heads + self.inner_bias[...].astype(x.dtype)[:, None, None]
        # Without this the partitioner may do all of attention on every device.
        query, key, value = (constrain(head, ("batch", None, "heads", None)) for head in heads)
        if self.norms is not None:
            query, key = (norm(head) for norm, head in zip(self.norms, (query, key), strict=True))
        kind, chunk = "chunked" if self.num_chunks > 1 else "einsum", x.shape[1] // self.num_chunks
        mixed = attend(query, key, value, kind=kind, chunk=chunk)
        y = jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))
        return y + spread(self.out_bias[...], y)


def _feed_forward(config: DitConfig, rngs: nnx.Rngs) -> FeedForward:
    return FeedForward(config.embed_dim, config.mlp_dim, bias=True, rngs=rngs)


class AdaLayer(nnx.Module):
    """Attention and feed-forward between norms and gates that the condition drives."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.drive = ZeroLinear(D, 6 * D, ("embed", "mlp"))
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp = _feed_forward(config, rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Tokens, condition: Float[Array, "B 2 D"]) -> Tokens:
        x = constrain(x, ("batch", None, None))
        driven = self.drive(nnx.silu(jnp.sum(condition, axis=1, keepdims=True)))
        shift, scale, gate, shift2, scale2, gate2 = jnp.split(driven, 6, axis=-1)
        x = x + gate * self.attention(_modulate(x, shift, scale))
        return x + gate2 * self.mlp(_modulate(x, shift2, scale2))


class PlainLayer(nnx.Module):
    """A vision transformer's layer; with `cross`, tokens also attend to the condition."""

    def __init__(self, config: DitConfig, *, cross: bool, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        self.attention_norm, self.mlp_norm = LayerNorm(D), LayerNorm(D)
        self.attention = SelfAttention(config, rngs=rngs)
        self.cross_norm = LayerNorm(D) if cross else None
        self.cross = Attention(D, N, head_dim=H, rngs=rngs) if cross else None
        self.mlp = _feed_forward(config, rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Tokens, condition: Float[Array, "B 2 D"]) -> Tokens:
        x = constrain(x, ("batch", None, None))
        x = x + self.attention(self.attention_norm(x))
        if self.cross is not None and self.cross_norm is not None:
            x = x + self.cross(self.cross_norm(x), condition)
        return x + self.mlp(self.mlp_norm(x))


class AdaOutput(nnx.Module):
    """The last norm, driven by the condition, and the product that makes patches of tokens."""

    def __init__(self, config: DitConfig, num_out: int) -> None:
        self.drive = ZeroLinear(config.embed_dim, 2 * config.embed_dim, ("embed", "mlp"))
        self.out = ZeroLinear(config.embed_dim, num_out, ("embed", None))

    @jax.named_scope("output")
    def __call__(self, x: Tokens, condition: Float[Array, "B 2 D"]) -> Float[Array, "B T F"]:
        driven = self.drive(nnx.silu(jnp.sum(condition, axis=1, keepdims=True)))
        return self.out(_modulate(x, *jnp.split(driven, 2, axis=-1)))


class PlainOutput(nnx.Module):
    """The last norm, and the product that makes patches of tokens."""

    def __init__(self, config: DitConfig, num_out: int) -> None:
        self.norm = LayerNorm(config.embed_dim)
        self.out = ZeroLinear(config.embed_dim, num_out, ("embed", None))

    @jax.named_scope("output")
    def __call__(self, x: Tokens, condition: Float[Array, "B 2 D"]) -> Float[Array, "B T F"]:
        return self.out(self.norm(x))


class Condition(nnx.Module):
    """Embeds step and class; class `num_classes` stands for a dropped one."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.first = Linear(NUM_FREQUENCIES, D, (None, "embed"), rngs=rngs)
        self.second = Linear(D, D, ("embed", None), rngs=rngs)
        # The publication's deviation, 0.02.
        self.table = weight(rngs, (config.num_classes + 1, D), (None, "embed"), fan_in=2500)

    @jax.named_scope("condition")
    def __call__(self, step: Int[Array, " B"], label: Int[Array, " B"]) -> Float[Array, "B 2 D"]:
        x = waves(step.astype(jnp.float32), NUM_FREQUENCIES).astype(DTYPE)
        time = self.second(nnx.silu(self.first(x)))
        return jnp.stack([time, self.table[...].astype(DTYPE)[label]], axis=1)


class Dit(nnx.Module):
    """Patches, positions, layers, patches."""

    def __init__(self, config: DitConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        patch_values = config.patch**2 * NUM_CHANNELS
        self.enter = Linear(patch_values, config.embed_dim, (None, "embed"), rngs=rngs)
        self.condition = Condition(config, rngs=rngs)

        def make(rngs: nnx.Rngs) -> nnx.Module:
            if config.conditioning == "adaln":
                return AdaLayer(config, rngs=rngs)
            return PlainLayer(config, cross=config.conditioning == "cross", rngs=rngs)

        self.stack = Stack(
            make, config.num_layers, layers=config.layers, remat=config.remat, rngs=rngs
        )
        output = AdaOutput if config.conditioning == "adaln" else PlainOutput
        self.output = output(config, 2 * patch_values)

    @jax.named_scope("dit")
    def __call__(
        self, noisy: Latents, step: Int[Array, " B"], label: Int[Array, " B"]
    ) -> Float[Array, "B I J C2"]:
        rows, columns = noisy.shape[1:3]
        patch, dim = self.config.patch, self.config.embed_dim
        with jax.named_scope("enter"):
            x = self.enter(patchify(noisy.astype(DTYPE), patch))
            x = x + grid_waves(rows // patch, columns // patch, dim).astype(DTYPE)
        x = constrain(x, ("batch", None, None))
        num_tokens, condition = x.shape[1], self.condition(step, label)
        if self.config.conditioning == "tokens":
            x = jnp.concatenate([x, condition], axis=1)
        x = self.stack(x, condition)[:, :num_tokens]
        return unpatchify(self.output(x, condition), rows, columns, patch)


def build(config: DitConfig, rngs: nnx.Rngs) -> Dit:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return Dit(config, rngs=rngs)


def loss(module: Dit, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes mean (noise - predicted)^2 plus the mean divergence that trains the variances.

    The class of a sample whose `drop` is zero is replaced by the one for "dropped". The divergence,
    in bits, is that of the predicted from the true distribution of x_{t-1}; its gradient does not
    reach the predicted noise, as published.
    """
    schedule = make_schedule(module.config.num_steps)
    step, noise = batch["steps"], batch["noise"]

    def at_step(table: np.ndarray) -> Float[Array, "B 1 1 1"]:
        return jnp.asarray(table, jnp.float32)[step][:, None, None, None]

    noisy = at_step(schedule.signal) * batch["latents"] + at_step(schedule.noise) * noise
    label = jnp.where(batch["drop"] == 0, module.config.num_classes, batch["labels"])
    noisy = constrain(noisy, ("batch", None, None, None))
    out = module(noisy, step, label).astype(jnp.float32)
    predicted, fraction = out[..., :NUM_CHANNELS], (out[..., NUM_CHANNELS:] + 1) / 2
    true = at_step(schedule.log_posterior)
    log_variance = fraction * at_step(schedule.log_beta) + (1 - fraction) * true
    error = at_step(schedule.mean_error) * (noise - jax.lax.stop_gradient(predicted))
    ratio = log_variance - true
    divergence = (ratio - 1 + jnp.exp(-ratio) + jnp.square(error) * jnp.exp(-log_variance)) / 2
    return jnp.mean(jnp.square(noise - predicted)) + jnp.mean(divergence) / math.log(2)


def _sizes(num_layers: int, dim: int, num_heads: int, **fields: Any) -> DitConfig:
    return DitConfig(
        num_layers=num_layers,
        embed_dim=dim,
        mlp_dim=4 * dim,
        num_heads=num_heads,
        head_dim=dim // num_heads,
        **fields,
    )


CPU = _sizes(2, 64, 4, num_classes=15)
PAPER = {
    "s2": _sizes(12, 384, 6),
    "b2": _sizes(12, 768, 12),
    "l2": _sizes(24, 1024, 16),
    "xl2": _sizes(28, 1152, 16),
}


def _workload(
    rows: int, columns: int, global_batch: int, *, num_classes: int = 1000, rate: float = 1e-4
) -> Workload:
    """Returns a training step on latents of `rows` by `columns`."""
    latent = Input(shape=(rows, columns, NUM_CHANNELS))
    return Workload(
        global_batch=global_batch,
        inputs=(
            ("latents", latent),
            ("noise", latent),
            ("steps", Input(shape=(), dtype="int32", high=1000)),
            ("labels", Input(shape=(), dtype="int32", high=num_classes)),
            ("drop", Input(shape=(), dtype="int32", high=10)),
        ),
        learning_rate=rate,
    )


CPU_SOURCE = "DiT's parts, two narrow layers that step on two cores"
PAPER_SOURCE = (
    "Peebles and Xie, DiT, ICCV 2023, table 1; batch 256, learning rate 1e-4; 512 pixels: table 4"
)
FLEET_SOURCE = (
    "DiT-XL/2 on eight cameras of 320x512 pixels as one mosaic, 5120 tokens: size and use are ours"
)

Change = tuple[str, str, Validity, dict[str, Any]]  # name, replaces, validity, fields
CHANGES: tuple[Change, ...] = (
    ("cross", "adaLN-Zero by cross-attention to step and class", "T2", {"conditioning": "cross"}),
    ("tokens", "adaLN-Zero by step and class as two tokens", "T2", {"conditioning": "tokens"}),
    ("qknorm", "plain queries and keys by RMS-normed ones", "T2", {"qk_norm": True}),
    ("chunked", "all scores at once by keys in two chunks", "T0", {"num_chunks": 2}),
    ("dots", "kept activations by kept products", "T0", {"remat": "dots"}),
    ("full", "kept activations by kept layer inputs", "T0", {"remat": "full"}),
)
CPU_CHANGES: tuple[Change, ...] = (
    ("head32", "4 heads of 16 by 2 of 32", "T1", {"num_heads": 2, "head_dim": 32}),
    ("head64", "4 heads of 16 by 1 of 64", "T1", {"num_heads": 1, "head_dim": 64}),
    ("unroll", "the loop over layers by layers written out", "T0", {"layers": "unroll"}),
)
XL_CHANGES: tuple[Change, ...] = (
    ("head64", "16 heads of 72 by 18 of 64", "T1", {"num_heads": 18, "head_dim": 64}),
    ("head128", "16 heads of 72 by 9 of 128", "T1", {"num_heads": 9, "head_dim": 128}),
)
FLEET_CHANGES: tuple[Change, ...] = (
    ("chunked", "all scores at once by keys in chunks of 640", "T0", {"num_chunks": 8}),
    XL_CHANGES[1],
)


def _rivals(
    base: str, config: DitConfig, workload: Workload, source: str, changes: tuple[Change, ...] = ()
) -> list[Candidate]:
    """Returns the base and its variants, whose names leave out a base's `-base`."""
    stem = base.removesuffix("-base")
    itself: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{stem}-{change}" if change else base,
            family="dit",
            size=base.split("-")[1],
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=base,
            replaces=words,
            validity=kind,
            source=source,
        )
        for change, words, kind, fields in (itself, *changes)
    ]


_AT_CPU = _workload(8, 8, 8, num_classes=15, rate=1e-2)
_AT_256, _AT_512 = _workload(32, 32, 256), _workload(64, 64, 256)
_XL_FULL = dataclasses.replace(PAPER["xl2"], remat="full")

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("dit-cpu-base", CPU, _AT_CPU, CPU_SOURCE, (*CHANGES, *CPU_CHANGES)),
    *_rivals("dit-paper-s2", PAPER["s2"], _AT_256, PAPER_SOURCE),
    *_rivals("dit-paper-b2", PAPER["b2"], _AT_256, PAPER_SOURCE),
    *_rivals("dit-paper-l2", PAPER["l2"], _AT_256, PAPER_SOURCE),
    *_rivals("dit-paper-xl2", PAPER["xl2"], _AT_256, PAPER_SOURCE, (*CHANGES, *XL_CHANGES)),
    *_rivals("dit-paper-xl2at512", _XL_FULL, _AT_512, PAPER_SOURCE),
    *_rivals("dit-fleet-mosaic", _XL_FULL, _workload(80, 256, 32), FLEET_SOURCE, FLEET_CHANGES),
)
