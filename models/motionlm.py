"""Joint motion forecasting as language modelling: every half second, one motion token an agent.

A motion token is one of 13 x 13 changes of an agent's displacement. A decoder reads the tokens of
all agents so far and the encoded scene, and predicts all agents' next tokens, which are independent
of each other given what came before. "MotionLM-like": sizes are unpublished here and ours; further
- the scene is encoded once for all agents, in one frame; MotionLM encodes it anew in every forecast
  agent's frame. The decoder is told who an agent is by the agent's own encoded history;
- tokens come with the batch, so nothing is quantised here, and no rollouts are aggregated;
- up to eight agents; the published results are of one and two.
The `fleet` size, 32 agents in a scene of 128 agents and 2048 polylines, is ours.

What the inputs mean: the last feature, standard normal, of an agent's step or a lane's point says
whether it was seen: above -1.5, that is 93 of 100. The first agents of the scene are forecast; the
loss counts those whose last step was seen.

Letters: `B` batch, `A` forecast agents, `R` agents or polylines, `P` steps or points of one, `C`
features, `U` future steps, `T` query tokens, `S` key tokens, `D` model, `N` query heads, `K` key
heads, `H` head, `L` latents, `V` rows of the output.

Source: Seff et al., "MotionLM", ICCV 2023: 13 x 13 tokens at 2 Hz for 8 s, one embedding each for
the token, the step and the agent, an early-fusion scene encoder with latent queries after
Nayakanti et al., "Wayformer", ICRA 2023.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import NEVER, Attention, attend
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, weight

DTYPE = jnp.bfloat16
NUM_FEATURES = 10  # of an agent's step and of a lane's point
SEEN = -1.5  # the last feature of what was seen is larger
TILE = 256  # a padded output has a multiple of so many rows

Tokens = Float[Array, "B T D"]
Motion = Float[Array, "B U A D"]
Points = Float[Array, "B R P C"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MotionLmConfig:
    """Sizes of one network.

    Attributes:
      num_layers: Layers of the decoder.
      keys: In the decoder's self-attention, a key head for each query head, or one for all.
      num_agents: Most agents that are forecast.
      num_history: Longest history.
      num_steps: Longest forecast.
      num_bins: Changes of the displacement along one axis; their pairs are the tokens.
      interaction: An agent sees what all agents did, or what it did itself.
      attention: Over all agents and steps at once; or over an agent's steps, then a step's agents.
      codes: Rows of the output are the tokens; or a multiple of 256, the surplus masked.
      num_chunks: Keys of the decoder's self-attention are visited in so many parts.
    """

    num_encoder_layers: int
    num_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    keys: Literal["multi", "single"] = "multi"
    num_latents: int
    num_agents: int = 8
    num_history: int = 11
    num_steps: int = 16
    num_bins: int = 13
    interaction: Literal["joint", "marginal"] = "joint"
    attention: Literal["flattened", "factorised"] = "flattened"
    codes: Literal["exact", "padded"] = "exact"
    num_chunks: int = 1
    layers: Layers = "scan"
    remat: Remat = "none"


class Polylines(nnx.Module):
    """Points with their places through two products, the largest of them through a third."""

    def __init__(self, dim: int, num_places: int | None = None, *, rngs: nnx.Rngs) -> None:
        self.enter = Linear(NUM_FEATURES, dim, (None, "embed"), rngs=rngs)
        self.point = Linear(dim, dim, ("embed", "mlp"), rngs=rngs)
        self.out = Linear(dim, dim, ("mlp", "embed"), rngs=rngs)
        axes = (None, "embed")
        self.place = weight(rngs, (num_places, dim), axes, fan_in=dim) if num_places else None

    @jax.named_scope("polylines")
    def __call__(self, points: Points, seen: Bool[Array, "B R P"]) -> Float[Array, "B R D"]:
        x = self.enter(points.astype(DTYPE))
        if self.place is not None:
            x = x + self.place[...].astype(DTYPE)[None, None, : x.shape[2]]
        largest = jnp.max(jnp.where(seen[..., None], self.point(nnx.gelu(x)), NEVER), axis=2)
        largest = jnp.where(jnp.any(seen, axis=-1)[..., None], largest, 0)
        return self.out(nnx.gelu(largest))


class EncoderLayer(nnx.Module):
    """Latents attend to a source or to each other, then feed-forward."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.attention_norm, self.mlp_norm = LayerNorm(D), LayerNorm(D)
        self.attention = Attention(D, config.num_heads, head_dim=config.head_dim, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, bias=True, rngs=rngs)

    @jax.named_scope("encoder_layer")
    def __call__(
        self,
        x: Tokens,
        source: Float[Array, "B S D"] | None = None,
        seen: Bool[Array, "B S"] | None = None,
    ) -> Tokens:
        x = constrain(x, ("batch", None, None))
        mask = None if seen is None else seen[:, None]
        x = x + self.attention(self.attention_norm(x), source, mask=mask)
        return x + self.mlp(self.mlp_norm(x))


