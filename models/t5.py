"""T5, and the modifications of it whose step times are published.

An encoder and a decoder of pre-norm layers; learnt biases by relative position, one table for all
layers of each side; scores are not scaled; no biases elsewhere; one token table for both sides and,
scaled by 1 / sqrt(D), for the logits. The published modifications change the activation, the norm,
depth against width, which tables are one, and which layers share their parameters.

What differs from the publications: AdamW stands where Adafactor did; parameters are float32 as
there, all products have one dtype. Tokens are uniform: the spans' sentinels are tokens like others,
and no place is padding. Narang et al. put no numbers to their layer norm's bias: here it has one.

Letters: `B` batch, `T` query tokens, `S` key tokens, `D` model, `N` heads, `H` head, `F`
feed-forward, `I` inner width of a factorised table, `V` vocabulary.

Sources: Raffel et al., "Exploring the Limits of Transfer Learning", JMLR 2020; Narang et al., "Do
Transformer Modifications Transfer Across Implementations and Applications?", EMNLP 2021, table 1;
Shazeer, "GLU Variants Improve Transformer", 2020.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import NEVER, AttentionKind, attend
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import LayerNorm, RMSNorm
from jaxbench.models.blocks.relative import PositionBias
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, constant, spread, weight

DTYPE = jnp.bfloat16
CHUNK = 128  # keys at a time where attention is chunked
# D over the width of a factorised table: 128 at D 768 gives the published 227, 202, 45 and 20
# million parameters.
FACTOR = 6

Plain = Literal["relu", "gelu", "swish", "elu", "selu", "sigmoid", "softplus"]
Gated = Literal["glu", "reglu", "geglu", "swiglu", "liglu"]
Activation = Literal[Plain, Gated]
Norm = Literal["rms", "layer", "rezero", "rezero_layer", "rezero_rms"]
Tables = Literal["one", "inputs", "decoder", "separate", "factorized_inputs", "factorized_one"]
Sharing = Literal["none", "encoder", "decoder", "both"]
Core = Literal[AttentionKind, "bfloat16"]


def _gelu(x: Array) -> Array:
    return nnx.gelu(x, approximate=True)  # as Mesh TensorFlow computes it


PLAIN: dict[str, Callable[[Any], Any]] = {
    "relu": nnx.relu,
    "gelu": _gelu,
    "swish": nnx.silu,
    "elu": nnx.elu,
    "selu": nnx.selu,
    "sigmoid": nnx.sigmoid,
    "softplus": nnx.softplus,
}
GATES: dict[str, Callable[[Any], Any]] = {
    "glu": nnx.sigmoid,
    "reglu": nnx.relu,
    "geglu": _gelu,
    "swiglu": nnx.silu,
    "liglu": lambda x: x,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class T5Config:
    """Sizes and choices; both sides have the same.

    Attributes:
      num_layers: Layers of each side.
      num_buckets: Rows of a table of position biases; far positions share them logarithmically.
      max_distance: From here on all positions share one row.
      activation: A gated one multiplies by a second product, so its `mlp_dim` is 2/3 of a plain
        one's at equal parameters.
      norm: `rezero` multiplies each branch by a learnt factor that starts at zero.
      tables: Which of encoder input, decoder input and output are one table: all (`one`), the
        inputs, the decoder's two, or none; factorised tables are products of two thin ones, either
        the inputs' (the output keeps one of its own) or the one of all three.
      sharing: Sides whose layers all have the same parameters; such layers are always in a loop.
      attention: `bfloat16` keeps scores and softmax in that type, as T5X does unless it is asked
        for `float32_attention_logits`; the others have them in float32.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    vocab_size: int
    num_buckets: int = 32
    max_distance: int = 128
    activation: Activation = "relu"
    norm: Norm = "rms"
    tables: Tables = "one"
    sharing: Sharing = "none"
    attention: Core = "einsum"
    layers: Layers = "scan"
    remat: Remat = "none"


