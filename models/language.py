"""Language decoders as published: Llama 2 and 3, Gemma 2B, GPT-3, the ReLU decoders of MaxText.

One decoder of causal layers, trained on the next token; its configuration says which of the usual
choices it takes. What differs from the publications:
- Llama 3.1's stretching of rotary frequencies, for contexts beyond training, is left out;
- Gemma's factor sqrt(D) on the embeddings is left out; the norms after it take most of it back;
- GPT-3's alternating banded sparse attention is dense here;
- MaxText's own normalisation of tied logits and its one-hot embedding are left out.
Dropout is left out everywhere: a step is deterministic. Llama and Gemma train on 2,048 tokens here
(published: 4,096 and 8,192), as the scores of the plain attention would not fit otherwise.

Letters: `B` batch, `S` tokens given, `T` = S - 1 tokens read, `D` model, `N` query heads, `K` key
heads, `H` head, `R` latent, `P` rotary part of a latent head, `V` rows of the vocabulary.

Sources: Touvron et al., "Llama 2", 2023; Llama Team, "The Llama 3 Herd of Models", 2024; Gemma
Team, "Gemma", 2024; Brown et al., "GPT-3", 2020; DeepSeek-AI, "DeepSeek-V2", 2024 (latent
attention); Chowdhery et al., "PaLM", 2022 (parallel block); MaxText's published step times.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest import mock

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.spmd import get_logical_axis_rules
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import NEVER, attend, cudnn_takes, rotate
from jaxbench.models.blocks.feedforward import Activation, FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import RMSNorm, make_norm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import constant, spread, weight

DTYPE = jnp.bfloat16
_NUM_CHUNKS = 8  # parts of the sequence where the loss is chunked; a quarter of its keys a chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageConfig:
    """Sizes and choices of one decoder.

    Attributes:
      vocab_size: Tokens that exist.
      vocab_multiple: The table is filled up to a multiple of it with rows that are never read and
        whose logits are masked.
      theta: Base of the rotary positions.
      learned_positions: Rows of a learned table of positions; 0 is rotary positions.
      block: `parallel` gives attention and MLP the same normed input and adds both.
      gated: act(x W1) * x W3 in the MLP, three matrices; else act(x W1), two.
      bias: On all products but the output's; latent attention has none.
      query_norm: RMS norm over each head of query and key; latent attention norms its latent.
      attention: `latent` makes all keys and values from one narrow vector a token; its key heads
        are as many as its query heads.
      core: How softmax(query key) value is written; see `flash`.
      loss: `chunked` makes the logits of a part of the sequence at a time, twice.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    vocab_multiple: int = 1
    theta: float = 10_000.0
    learned_positions: Literal[0, 2048] = 0
    norm: Literal["rms", "layer"] = "rms"
    block: Literal["serial", "parallel"] = "serial"
    activation: Activation = "silu"
    gated: bool = True
    bias: bool = False
    query_norm: bool = False
    attention: Literal["heads", "latent"] = "heads"
    core: Literal["einsum", "chunked", "flash"] = "einsum"
    table: Literal["untied", "tied"] = "untied"
    loss: Literal["whole", "chunked"] = "whole"
    layers: Layers = "scan"
    remat: Remat = "full"

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            allowed = [k for k in range(1, self.num_heads + 1) if self.num_heads % k == 0]
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by num_kv_heads={self.num_kv_heads}: "
                f"each key head serves a whole number of query heads. Use one of {allowed}."
            )

    @property
    def table_rows(self) -> int:
        """`vocab_size` filled up to the next multiple of `vocab_multiple`."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


# --- Attention ---


def flash(
    query: Float[Array, "B T N H"], key: Float[Array, "B T K H"], value: Float[Array, "B T K H2"]
) -> Float[Array, "B T N H2"]:
    """Computes causal attention: in JAX's Pallas kernel on a TPU, in cuDNN's on a GPU.

    A kernel keeps one tile of scores on the chip and skips tiles above the diagonal. As the
    partitioner cannot split it, it is mapped over the mesh axes of batch and heads. Elsewhere, and
    on a GPU for what cuDNN does not take (float32, heads wider than 128 or of two widths),
    attention is two einsums.

    The TPU's is the kernel that MaxText's 16B and 32B rows ran. The newer one, splash attention,
    makes float32 products inside, which the workload's dtype rules out.
    A compiled program hides the kernel's products in a custom call, which is priced by its name.
    FLOPs counted from the traced step are the einsums', which do not skip tiles.
    """

    def plain(query: Array, key: Array, value: Array) -> Array:
        return attend(query, key, value, causal=True)

    # An abstract mesh, which lowers for no device in particular, gets the einsums as well.
    on_gpu = _flash_on_gpu if cudnn_takes(key, value) else plain
    kernels = {"tpu": _mapped(_flash_on_tpu), "cuda": _mapped(on_gpu)}
    return jax.lax.platform_dependent(query, key, value, **kernels, default=plain)


def _mapped(kernel: Callable) -> Callable:
    """Maps a kernel over the mesh axes that batch and heads lie on, inside a layout."""
    rules: dict[str, Any] = dict(get_logical_axis_rules() or ())
    if not rules:
        return kernel
    q, k = (
        PartitionSpec(rules.get("batch"), None, rules.get(heads), None)
        for heads in ("heads", "kv_heads")
    )
    return jax.shard_map(kernel, in_specs=(q, k, k), out_specs=q, check_vma=False)


@jax.named_scope("flash")
def _flash_on_gpu(query: Array, key: Array, value: Array) -> Array:
    """Calls cuDNN's attention. JAX asks the library for its version; XLA compiles without it."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    answers = {"check_cudnn_version": lambda: 91100, "check_compute_capability": lambda _: True}
    with mock.patch.multiple(cudnn, **answers):
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=True, implementation="cudnn"
        )


