"""Token world model: the next image token of a drive, given text, actions and all that came before.

A frame is its text tokens, the codes of its image and the ego car's speed and curvature, in this
order; frames follow each other, and a transformer with learnt positions in time and in the frame
predicts each image token from all that precedes it. "GAIA-1-like": depth, heads and feed-forward
are unpublished, so that the published 6.5 billion parameters are reached by our choice of 32 layers
of width 4096; further
- text comes as token numbers and goes through a table of T5-large's size, learnt here, where GAIA-1
  takes what T5-large puts out; its parameters are not part of the 6.5 billion;
- the `paper` size is ours: a billion parameters and eight frames;
- speed and curvature are standard normal, and nothing is dropped out or masked in training.

Letters: `B` batch, `F` frames, `S` tokens of a frame, `M` text tokens, `P` image tokens, `A`
actions, `T` tokens, `D` model, `N` query heads, `K` key heads, `H` head, `V` rows of the output.

Source: Hu et al., "GAIA-1", 2023, sections 2.2 and 4: 26 frames of 32 text, 576 image (18x32) and 2
action tokens, 15,860 together; 8192 codes; 6.5 billion parameters; batch 128.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import NEVER, AttentionKind, attend
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import make_norm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, constant, weight

DTYPE = jnp.bfloat16
NUM_ACTIONS = 2  # speed and curvature
TILE = 256  # a padded output has a multiple of so many rows

Frames = Float[Array, "B F S D"]
Over = Literal["all", "frame", "time"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorldConfig:
    """Sizes of one model.

    Attributes:
      keys: A key head for each query head, for every four, or one for all.
      num_frames: Longest context.
      num_places: Most tokens of a frame.
      num_codes: Codes of an image token.
      text_vocab: Rows of the text table.
      text_dim: Width of the text table.
      block: Attention, then feed-forward; or both of the same input.
      context: A token sees all tokens up to its own; or layers alternate between those of its frame
        and those in its place in all frames.
      attention: All scores at once, or a frame of keys at a time.
      codes: Rows of the output are the codes; or a multiple of 256, the surplus masked.
      logits: For all frames at once, or of one frame at a time and made again for the gradient.
    """

    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    keys: Literal["multi", "grouped", "single"] = "multi"
    num_frames: int
    num_places: int = 610
    num_codes: int = 8192
    text_vocab: int = 32128
    text_dim: int = 1024
    norm: Literal["layer", "rms"] = "layer"
    block: Literal["serial", "parallel"] = "serial"
    context: Literal["full", "factorised"] = "full"
    attention: AttentionKind = "einsum"
    codes: Literal["exact", "padded"] = "exact"
    logits: Literal["whole", "by_frame"] = "whole"
    layers: Layers = "scan"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        if self.keys == "grouped" and self.num_heads % 4:
            raise ValueError(
                f"num_heads={self.num_heads} is not divisible by 4, and keys='grouped' has a key "
                "head for every four query heads. Use a multiple of 4, or another kind of keys."
            )
        if self.context == "factorised" and self.num_layers % 2:
            raise ValueError(
                f"num_layers={self.num_layers} is odd: factorised layers come in pairs, one over "
                "a frame and one over time. Use an even number."
            )


class CausalAttention(nnx.Module):
    """Attention to all earlier tokens: of the drive, of the frame, or of the place over time."""

    def __init__(self, config: WorldConfig, over: Over, *, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        K = {"multi": N, "grouped": N // 4, "single": 1}[config.keys]
        self.kind: AttentionKind = config.attention
        self.over: Over = over
        self.query = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D)
        # A single key head cannot be split over devices.
        self.key_axis = "kv_heads" if K > 1 else None
        self.key = weight(rngs, (D, K, H), ("embed", self.key_axis, None), fan_in=D)
        self.value = weight(rngs, (D, K, H), ("embed", self.key_axis, None), fan_in=D)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("causal_attention")
    def __call__(self, x: Frames) -> Frames:
        B, F, S, D = x.shape
        if self.over == "all":
            return self._mix(x.reshape(B, F * S, D), chunk=S).reshape(B, F, S, D)
        if self.over == "frame":
            return self._mix(x.reshape(B * F, S, D), chunk=S).reshape(B, F, S, D)
        places = self._mix(jnp.swapaxes(x, 1, 2).reshape(B * S, F, D), chunk=F)
        return jnp.swapaxes(places.reshape(B, S, F, D), 1, 2)

    def _mix(self, x: Float[Array, "B T D"], *, chunk: int) -> Float[Array, "B T D"]:
        # Without these the partitioner may do all of attention on every device.
        query, key, value = (
            constrain(
                jnp.einsum("BTD,DNH->BTNH", x, kernel[...].astype(x.dtype)),
                ("batch", None, axis, None),
            )
            for kernel, axis in (
                (self.query, "heads"),
                (self.key, self.key_axis),
                (self.value, self.key_axis),
            )
        )
        mixed = attend(query, key, value, causal=True, kind=self.kind, chunk=chunk)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


class Layer(nnx.Module):
    """Attention and feed-forward behind norms and beside residuals, in series or in parallel."""

    def __init__(self, config: WorldConfig, over: Over, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.attention_norm: Any = make_norm(config.norm, D)
        self.attention = CausalAttention(config, over, rngs=rngs)
        # In parallel, both read the one norm.
        self.mlp_norm: Any = make_norm(config.norm, D) if config.block == "serial" else None
        self.mlp = FeedForward(D, config.mlp_dim, rngs=rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Frames) -> Frames:
        x = constrain(x, ("batch", None, None, None))
        y = self.attention_norm(x)
        if self.mlp_norm is None:
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(y)
        return x + self.mlp(self.mlp_norm(x))


class LayerPair(nnx.Module):
    """A layer over the tokens of a frame, then one over the frames of a place."""

    def __init__(self, config: WorldConfig, *, rngs: nnx.Rngs) -> None:
        self.frame = Layer(config, "frame", rngs=rngs)
        self.time = Layer(config, "time", rngs=rngs)

    @jax.named_scope("layer_pair")
    def __call__(self, x: Frames) -> Frames:
        return self.time(self.frame(x))


class Embedding(nnx.Module):
    """Text, image and actions of each frame as one row of tokens, with their positions added."""

    def __init__(self, config: WorldConfig, *, rngs: nnx.Rngs) -> None:
        D, E = config.embed_dim, config.text_dim
        self.code = weight(rngs, (config.num_codes, D), ("vocab", "embed"), fan_in=D)
        self.word = weight(rngs, (config.text_vocab, E), ("vocab", "embed"), fan_in=1)
        self.text = Linear(E, D, (None, "embed"), rngs=rngs)
        self.action = weight(rngs, (NUM_ACTIONS, D), (None, "embed"), fan_in=D)
        self.action_bias = constant((NUM_ACTIONS, D), (None, "embed"), 0.0)
        self.time = weight(rngs, (config.num_frames, D), (None, "embed"), fan_in=D)
        self.place = weight(rngs, (config.num_places, D), (None, "embed"), fan_in=D)

    @jax.named_scope("embed")
    def __call__(
        self, text: Int[Array, "B F M"], images: Int[Array, "B F P"], actions: Float[Array, "B F A"]
    ) -> Frames:
        code, word, action, action_bias, time, place = (
            table[...].astype(DTYPE)
            for table in (
                self.code,
                self.word,
                self.action,
                self.action_bias,
                self.time,
                self.place,
            )
        )
        acts = actions.astype(DTYPE)[..., None] * action[None, None] + action_bias[None, None]
        x = jnp.concatenate([self.text(word[text]), code[images], acts], axis=2)
        F, S = x.shape[1:3]
        x = x + time[None, :F, None] + place[None, None, :S]
        return constrain(x, ("batch", None, None, None))


class World(nnx.Module):
    """Embedding, layers, norm and the output's product."""

    def __init__(self, config: WorldConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = Embedding(config, rngs=rngs)
        pairs = config.context == "factorised"

        def make(rngs: nnx.Rngs) -> nnx.Module:
            return LayerPair(config, rngs=rngs) if pairs else Layer(config, "all", rngs=rngs)

        num_layers = config.num_layers // 2 if pairs else config.num_layers
        self.stack = Stack(make, num_layers, layers=config.layers, remat=config.remat, rngs=rngs)
        self.norm: Any = make_norm(config.norm, config.embed_dim)
        rows = config.num_codes
        if config.codes == "padded":
            rows = -(-rows // TILE) * TILE
        self.out = Linear(config.embed_dim, rows, ("embed", "vocab"), bias=False, rngs=rngs)

    @jax.named_scope("world")
    def __call__(
        self, text: Int[Array, "B F M"], images: Int[Array, "B F P"], actions: Float[Array, "B F A"]
    ) -> Float[Array, "B F P D"]:
        """Returns, for each image token, the state of the token before it."""
        before = text.shape[2] - 1
        x = self.stack(self.embedding(text, images, actions))
        return self.norm(x[:, :, before : before + images.shape[2]])

    @jax.named_scope("predict")
    def predict(self, states: Float[Array, "*dims D"]) -> Float[Array, "*dims V"]:
        """Returns logits of the codes; rows beyond the last code never win."""
        logits = self.out(states)
        if self.config.codes == "exact":
            return logits
        real = jnp.arange(logits.shape[-1]) < self.config.num_codes
        return jnp.where(real.reshape(*(1,) * (logits.ndim - 1), -1), logits, NEVER)


def build(config: WorldConfig, rngs: nnx.Rngs) -> World:
    """Builds the model; works abstractly under `nnx.eval_shape`."""
    return World(config, rngs=rngs)


def loss(module: World, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of every image token given all that precedes it.

    `logits="by_frame"` has the logits of one frame only at a time; the same mean.
    """
    images = batch["images"]
    states = module(batch["text"], images, batch["actions"])
    if module.config.logits == "whole":
        logits = constrain(module.predict(states), ("batch", None, None, "vocab"))
        return cross_entropy(logits, images)

    @jax.checkpoint
    def of_frame(frame: tuple[Array, Array]) -> Array:
        return cross_entropy(module.predict(frame[0]), frame[1])

    return jnp.mean(jax.lax.map(of_frame, (jnp.swapaxes(states, 0, 1), jnp.swapaxes(images, 0, 1))))


CPU = WorldConfig(
    num_layers=2,
    embed_dim=64,
    mlp_dim=128,
    num_heads=8,
    head_dim=8,
    num_frames=3,
    num_places=24,
    num_codes=248,
    text_vocab=64,
    text_dim=32,
)
PAPER = WorldConfig(
    num_layers=20,
    embed_dim=2048,
    mlp_dim=8192,
    num_heads=16,
    head_dim=128,
    num_frames=8,
    remat="full",
)
FLEET = WorldConfig(
    num_layers=32,
    embed_dim=4096,
    mlp_dim=16384,
    num_heads=32,
    head_dim=128,
    num_frames=26,
    attention="chunked",
    logits="by_frame",
    remat="full",
)


def _workload(
    config: WorldConfig, num_text: int, global_batch: int, rate: float = 1e-4
) -> Workload:
    """Returns a training step on the longest context and full frames."""
    F, num_images = config.num_frames, config.num_places - num_text - NUM_ACTIONS
    return Workload(
        global_batch=global_batch,
        inputs=(
            ("text", Input(shape=(F, num_text), dtype="int32", high=config.text_vocab)),
            ("images", Input(shape=(F, num_images), dtype="int32", high=config.num_codes)),
            ("actions", Input(shape=(F, NUM_ACTIONS))),
        ),
        learning_rate=rate,
    )


CPU_SOURCE = "GAIA-1's parts, two narrow layers and three frames of 18 codes, to step on two cores"
PAPER_SOURCE = (
    "Hu et al., GAIA-1, 2023: tokens and learning rate; a billion parameters, eight frames and the "
    "batch are ours"
)
FLEET_SOURCE = (
    "Hu et al., GAIA-1, 2023: 26 frames of 610 tokens, 6.5 billion parameters; depth, width and "
    "the batch are ours"
)

Change = tuple[str, str, Validity, dict[str, Any]]  # name, replaces, validity, fields
FACTORISED: Change = (
    "factorised",
    "attention to all earlier tokens by layers over a frame and over time",
    "T2",
    {"context": "factorised"},
)
GROUPED: Change = ("gqa", "a key head a query head by a quarter", "T2", {"keys": "grouped"})
CHANGES: tuple[Change, ...] = (
    FACTORISED,
    GROUPED,
    ("mqa", "a key head a query head by one", "T2", {"keys": "single"}),
    ("rms", "layer norm by RMS norm", "T1", {"norm": "rms"}),
    ("parallel", "attention, then feed-forward, by both at once", "T2", {"block": "parallel"}),
    ("chunked", "all scores at once by a frame of keys at a time", "T0", {"attention": "chunked"}),
    ("byframe", "all logits at once by a frame at a time", "T0", {"logits": "by_frame"}),
    ("dots", "what is kept for the gradient by results of products", "T0", {"remat": "dots"}),
)
CPU_CHANGES: tuple[Change, ...] = (
    ("head16", "8 heads of 8 by 4 of 16", "T1", {"num_heads": 4, "head_dim": 16}),
    ("full", "kept activations by kept layer inputs", "T0", {"remat": "full"}),
    ("padded", "an output of 248 rows by one of 256, masked", "T0", {"codes": "padded"}),
    ("unroll", "the loop over layers by layers written out", "T0", {"layers": "unroll"}),
)
PAPER_CHANGES: tuple[Change, ...] = (
    ("head64", "16 heads of 128 by 32 of 64", "T1", {"num_heads": 32, "head_dim": 64}),
    ("none", "kept layer inputs by kept activations", "T0", {"remat": "none"}),
)


def _rivals(
    base: str, config: WorldConfig, workload: Workload, source: str, changes: tuple[Change, ...]
) -> list[Candidate]:
    """Returns the base and its variants, whose names leave out a base's `-base`."""
    itself: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base.removesuffix('-base')}-{change}" if change else base,
            family="world",
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


CANDIDATES: tuple[Candidate, ...] = (
    *_rivals(
        "world-cpu-base",
        CPU,
        _workload(CPU, 4, 4, 1e-2),
        CPU_SOURCE,
        (*CHANGES, *CPU_CHANGES),
    ),
    *_rivals(
        "world-paper-1b",
        PAPER,
        _workload(PAPER, 32, 32),
        PAPER_SOURCE,
        (*CHANGES, *PAPER_CHANGES),
    ),
    *_rivals(
        "world-fleet-gaia",
        FLEET,
        _workload(FLEET, 32, 32),
        FLEET_SOURCE,
        (FACTORISED, GROUPED),
    ),
)