class Attention(nnx.Module):
    """Self or cross attention whose scores are not scaled: the initial queries are small."""

    def __init__(self, config: T5Config, *, causal: bool = False, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        self.causal = causal
        self.kind: Core = config.attention
        self.query = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D * H)
        self.key = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D)
        self.value = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("attention")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        source: Float[Array, "B S D"] | None = None,
        bias: Float[Array, "1 N T S"] | None = None,
    ) -> Float[Array, "B T D"]:
        source = x if source is None else source
        # Without these the partitioner may do all of attention on every device.
        query, key, value = (
            constrain(
                jnp.einsum("BTD,DNH->BTNH", tokens, kernel[...].astype(x.dtype)),
                ("batch", None, "heads", None),
            )
            for tokens, kernel in ((x, self.query), (source, self.key), (source, self.value))
        )
        if self.kind == "bfloat16":
            mixed = _attend_in_bfloat16(query, key, value, bias, causal=self.causal)
        else:
            mixed = attend(
                query,
                key,
                value,
                causal=self.causal,
                bias=bias,
                scale=1.0,
                kind=self.kind,
                chunk=CHUNK,
            )
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


def _attend_in_bfloat16(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    bias: Float[Array, "1 N T S"] | None,
    *,
    causal: bool,
) -> Float[Array, "B T N H"]:
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key).astype(jnp.bfloat16)
    if bias is not None:
        scores += bias.astype(jnp.bfloat16)
    if causal:
        scores = jnp.where(jnp.tri(*scores.shape[2:], dtype=bool), scores, NEVER)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("BNTS,BSNH->BTNH", weights, value)


class FeedForward(nnx.Module):
    """act(x W1) W2, or (act(x W1) * x W3) W2."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        D, F = config.embed_dim, config.mlp_dim
        gated = config.activation in GATES
        self.activation = config.activation
        self.up = Linear(D, F, ("embed", "mlp"), bias=False, rngs=rngs)
        self.gate = Linear(D, F, ("embed", "mlp"), bias=False, rngs=rngs) if gated else None
        self.down = Linear(F, D, ("mlp", "embed"), bias=False, rngs=rngs)

    @jax.named_scope("mlp")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        if self.gate is None:
            return self.down(PLAIN[self.activation](self.up(x)))
        return self.down(GATES[self.activation](self.gate(x)) * self.up(x))


def make_norm(config: T5Config) -> nnx.Module | None:
    """Makes the norm of a branch or a side; `rezero` alone has none."""
    kind = config.norm.removeprefix("rezero").removeprefix("_")
    makers = {"rms": RMSNorm, "layer": LayerNorm}
    return makers[kind](config.embed_dim, epsilon=1e-6) if kind else None


class Branch(nnx.Module):
    """x + part(norm(x)), or x + factor * part(norm(x)) where the norm is a `rezero`."""

    def __init__(self, config: T5Config, part: nnx.Module) -> None:
        rezero = config.norm.startswith("rezero")
        self.norm: Any = make_norm(config)
        self.part: Any = part
        self.factor = constant((1,), (None,), 0.0) if rezero else None

    @jax.named_scope("branch")
    def __call__(self, x: Float[Array, "B T D"], *given: Any) -> Float[Array, "B T D"]:
        y = self.part(x if self.norm is None else self.norm(x), *given)
        return x + (y if self.factor is None else y * spread(self.factor[...], y))


class EncoderLayer(nnx.Module):
    """Self-attention, then feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.attention = Branch(config, Attention(config, rngs=rngs))
        self.mlp = Branch(config, FeedForward(config, rngs=rngs))

    @jax.named_scope("encoder_layer")
    def __call__(
        self, x: Float[Array, "B T D"], bias: Float[Array, "1 N T T"]
    ) -> Float[Array, "B T D"]:
        x = constrain(x, ("batch", None, None))
        return self.mlp(self.attention(x, None, bias))