@jax.named_scope("flash")
def _flash_on_tpu(query: Array, key: Array, value: Array) -> Array:
    """Repeats keys for their query heads and fills tokens and heads up to whole tiles of zeros.

    Tokens filled in come last, where the causal mask hides them from the others.
    """
    # Importing Pallas takes a second, which only this core should cost.
    from jax.experimental.pallas.ops.tpu import flash_attention as pallas

    _, T, N, H = query.shape
    block = min(512, _round_up(T, 128))
    tokens, width = _round_up(T, block), _round_up(max(H, value.shape[-1]), 128)

    def tile(x: Array) -> Array:
        x = jnp.repeat(x, N // x.shape[2], axis=2)
        fill = ((0, 0), (0, tokens - T), (0, 0), (0, width - x.shape[-1]))
        return jnp.pad(x, fill).swapaxes(1, 2)

    sizes = {field.name: block for field in dataclasses.fields(pallas.BlockSizes)}
    mixed = pallas.flash_attention(
        tile(query),
        tile(key),
        tile(value),
        causal=True,
        sm_scale=H**-0.5,
        block_sizes=pallas.BlockSizes(**{**sizes, "block_b": 1}),
    )
    return mixed.swapaxes(1, 2)[:, :T, :, : value.shape[-1]]


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def mix(
    config: LanguageConfig,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H2"],
) -> Float[Array, "B T N H2"]:
    """Computes causal attention by the configured core, heads split as their weights are."""
    # Without these the partitioner may do all of attention on every device.
    query = constrain(query, ("batch", None, "heads", None))
    key, value = (constrain(x, ("batch", None, "kv_heads", None)) for x in (key, value))
    if config.core == "flash":
        return flash(query, key, value)
    chunk = min(512, max(1, key.shape[1] // 4))
    return attend(query, key, value, causal=True, kind=config.core, chunk=chunk)


class SelfAttention(nnx.Module):
    """Causal attention of N query heads over K key heads."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs) -> None:
        D, H = config.embed_dim, config.head_dim
        self.config = config
        sides = (("heads", config.num_heads), *[("kv_heads", config.num_kv_heads)] * 2)
        self.inputs = nnx.List(
            [weight(rngs, (D, num, H), ("embed", axis, None), fan_in=D) for axis, num in sides]
        )
        N = config.num_heads
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)
        self.biases = (
            nnx.List([constant((num, H), (axis, None), 0.0) for axis, num in sides])
            if config.bias
            else None
        )
        self.out_bias = constant((D,), (None,), 0.0) if config.bias else None
        self.norms = nnx.List([RMSNorm(H), RMSNorm(H)]) if config.query_norm else None

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        heads = [
            jnp.einsum("BTD,DNH->BTNH", x, kernel[...].astype(x.dtype)) for kernel in self.inputs
        ]
        if self.biases is not None:
            rows = [row[...].astype(x.dtype)[None, None] for row in self.biases]
            heads = [head + row for head, row in zip(heads, rows, strict=True)]
        query, key, value = heads
        if self.norms is not None:
            query, key = self.norms[0](query), self.norms[1](key)
        if not self.config.learned_positions:
            query, key = (rotate(head, self.config.theta) for head in (query, key))
        parts = zip((query, key, value), ("query", "key", "value"), strict=True)
        query, key, value = (checkpoint_name(part, name) for part, name in parts)
        mixed = checkpoint_name(mix(self.config, query, key, value), "mixed")
        y = jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))
        y = checkpoint_name(y, "attention_out")
        return y if self.out_bias is None else y + spread(self.out_bias[...], y)


class LatentAttention(nnx.Module):
    """Keys and values of all heads from one narrow latent vector a token.

    latent, turned = norm(x W)[:R], rotate((x W)[R:]); key = [latent U_n, turned], the turned part
    one for all heads; value = latent V_n; a query has H plain and P rotary numbers a head. The
    sizes are the paper's, R = 4 H and P = H / 2, and queries are not compressed, as in its Lite
    model. Source: DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1 and appendix B.
    """

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        R, P = latent_sizes(config)
        self.config = config
        self.query = weight(rngs, (D, N, H + P), ("embed", "heads", None), fan_in=D)
        self.compress = weight(rngs, (D, R + P), ("embed", None), fan_in=D)
        self.norm = RMSNorm(R)
        self.key = weight(rngs, (R, N, H), ("embed", "heads", None), fan_in=R)
        self.value = weight(rngs, (R, N, H), ("embed", "heads", None), fan_in=R)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("latent_attention")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        H, theta = self.config.head_dim, self.config.theta
        R, _ = latent_sizes(self.config)
        query = jnp.einsum("BTD,DNH->BTNH", x, self.query[...].astype(x.dtype))
        query = jnp.concatenate([query[..., :H], rotate(query[..., H:], theta)], axis=-1)
        narrow = jnp.einsum("BTD,DR->BTR", x, self.compress[...].astype(x.dtype))
        latent, turned = self.norm(narrow[..., :R]), rotate(narrow[..., None, R:], theta)
        key, value = (
            jnp.einsum("BTR,RNH->BTNH", latent, kernel[...].astype(x.dtype))
            for kernel in (self.key, self.value)
        )
        turned = jnp.broadcast_to(turned, (*key.shape[:-1], turned.shape[-1]))
        mixed = mix(self.config, query, jnp.concatenate([key, turned], axis=-1), value)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


def latent_sizes(config: LanguageConfig) -> tuple[int, int]:
    """Returns the widths of the latent vector and of the rotary part of a head."""
    return 4 * config.head_dim, config.head_dim // 2


# --- The decoder ---


class Layer(nnx.Module):
    """Attention and MLP, each beside a residual: one after the other, or both of one norm."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        attention = LatentAttention if config.attention == "latent" else SelfAttention
        self.attention_norm: Any = make_norm(config.norm, D)
        self.attention = attention(config, rngs)
        self.mlp_norm: Any = make_norm(config.norm, D) if config.block == "serial" else None
        self.mlp = FeedForward(
            D,
            config.mlp_dim,
            activation=config.activation,
            gated=config.gated,
            bias=config.bias,
            rngs=rngs,
        )

    @jax.named_scope("layer")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = checkpoint_name(constrain(x, ("batch", None, None)), "layer_input")
        y = self.attention_norm(x)
        if self.mlp_norm is None:
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(y)
        return x + self.mlp(self.mlp_norm(x))


class Language(nnx.Module):
    """Table of tokens, layers, norm, and logits from the table or a matrix of their own."""

    def __init__(self, config: LanguageConfig, rngs: nnx.Rngs) -> None:
        D, V = config.embed_dim, config.table_rows
        self.config = config
        self.table = weight(rngs, (V, D), ("vocab", "embed"), fan_in=D)
        self.output = (
            weight(rngs, (D, V), ("embed", "vocab"), fan_in=D) if config.table == "untied" else None
        )
        rows = config.learned_positions
        self.positions = weight(rngs, (rows, D), (None, "embed"), fan_in=D) if rows else None
        self.stack = Stack(
            lambda rngs: Layer(config, rngs),
            config.num_layers,
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm: Any = make_norm(config.norm, D)

    @jax.named_scope("language")
    def __call__(self, tokens: Int[Array, "B S"]) -> Float[Array, ""]:
        """Computes the mean cross entropy of every token but the first, given those before it."""
        x, labels = self.read(tokens[:, :-1]), tokens[:, 1:]
        if self.config.loss == "chunked":
            return self._loss_in_chunks(x, labels)
        return cross_entropy(self.logits(x), labels)

    def read(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the normed vector after each token."""
        with jax.named_scope("embed"):
            x = self.table[...].astype(DTYPE)[tokens]
            if self.positions is not None:
                x = x + self.positions[...].astype(DTYPE)[None, : tokens.shape[1]]
        return self.norm(self.stack(constrain(x, ("batch", None, None))))

    @jax.named_scope("unembed")
    def logits(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Returns logits of all rows; those that stand for no token are too low to count."""
        if self.output is None:
            y = jnp.einsum("BTD,VD->BTV", x, self.table[...].astype(x.dtype))
        else:
            y = jnp.einsum("BTD,DV->BTV", x, self.output[...].astype(x.dtype))
        y = constrain(y, ("batch", None, "vocab"))
        if self.config.table_rows == self.config.vocab_size:
            return y
        exists = jnp.arange(y.shape[-1]) < self.config.vocab_size
        return jnp.where(exists[None, None], y, jnp.array(NEVER, y.dtype))

    def _loss_in_chunks(
        self, x: Float[Array, "B T D"], labels: Int[Array, "B T"]
    ) -> Float[Array, ""]:
        """Averages the loss over equal parts of the sequence, making logits again going back.

        The weights are cast in each part, so that their gradients are summed in float32.
        """
        B, T, D = x.shape
        if T % _NUM_CHUNKS:
            raise ValueError(f"{T} tokens do not divide into {_NUM_CHUNKS} parts.")
        x = jnp.moveaxis(x.reshape(B, _NUM_CHUNKS, T // _NUM_CHUNKS, D), 1, 0)
        labels = jnp.moveaxis(labels.reshape(B, _NUM_CHUNKS, T // _NUM_CHUNKS), 1, 0)

        @jax.checkpoint
        def part(x: Array, labels: Array) -> Array:
            return cross_entropy(self.logits(x), labels)

        def visit(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            return total + part(*chunk), None

        chunks = (constrain(x, (None, "batch", None, None)), labels)
        total, _ = jax.lax.scan(visit, jnp.zeros((), jnp.float32), chunks)
        return total / _NUM_CHUNKS


def loss(module: Language, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy, in float32, of `batch["tokens"]`, [B, T + 1]."""
    return module(batch["tokens"])


# --- Candidates ---


def _layer_params(config: LanguageConfig) -> int:
    """Counts the matrices of one layer."""
    D, N, H = config.embed_dim, config.num_heads, config.head_dim
    attention = 2 * D * H * (N + config.num_kv_heads)
    if config.attention == "latent":
        R, P = latent_sizes(config)
        attention = D * N * (H + P) + D * (R + P) + 2 * R * N * H + N * H * D
    return attention + (3 if config.gated else 2) * D * config.mlp_dim


def _set(**fields: Any) -> Callable[[LanguageConfig], LanguageConfig]:
    return lambda config: dataclasses.replace(config, **fields)


def _even(change: Callable[[LanguageConfig], LanguageConfig]) -> Callable:
    """Widens or narrows the MLP of what `change` makes until it has the parameters of the base."""

    def even(config: LanguageConfig) -> LanguageConfig:
        changed = change(config)
        row = (3 if changed.gated else 2) * changed.embed_dim
        width = changed.mlp_dim + (_layer_params(config) - _layer_params(changed)) / row
        step = 128 if changed.embed_dim >= 1024 else 8
        return dataclasses.replace(changed, mlp_dim=round(width / step) * step)

    return even


def _heads(factor: float) -> Callable[[LanguageConfig], LanguageConfig]:
    """Makes heads `factor` times as wide and as many fewer."""
    return lambda config: dataclasses.replace(
        config,
        head_dim=int(config.head_dim * factor),
        num_heads=int(config.num_heads / factor),
        num_kv_heads=int(config.num_kv_heads / factor),
    )


_CHANGES: dict[str, tuple[Validity, str, Callable[[LanguageConfig], LanguageConfig]]] = {
    "parallel": ("T2", "MLP after attention by both of one norm", _set(block="parallel")),
    "mha": (
        "T1",
        "shared key heads by one a query head, the MLP narrower by as much",
        _even(lambda config: dataclasses.replace(config, num_kv_heads=config.num_heads)),
    ),
    "gqa": (
        "T1",
        "key heads by a quarter as many as query heads, the MLP wider by as much",
        _even(lambda config: dataclasses.replace(config, num_kv_heads=config.num_heads // 4)),
    ),
    "mqa": ("T2", "key heads by one, the MLP wider by as much", _even(_set(num_kv_heads=1))),
    "latent": (
        "T2",
        "key heads by one latent vector a token, the MLP changed by as much",
        _even(_set(attention="latent")),
    ),
    "narrowheads": ("T1", "heads by twice as many of half the width", _heads(0.5)),
    "wideheads": ("T1", "heads by half as many of twice the width", _heads(2.0)),
    "chunked": ("T0", "attention's einsums by running sums over keys", _set(core="chunked")),
    "flash": ("T0", "attention's einsums by a Pallas or cuDNN kernel", _set(core="flash")),
    "layernorm": ("T1", "RMS norms by layer norms", _set(norm="layer")),
    "geglu": ("T1", "SwiGLU by GeGLU (tanh)", _set(activation="gelu_tanh")),
    "gelu": (
        "T1",
        "SwiGLU by GELU (tanh) in two matrices of the same size together",
        _even(_set(activation="gelu_tanh", gated=False)),
    ),
    "relu2": (
        "T1",
        "SwiGLU by squared ReLU in two matrices of the same size together",
        _even(_set(activation="relu2", gated=False)),
    ),
    "tied": ("T2", "the output matrix by the table of tokens", _set(table="tied")),
    "vocab256": ("T0", "the table by one of a multiple of 256 rows", _set(vocab_multiple=256)),
    "vocab1024": ("T0", "the table by one of a multiple of 1024 rows", _set(vocab_multiple=1024)),
    "chunkedloss": ("T0", "all logits at once by an eighth at a time", _set(loss="chunked")),
    "noremat": ("T0", "remat of each layer by none", _set(remat="none")),
    "dots": ("T0", "full remat by one that keeps products with weights", _set(remat="dots")),
    "unrolled": ("T0", "the loop over layers by layers written out", _set(layers="unroll")),
}


def _workload(config: LanguageConfig, tokens: int, batch: int, rate: float = 3e-4) -> Workload:
    given = Input(shape=(tokens + 1,), dtype="int32", high=config.vocab_size)
    return Workload(global_batch=batch, inputs=(("tokens", given),), learning_rate=rate)


def _rivals(
    base: str, config: LanguageConfig, workload: Workload, source: str, *changes: str
) -> tuple[Candidate, ...]:
    """Returns a base and its variants by the names of their changes."""
    _, size, name = base.split("-")
    stem = f"language-{size}" if size == "cpu" else f"language-{size}-{name}"

    def candidate(name: str, config: LanguageConfig, **fields: Any) -> Candidate:
        return Candidate(
            name=name,
            family="language",
            size=size,
            config=config,
            build=Language,
            loss=loss,
            workload=workload,
            base=base,
            source=source,
            **fields,
        )

    def variant(change: str) -> Candidate:
        validity, replaces, changed = _CHANGES[change]
        fields = {"validity": validity, "replaces": replaces}
        return candidate(f"{stem}-{change}", changed(config), **fields)

    return (candidate(base, config), *map(variant, changes))


CPU = LanguageConfig(
    num_layers=2,
    embed_dim=64,
    mlp_dim=256,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    vocab_size=701,
)
LLAMA2_7B = LanguageConfig(
    num_layers=32,
    embed_dim=4096,
    mlp_dim=11008,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32000,
)
LLAMA2_70B = dataclasses.replace(
    LLAMA2_7B, num_layers=80, embed_dim=8192, mlp_dim=28672, num_heads=64, num_kv_heads=8
)
LLAMA3_8B = dataclasses.replace(
    LLAMA2_7B, mlp_dim=14336, num_kv_heads=8, vocab_size=128256, theta=500_000.0
)
LLAMA3_70B = dataclasses.replace(LLAMA2_70B, vocab_size=128256, theta=500_000.0)
GEMMA_2B = LanguageConfig(
    num_layers=18,
    embed_dim=2048,
    mlp_dim=16384,
    num_heads=8,
    num_kv_heads=1,
    head_dim=256,
    vocab_size=256128,
    activation="gelu_tanh",
    table="tied",
)
GEMMA_2B_262K = dataclasses.replace(GEMMA_2B, vocab_size=262144)
# The table is filled up from 50,257 rows to 50,304, Megatron-LM's multiple of 128.
GPT3_175B = LanguageConfig(
    num_layers=96,
    embed_dim=12288,
    mlp_dim=4 * 12288,
    num_heads=96,
    num_kv_heads=96,
    head_dim=128,
    vocab_size=50257,
    vocab_multiple=128,
    learned_positions=2048,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    bias=True,
    table="tied",
)
# MaxText's own decoder: a parallel block of one RMS norm, two matrices and ReLU, a tied table.
RELU_16B = LanguageConfig(
    num_layers=32,
    embed_dim=5120,
    mlp_dim=32768,
    num_heads=32,
    num_kv_heads=32,
    head_dim=256,
    vocab_size=32768,
    block="parallel",
    activation="relu",
    gated=False,
    query_norm=True,
    table="tied",
)
RELU_22B = dataclasses.replace(
    RELU_16B,
    num_layers=48,
    embed_dim=6144,
    mlp_dim=24576,
    num_heads=24,
    num_kv_heads=24,
    query_norm=False,
)
RELU_32B = dataclasses.replace(RELU_16B, embed_dim=10240)

_OURS = "64 x 2,048 tokens and full remat are our choice"
_FLEET = "256 x 2,048 tokens and full remat are our choice"
_MAXTEXT = "MaxText at e47fa1b5d, published step times on TPU v5e"
_CPU_ONLY = ("unrolled", "vocab256")
_ALL = tuple(change for change in _CHANGES if change not in ("mha", *_CPU_ONLY))

CANDIDATES = (
    *_rivals(
        "language-cpu-base",
        CPU,
        _workload(CPU, 64, 8, 1e-2),
        "no publication: a Llama-like decoder that steps fast on two cores",
        *_ALL,
        *_CPU_ONLY,
    ),
    *_rivals(
        "language-paper-llama2_7b",
        LLAMA2_7B,
        _workload(LLAMA2_7B, 2048, 64),
        f"Touvron et al., Llama 2, 2023; {_OURS}",
        *_ALL,
    ),
    *_rivals(
        "language-paper-llama3_8b",
        LLAMA3_8B,
        _workload(LLAMA3_8B, 2048, 64),
        f"Llama 3 Herd of Models, 2024, Llama 3.1 8B; {_OURS}",
        "mha",
        "mqa",
        "flash",
        "vocab1024",
        "chunkedloss",
    ),
    *_rivals(
        "language-paper-gemma_2b",
        GEMMA_2B,
        _workload(GEMMA_2B, 2048, 64),
        f"Gemma, 2024, tables 1 and 2; {_OURS}",
        "flash",
        "chunkedloss",
    ),
    *_rivals(
        "language-paper-gemma_2b_262k",
        GEMMA_2B_262K,
        _workload(GEMMA_2B_262K, 2048, 64),
        f"Gemma 2B with the vocabulary of Gemma 3 (2025); {_OURS}",
        "chunkedloss",
    ),
    *_rivals(
        "language-paper-relu_16b",
        RELU_16B,
        _workload(RELU_16B, 2048, 6 * 256),
        f"{_MAXTEXT}: 16B, 6 samples a chip on 256 chips, full remat; ran the flash kernel",
        "flash",
    ),
    *_rivals(
        "language-fleet-relu_22b",
        RELU_22B,
        _workload(RELU_22B, 1024, 16 * 64),
        "MaxText at 281e04bf3, step times on TPU v4: 22B, 16 samples a chip on 64, full remat",
    ),
    *_rivals(
        "language-fleet-relu_32b",
        RELU_32B,
        _workload(RELU_32B, 2048, 4 * 256),
        f"{_MAXTEXT}: 32B, 4 samples a chip on 256 chips, full remat; ran the flash kernel",
        "flash",
    ),
    *_rivals(
        "language-fleet-llama2_70b",
        LLAMA2_70B,
        _workload(LLAMA2_70B, 2048, 256),
        f"Touvron et al., Llama 2, 2023; {_FLEET}",
    ),
    *_rivals(
        "language-fleet-llama3_70b",
        LLAMA3_70B,
        _workload(LLAMA3_70B, 2048, 256),
        f"Llama 3 Herd of Models, 2024, Llama 3.1 70B; {_FLEET}",
        "parallel",
        "flash",
    ),
    *_rivals(
        "language-fleet-gpt3_175b",
        GPT3_175B,
        _workload(GPT3_175B, 2048, 1536),
        "Brown et al., GPT-3, 2020, table 2.1; 1,536 x 2,048 tokens as in MLPerf; full remat ours",
    ),
)