class Encoder(nnx.Module):
    """An agent or a polyline a token; latents read them all and attend to each other."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.agents = Polylines(D, config.num_history, rngs=rngs)
        self.lanes = Polylines(D, rngs=rngs)
        self.norm = LayerNorm(D)
        self.latents = weight(rngs, (config.num_latents, D), (None, "embed"), fan_in=1)
        self.read = EncoderLayer(config, rngs=rngs)
        self.stack = Stack(
            lambda rngs: EncoderLayer(config, rngs=rngs),
            config.num_encoder_layers,
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )

    @jax.named_scope("encoder")
    def __call__(
        self, history: Points, lanes: Float[Array, "B R2 P2 C"]
    ) -> tuple[Float[Array, "B R D"], Float[Array, "B L D"]]:
        """Returns a token of each agent, and the scene."""
        seen_steps, seen_points = history[..., -1] > SEEN, lanes[..., -1] > SEEN
        agents = self.agents(history, seen_steps)
        tokens = jnp.concatenate([agents, self.lanes(lanes, seen_points)], axis=1)
        seen = [jnp.any(part, axis=-1) for part in (seen_steps, seen_points)]
        start = self.latents[...].astype(DTYPE)[None]
        x = jnp.broadcast_to(start, (tokens.shape[0], *start.shape[1:]))
        x = self.read(x, self.norm(tokens), jnp.concatenate(seen, axis=1))
        return agents, self.stack(x)


class MaskedAttention(nnx.Module):
    """Self-attention where a mask allows it, grouped, all keys at once or in parts."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        K = N if config.keys == "multi" else 1
        self.num_chunks = config.num_chunks
        self.query = weight(rngs, (D, N, H), ("embed", "heads", None), fan_in=D)
        # A single key head cannot be split over devices.
        self.key_axis = "kv_heads" if K > 1 else None
        self.key = weight(rngs, (D, K, H), ("embed", self.key_axis, None), fan_in=D)
        self.value = weight(rngs, (D, K, H), ("embed", self.key_axis, None), fan_in=D)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("masked_attention")
    def __call__(self, x: Tokens, mask: Bool[Array, "1 T T"]) -> Tokens:
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
        kind, chunk = "chunked" if self.num_chunks > 1 else "einsum", x.shape[1] // self.num_chunks
        mixed = attend(query, key, value, mask=mask, kind=kind, chunk=chunk)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


def motion_mask(num_steps: int, num_agents: int, *, joint: bool) -> Bool[Array, "1 T T"]:
    """Tells which of all motion tokens, steps outermost, a token sees: none of a later step.

    With `joint`, tokens of all agents; otherwise those of its own.
    """
    step = jnp.repeat(jnp.arange(num_steps), num_agents)
    agent = jnp.tile(jnp.arange(num_agents), num_steps)
    mask = step[None, :] <= step[:, None]
    return (mask if joint else mask & (agent[None, :] == agent[:, None]))[None]