class DecoderLayer(nnx.Module):
    """Causal self-attention, attention to the encoder's result, then feed-forward."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.attention = Branch(config, Attention(config, causal=True, rngs=rngs))
        self.cross = Branch(config, Attention(config, rngs=rngs))
        self.mlp = Branch(config, FeedForward(config, rngs=rngs))

    @jax.named_scope("decoder_layer")
    def __call__(
        self,
        x: Float[Array, "B T D"],
        bias: Float[Array, "1 N T T"],
        memory: Float[Array, "B S D"],
    ) -> Float[Array, "B T D"]:
        x = constrain(x, ("batch", None, None))
        return self.mlp(self.cross(self.attention(x, None, bias), memory))


class Repeated(nnx.Module):
    """One layer, `num_times` in a row with the same parameters. Source: Lan et al., "ALBERT"."""

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        num_times: int,
        *,
        remat: Remat,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_times = num_times
        self.once = Stack(make, 1, layers="unroll", remat=remat, rngs=rngs)

    @jax.named_scope("repeated")
    def __call__(self, x: Float[Array, "B T D"], *shared: Any) -> Float[Array, "B T D"]:
        def apply(x: Any, once: Any, *shared: Any) -> Any:
            return once(x, *shared)

        loop = nnx.scan(
            apply,
            length=self.num_times,
            in_axes=(nnx.Carry, None, *(None,) * len(shared)),
            out_axes=nnx.Carry,
        )
        return loop(x, self.once, *shared)


class Side(nnx.Module):
    """Encoder or decoder without its tokens: position biases, layers and a last norm."""

    def __init__(
        self,
        config: T5Config,
        layer: Callable[..., nnx.Module],
        *,
        both: bool,
        shared: bool,
        rngs: nnx.Rngs,
    ) -> None:
        def make(rngs: nnx.Rngs) -> nnx.Module:
            return layer(config, rngs=rngs)

        num_layers, remat = config.num_layers, config.remat
        self.bias = PositionBias(
            config.embed_dim,
            config.num_heads,
            both=both,
            num_buckets=config.num_buckets,
            max_distance=config.max_distance,
            rngs=rngs,
        )
        self.stack: Any = (
            Repeated(make, num_layers, remat=remat, rngs=rngs)
            if shared
            else Stack(make, num_layers, layers=config.layers, remat=remat, rngs=rngs)
        )
        self.norm: Any = make_norm(config)

    @jax.named_scope("side")
    def __call__(
        self, x: Float[Array, "B T D"], *memory: Float[Array, "B S D"]
    ) -> Float[Array, "B T D"]:
        x = self.stack(x, self.bias(x), *memory)
        return x if self.norm is None else self.norm(x)


class Table(nnx.Module):
    """A vector for each token, to look up or to compare with; thin and widened if `factorized`."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        V, D = config.vocab_size, config.embed_dim
        if config.tables.startswith("factorized"):
            I = D // FACTOR  # noqa: E741
            self.rows = weight(rngs, (V, I), ("vocab", None), fan_in=1)
            self.widen = weight(rngs, (I, D), (None, "embed"), fan_in=I)
        else:
            self.rows = weight(rngs, (V, D), ("vocab", "embed"), fan_in=1)
            self.widen = None

    @jax.named_scope("embed")
    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = self.rows[...].astype(DTYPE)[tokens]
        if self.widen is not None:
            x = jnp.einsum("BTI,ID->BTD", x, self.widen[...].astype(DTYPE))
        return constrain(x, ("batch", None, None))

    @jax.named_scope("unembed")
    def compare(self, x: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Gives the logits of tokens, scaled as Raffel et al. do where the table is not new."""
        y = x * x.shape[-1] ** -0.5
        if self.widen is not None:
            y = jnp.einsum("BTD,ID->BTI", y, self.widen[...].astype(x.dtype))
        return jnp.einsum("BTD,VD->BTV", y, self.rows[...].astype(x.dtype))


class T5(nnx.Module):
    """Encoder, decoder and up to three tables, of which those that are missing are one."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        V, D, tables, sharing = config.vocab_size, config.embed_dim, config.tables, config.sharing
        own_decoder = tables in ("decoder", "separate")
        own_output = tables in ("inputs", "separate", "factorized_inputs")
        self.table = Table(config, rngs=rngs)
        self.decoder_table = Table(config, rngs=rngs) if own_decoder else None
        self.head = Linear(D, V, ("embed", "vocab"), bias=False, rngs=rngs) if own_output else None
        self.encoder = Side(
            config, EncoderLayer, both=True, shared=sharing in ("encoder", "both"), rngs=rngs
        )
        self.decoder = Side(
            config, DecoderLayer, both=False, shared=sharing in ("decoder", "both"), rngs=rngs
        )

    @jax.named_scope("t5")
    def __call__(
        self, inputs: Int[Array, "B S"], targets: Int[Array, "B T"]
    ) -> Float[Array, "B T V"]:
        table = self.table if self.decoder_table is None else self.decoder_table
        with jax.named_scope("encoder"):
            memory = self.encoder(self.table(inputs))
        with jax.named_scope("decoder"):
            x = self.decoder(table(targets), memory)
        if self.head is None:
            return table.compare(x)
        with jax.named_scope("head"):
            return self.head(x)


def build(config: T5Config, rngs: nnx.Rngs) -> T5:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return T5(config, rngs=rngs)


def loss(module: T5, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of `targets` [B, T], each seen from those before it.

    The decoder starts with token 0, as T5's does.
    """
    targets = batch["targets"]
    before = jnp.pad(targets[:, :-1], ((0, 0), (1, 0)))
    logits = constrain(module(batch["inputs"], before), ("batch", None, "vocab"))
    return cross_entropy(logits, targets)


CPU = T5Config(
    num_layers=6, embed_dim=96, mlp_dim=192, num_heads=12, head_dim=8, vocab_size=256, norm="rms"
)
BASE = T5Config(
    num_layers=12, embed_dim=768, mlp_dim=3072, num_heads=12, head_dim=64, vocab_size=32_128
)
SMALL = dataclasses.replace(BASE, num_layers=6, embed_dim=512, mlp_dim=2048, num_heads=8)
LARGE = dataclasses.replace(
    BASE, num_layers=24, embed_dim=1024, mlp_dim=4096, num_heads=16, remat="full"
)
XXL = dataclasses.replace(LARGE, mlp_dim=65_536, num_heads=128, head_dim=128)
V11 = {"activation": "geglu", "tables": "inputs"}
SMALL_V11 = dataclasses.replace(SMALL, num_layers=8, mlp_dim=1024, num_heads=6, **V11)
LARGE_V11 = dataclasses.replace(LARGE, mlp_dim=2816, remat="none", **V11)


def _spans(
    num_inputs: int, num_targets: int, vocab_size: int, global_batch: int, rate: float = 1e-3
) -> Workload:
    """Returns a training step on corrupted texts and the spans that were cut out of them."""
    sizes = (("inputs", num_inputs), ("targets", num_targets))
    inputs = tuple(
        (name, Input(shape=(size,), dtype="int32", high=vocab_size)) for name, size in sizes
    )
    return Workload(global_batch=global_batch, inputs=inputs, learning_rate=rate)


Change = tuple[str, str, Validity, dict[str, Any]]

CHUNKED: Change = (
    *("chunked", "whole tables of scores by 128 keys at a time", "T0"),
    {"attention": "chunked"},
)
HALF: Change = (
    *("halfscores", "scores and softmax in float32 by bfloat16", "T2"),
    {"attention": "bfloat16"},
)
REMAT: Change = ("remat", "keeping all results by each layer's input", "T0", {"remat": "full"})
UNROLLED: Change = ("unrolled", "the loop over layers by layers", "T0", {"layers": "unroll"})

_PLAIN = ("gelu", "swish", "elu", "selu", "sigmoid", "softplus")
_GATED = ("glu", "reglu", "geglu", "swiglu", "liglu")
# Layers, and with them F and heads the other way round, over the vanilla network's.
_DEPTHS = (("deepest", 2, 1), ("deeper", 3, 2), ("shallower", 2, 3), ("shallowest", 1, 2))
_NORMS: tuple[Change, ...] = (
    ("rms", "layer norm by RMS norm", "T1", {"norm": "rms"}),
    ("rezero", "layer norm by a factor that starts at zero", "T2", {"norm": "rezero"}),
    ("rezerolayer", "branches by such times a factor", "T2", {"norm": "rezero_layer"}),
    ("rezerorms", "layer norm by RMS norm and a factor", "T2", {"norm": "rezero_rms"}),
)
_TABLES: tuple[Change, ...] = (
    ("tiedinputs", "one table by inputs' and output's", "T1", {"tables": "inputs"}),
    ("tieddecoder", "one table by encoder's and decoder's", "T1", {"tables": "decoder"}),
    ("untied", "one table by three", "T1", {"tables": "separate"}),
    ("thin", "one table by inputs' thin one and output's", "T1", {"tables": "factorized_inputs"}),
    ("thinshared", "one table by one thin one", "T2", {"tables": "factorized_one"}),
)
_BLOCKS: tuple[tuple[str, str, Sharing, Tables], ...] = (
    ("block", "own layers by one layer a side", "both", "inputs"),
    ("blockthin", "own layers and table by one layer, thin table", "both", "factorized_inputs"),
    ("blockthinshared", "own layers and table by one layer, one table", "both", "factorized_one"),
    ("encoderblock", "the encoder's own layers by one", "encoder", "inputs"),
    ("decoderblock", "the decoder's own layers by one", "decoder", "inputs"),
)


def _published_changes(config: T5Config) -> tuple[Change, ...]:
    """Returns rows of Narang et al.'s table 1, each a change of the vanilla network."""
    L, F, N = config.num_layers, config.mlp_dim, config.num_heads
    narrow = {"mlp_dim": 2 * F // 3}

    def depth(more: int, less: int) -> dict[str, int]:
        sizes = {"mlp_dim": F * less // more, "num_heads": N * less // more}
        return {"num_layers": L * more // less} | sizes

    return (
        *((name, f"ReLU by {name}", "T1", {"activation": name}) for name in _PLAIN),
        *(
            (name, f"ReLU by {name}, 2/3 as wide", "T1", {"activation": name} | narrow)
            for name in _GATED
        ),
        *_NORMS,
        *(
            (name, f"layers by {more}/{less} as many, narrower", "T1", depth(more, less))
            for name, more, less in _DEPTHS
        ),
        *_TABLES,
        *((name, what, "T2", {"sharing": s, "tables": t}) for name, what, s, t in _BLOCKS),
    )


def _rivals(
    base: str, config: T5Config, workload: Workload, source: str, *changes: Change
) -> list[Candidate]:
    """Returns the base and one candidate for each change of its config."""
    same: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base}-{change}" if change else base,
            family="t5",
            size=base.split("-")[1],
            config=dataclasses.replace(config, **fields),
            build=build,
            loss=loss,
            workload=workload,
            base=base,
            replaces=replaces,
            validity=validity,
            source=source,
        )
        for change, replaces, validity, fields in (same, *changes)
    ]


CPU_SOURCE = "no publication: the paper size's parts, made small to step on two cores"
T5_SOURCE = (
    "Raffel et al., JMLR 2020, section 3.1 and table 14: 512 input and 114 target tokens, 128 "
    "sequences"
)
NARANG_SOURCE = (
    "Narang et al., EMNLP 2021, section 3 and table 1: 65,536 input tokens a step; targets of 114 "
    "tokens give the table's 11.1, 9.4 and 9.1e12 operations, for 64 sequences"
)
V11_SOURCE = (
    "google/t5-v1_1's configuration; 2048 sequences of 512 and 128 tokens as in NVIDIA "
    "JAX-Toolbox, rosetta/projects/t5x, 2023-10-25"
)
_CPU_WORK, _WORK = _spans(32, 16, 256, 4, 1e-2), _spans(512, 114, 32_128, 128)
_V11_WORK = _spans(512, 128, 32_128, 2048)
_CPU_VANILLA, _VANILLA = (dataclasses.replace(config, norm="layer") for config in (CPU, BASE))

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("t5-cpu-base", CPU, _CPU_WORK, CPU_SOURCE, CHUNKED, HALF, REMAT, UNROLLED),
    *_rivals(
        "t5-cpu-vanilla", _CPU_VANILLA, _CPU_WORK, CPU_SOURCE, *_published_changes(_CPU_VANILLA)
    ),
    *_rivals("t5-paper-small", SMALL, _WORK, T5_SOURCE),
    *_rivals("t5-paper-base", BASE, _WORK, T5_SOURCE, CHUNKED, HALF, REMAT),
    *_rivals("t5-paper-large", LARGE, _WORK, T5_SOURCE, CHUNKED),
    *_rivals("t5-paper-vanilla", _VANILLA, _WORK, NARANG_SOURCE, *_published_changes(_VANILLA)),
    *_rivals("t5-paper-v11small", SMALL_V11, _V11_WORK, V11_SOURCE, HALF),
    *_rivals("t5-paper-v11large", LARGE_V11, _V11_WORK, V11_SOURCE, HALF),
    *_rivals("t5-fleet-11b", XXL, _WORK, T5_SOURCE, CHUNKED),
)