class Flattened(nnx.Module):
    """Attention over the tokens of all agents and steps at once."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        self.joint = config.interaction == "joint"
        self.attention = MaskedAttention(config, rngs=rngs)

    @jax.named_scope("flattened")
    def __call__(self, x: Motion) -> Motion:
        B, U, A, D = x.shape
        mask = motion_mask(U, A, joint=self.joint)
        return self.attention(x.reshape(B, U * A, D), mask).reshape(x.shape)


class Factorised(nnx.Module):
    """Attention over the steps of each agent, then over the agents of each step."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        self.joint = config.interaction == "joint"
        self.norm = LayerNorm(config.embed_dim)
        self.time = MaskedAttention(config, rngs=rngs)
        self.agents = MaskedAttention(config, rngs=rngs)

    @jax.named_scope("factorised")
    def __call__(self, x: Motion) -> Motion:
        B, U, A, D = x.shape
        steps = jnp.swapaxes(x, 1, 2).reshape(B * A, U, D)
        steps = self.time(steps, motion_mask(U, 1, joint=True)).reshape(B, A, U, D)
        over_time = jnp.swapaxes(steps, 1, 2)
        mixed = self.norm(x + over_time).reshape(B * U, A, D)
        mixed = self.agents(mixed, motion_mask(1, A, joint=self.joint))
        return over_time + mixed.reshape(x.shape)


class DecoderLayer(nnx.Module):
    """Attention among motion tokens, to the scene, and feed-forward."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.among_norm, self.scene_norm, self.mlp_norm = (LayerNorm(D) for _ in range(3))
        among = Flattened if config.attention == "flattened" else Factorised
        self.among: Any = among(config, rngs=rngs)
        self.scene = Attention(D, config.num_heads, head_dim=config.head_dim, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, bias=True, rngs=rngs)

    @jax.named_scope("decoder_layer")
    def __call__(self, x: Motion, scene: Float[Array, "B L D"]) -> Motion:
        x = constrain(x, ("batch", None, None, None))
        x = x + self.among(self.among_norm(x))
        flat = self.scene_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        x = x + self.scene(flat, scene).reshape(x.shape)
        return x + self.mlp(self.mlp_norm(x))


class MotionLm(nnx.Module):
    """Scene encoder, and decoder of the agents' motion tokens."""

    def __init__(self, config: MotionLmConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.config, self.num_tokens = config, config.num_bins**2
        self.encoder = Encoder(config, rngs=rngs)
        # The last row starts a forecast.
        rows, axes = (self.num_tokens + 1, config.num_steps, config.num_agents), (None, "embed")
        self.token, self.step, self.agent = (weight(rngs, (n, D), axes, fan_in=D) for n in rows)
        self.who = Linear(D, D, ("embed", "mlp"), rngs=rngs)
        self.stack = Stack(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_layers,
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(D)
        # A padded output can be split over devices; 169 rows cannot.
        padded = config.codes == "padded"
        num_rows = -(-self.num_tokens // TILE) * TILE if padded else self.num_tokens
        self.out = Linear(D, num_rows, ("embed", "vocab" if padded else None), rngs=rngs)

    @jax.named_scope("motion_lm")
    def __call__(
        self, history: Points, lanes: Float[Array, "B R2 P2 C"], tokens: Int[Array, "B A U"]
    ) -> Float[Array, "B U A V"]:
        """Returns logits of every token given the tokens of all earlier steps."""
        agents, scene = self.encoder(history, lanes)
        token, step, agent = (
            table[...].astype(DTYPE) for table in (self.token, self.step, self.agent)
        )
        A, U = tokens.shape[1:]
        shifted = jnp.pad(tokens[..., :-1], ((0, 0), (0, 0), (1, 0)), constant_values=-1)
        before = jnp.where(shifted < 0, self.num_tokens, shifted)
        x = token[jnp.swapaxes(before, 1, 2)] + step[None, :U, None] + agent[None, None, :A]
        with jax.named_scope("who"):
            x = x + self.who(agents[:, :A])[:, None]
        x = self.norm(self.stack(x, scene))
        with jax.named_scope("predict"):
            logits = self.out(x)
        if self.config.codes == "exact":
            return logits
        real = jnp.arange(logits.shape[-1]) < self.num_tokens
        return jnp.where(real[None, None, None], logits, NEVER)


def build(config: MotionLmConfig, rngs: nnx.Rngs) -> MotionLm:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return MotionLm(config, rngs=rngs)


def loss(module: MotionLm, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of the tokens of agents that were seen last."""
    history, lanes = (
        constrain(batch[name], ("batch", None, None, None)) for name in ("history", "lanes")
    )
    tokens = batch["tokens"]
    logits = module(history, lanes, tokens)
    wanted = jnp.swapaxes(tokens, 1, 2)
    seen = history[:, None, : tokens.shape[1], -1, -1] > SEEN
    return cross_entropy(logits, wanted, jnp.broadcast_to(seen, wanted.shape))


CPU = MotionLmConfig(
    num_encoder_layers=1,
    num_layers=2,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    head_dim=8,
    num_latents=8,
    num_agents=2,
    num_history=4,
    num_steps=4,
)
PAPER = MotionLmConfig(
    num_encoder_layers=4,
    num_layers=4,
    embed_dim=256,
    mlp_dim=1024,
    num_heads=4,
    head_dim=64,
    num_latents=192,
)
FLEET = dataclasses.replace(
    PAPER, num_encoder_layers=8, num_layers=8, num_latents=512, num_agents=32, num_history=31
)


def _workload(
    config: MotionLmConfig,
    num_agents: int,
    num_lanes: int,
    global_batch: int,
    *,
    num_points: int = 20,
    rate: float = 1e-4,
) -> Workload:
    """Returns a training step on a scene of `num_agents` agents, as many forecast as can be."""
    tokens = Input(
        shape=(config.num_agents, config.num_steps), dtype="int32", high=config.num_bins**2
    )
    history = Input(shape=(num_agents, config.num_history, NUM_FEATURES))
    lanes = Input(shape=(num_lanes, num_points, NUM_FEATURES))
    return Workload(
        global_batch=global_batch,
        inputs=(("history", history), ("lanes", lanes), ("tokens", tokens)),
        learning_rate=rate,
    )


CPU_SOURCE = "MotionLM's parts, narrow, two agents of four steps, to step on two cores"
PAPER_SOURCE = (
    "Seff et al., MotionLM, ICCV 2023: tokens and steps; Wayformer (UniTraj): width, latents and "
    "scene; depth, eight agents and the batch are ours"
)
FLEET_SOURCE = (
    "no publication: 32 agents, 1024 motion tokens; 128 agents and 2048 polylines a scene"
)

Change = tuple[str, str, Validity, dict[str, Any]]  # name, replaces, validity, fields
FACTORISED: Change = (
    "factorised",
    "attention over agents and steps at once by one over steps and one over agents",
    "T2",
    {"attention": "factorised"},
)
PADDED: Change = ("padded", "169 rows of the output by 256, masked", "T0", {"codes": "padded"})
CHANGES: tuple[Change, ...] = (
    FACTORISED,
    PADDED,
    ("marginal", "what all agents did by an agent's own", "T2", {"interaction": "marginal"}),
    ("mqa", "a key head a query head by one in all", "T2", {"keys": "single"}),
    ("chunked", "all scores at once by keys in two chunks", "T0", {"num_chunks": 2}),
    ("full", "kept activations by kept layer inputs", "T0", {"remat": "full"}),
    ("dots", "kept activations by kept products", "T0", {"remat": "dots"}),
)
CPU_CHANGES: tuple[Change, ...] = (
    ("unroll", "the loop over layers by layers written out", "T0", {"layers": "unroll"}),
)


def _rivals(
    base: str,
    config: MotionLmConfig,
    workload: Workload,
    source: str,
    changes: tuple[Change, ...],
) -> list[Candidate]:
    """Returns the base and its variants, whose names leave out a base's `-base`."""
    itself: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base.removesuffix('-base')}-{change}" if change else base,
            family="motionlm",
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


_AT_CPU = _workload(CPU, 4, 12, 4, num_points=6, rate=1e-2)
_AT_PAPER, _AT_FLEET = _workload(PAPER, 32, 384, 128), _workload(FLEET, 128, 2048, 128)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("motionlm-cpu-base", CPU, _AT_CPU, CPU_SOURCE, (*CHANGES, *CPU_CHANGES)),
    *_rivals("motionlm-paper-base", PAPER, _AT_PAPER, PAPER_SOURCE, CHANGES),
    *_rivals("motionlm-fleet-base", FLEET, _AT_FLEET, FLEET_SOURCE, (FACTORISED, PADDED)),
)
