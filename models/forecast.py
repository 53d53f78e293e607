"""Motion forecasting from agents' histories and map polylines, by latent queries or neighbours.

Tokens of a scene are encoded, learnt queries, one a mode, read the scene, and each gives a path of
normal distributions and a logit. Three ways to mix the tokens:
- `latent`, Wayformer-like: every step of every agent and every polyline is a token; learnt latent
  queries read them all and then attend to each other. Early, late or hierarchical fusion; attention
  over agents and steps at once, or over an agent's steps first.
- `local`, MTR-like: an agent's history is one token, and a token attends to its 16 nearest.
- `global`: the same tokens, each attending to all; MTR's own comparison.
What differs from the publications:
- One agent a scene is forecast, agent 0, with the scene in its frame; no traffic lights. Six mode
  queries decode the six modes directly; Wayformer decodes 64 and merges them.
- MTR's decoder (intention points, dense forecasts of all agents) is left out, as are its distance
  codes in every layer: the features hold the positions.
- Norms stand before the layers' parts; no dropout.
The loss is theirs: the mode nearest to the true path is the mixture's chosen component; its
negative log likelihood plus the cross entropy of choosing it.

What the inputs, all standard normal, mean: features 0, 1 of an agent's step or a lane's point are
its position, 2, 3 an agent's velocity in steps, the last says whether it was seen: above -1.5,
that is 93 of 100. The true path starts with the last velocity and walks at random from there.

Letters: `B` batch, `A` agents, `R` polylines, `P` steps or points of one, `C` features, `T` query
tokens, `S` key tokens, `D` model, `N` heads, `H` head, `L` latents, `M` modes, `F` future steps.

Sources: Nayakanti et al., "Wayformer", ICRA 2023; Shi et al., "MTR", NeurIPS 2022. Sizes: UniTraj's
configurations of both (Feng et al., ECCV 2024): width 256, 192 latents, 32 agents, 384 polylines of
20 points, 2 and 8 layers; MTR: 6 layers, 8 heads, 64 agents, 768 polylines.
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import NEVER, attend
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, weight

DTYPE = jnp.bfloat16
NUM_FEATURES = 10  # of an agent's step and of a lane's point
NUM_NEIGHBOURS = 16  # MTR
NUM_PARAMETERS = 5  # of a normal in the plane: two means, two log deviations, a correlation
SEEN = -1.5  # the last feature of what was seen is larger

Tokens = Float[Array, "B T D"]
Points = Float[Array, "B R P C"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ForecastConfig:
    """Sizes of one network.

    Attributes:
      num_layers: Layers of the encoder.
      num_decoder_layers: Layers of the mode queries.
      num_latents: Latent queries; late fusion halves them between agents and lanes.
      num_history: Longest history.
      num_future: Longest forecast.
      mixing: How tokens of the scene exchange what they know.
      fusion: All tokens are read by one set of latents; agents and lanes have a set each; or a set
        each for half of the layers and then one for both.
      axes: Agents' steps are tokens throughout; or half of the layers mix an agent's own steps, and
        its last step goes on.
      pooling: A polyline is the largest of its points' features, or read by one attention query.
      num_chunks: Keys of the encoder are visited in so many parts; 1 computes all scores at once.
    """

    num_layers: int
    num_decoder_layers: int
    embed_dim: int
    mlp_dim: int
    num_heads: int
    head_dim: int
    num_latents: int
    num_modes: int = 6
    num_history: int = 11
    num_future: int = 80
    mixing: Literal["latent", "local", "global"] = "latent"
    fusion: Literal["early", "late", "hierarchical"] = "early"
    axes: Literal["multi", "factorised"] = "multi"
    pooling: Literal["max", "attention"] = "max"
    num_chunks: int = 1
    layers: Layers = "scan"
    remat: Remat = "none"

    def __post_init__(self) -> None:
        if self.mixing != "latent" and (self.fusion, self.axes) != ("early", "multi"):
            raise ValueError(
                f"mixing={self.mixing!r} has one token an agent and no latents, so that fusion="
                f"{self.fusion!r} and axes={self.axes!r} say nothing. Use 'early' and 'multi'."
            )


@dataclass(frozen=True, slots=True)
class Scene:
    """What is known of a scene: features, and which of them were seen."""

    history: Float[Array, "B A P C"]
    lanes: Float[Array, "B R P2 C"]

    def seen(self) -> tuple[Bool[Array, "B R P"], Bool[Array, "B R2 P2"]]:
        """Tells which steps of the agents and which points of the lanes were seen."""
        return self.history[..., -1] > SEEN, self.lanes[..., -1] > SEEN

    def positions(self) -> Float[Array, "B T 2"]:
        """Returns each agent's last position and each lane's mean one."""
        last, middle = self.history[:, :, -1, :2], jnp.mean(self.lanes[..., :2], axis=2)
        return jnp.concatenate([last, middle], axis=1)


def nearest(
    positions: Float[Array, "B T 2"], seen: Bool[Array, "B T"], num: int
) -> Int[Array, "B T K"]:
    """Lists the `num` nearest tokens that were seen, or all if there are fewer tokens."""
    apart = positions[:, :, None] - positions[:, None]
    distance = jnp.sum(jnp.square(apart), axis=-1)
    distance = jnp.where(seen[:, None], distance, -NEVER)
    return jax.lax.top_k(-distance, min(num, distance.shape[-1]))[1]


class MultiHead(nnx.Module):
    """Attention to a source, or to the tokens themselves, or to each token's own few."""

    def __init__(self, config: ForecastConfig, *, num_chunks: int = 1, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        self.num_chunks = num_chunks
        axes = ("embed", "heads", None)
        self.query, self.key, self.value = (
            weight(rngs, (D, N, H), axes, fan_in=D) for _ in range(3)
        )
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)

    @jax.named_scope("multi_head")
    def __call__(
        self,
        x: Tokens,
        source: Float[Array, "B S D"] | None = None,
        *,
        seen: Bool[Array, "B S"] | None = None,
        near: Int[Array, "B T K"] | None = None,
    ) -> Tokens:
        source = x if source is None else source
        # Without these the partitioner may do all of attention on every device.
        query, key, value = (
            constrain(
                jnp.einsum("BTD,DNH->BTNH", tokens, kernel[...].astype(x.dtype)),
                ("batch", None, "heads", None),
            )
            for tokens, kernel in ((x, self.query), (source, self.key), (source, self.value))
        )
        if near is None:
            mask = None if seen is None else seen[:, None]
            kind = "chunked" if self.num_chunks > 1 else "einsum"
            chunk = source.shape[1] // self.num_chunks
            mixed = attend(query, key, value, mask=mask, kind=kind, chunk=chunk)
        else:
            mixed = _attend_near(query, key, value, near)
        return jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))


@jax.named_scope("attend_near")
def _attend_near(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    near: Int[Array, "B T K"],
) -> Float[Array, "B T N H"]:
    """Attends from each token to the keys that `near` lists for it."""
    take = jax.vmap(lambda rows, places: rows[places])
    scores = jnp.einsum("BTNH,BTKNH->BTNK", query, take(key, near)).astype(jnp.float32)
    weights = jax.nn.softmax(scores * query.shape[-1] ** -0.5, axis=-1).astype(query.dtype)
    return jnp.einsum("BTNK,BTKNH->BTNH", weights, take(value, near))


class SelfLayer(nnx.Module):
    """Attention among tokens and feed-forward, behind norms and beside residuals."""

    def __init__(self, config: ForecastConfig, *, num_chunks: int = 1, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.attention_norm, self.mlp_norm = LayerNorm(D), LayerNorm(D)
        self.attention = MultiHead(config, num_chunks=num_chunks, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, bias=True, rngs=rngs)

    @jax.named_scope("self_layer")
    def __call__(
        self,
        x: Tokens,
        seen: Bool[Array, "B T"] | None = None,
        near: Int[Array, "B T K"] | None = None,
    ) -> Tokens:
        x = constrain(x, ("batch", None, None))
        x = x + self.attention(self.attention_norm(x), seen=seen, near=near)
        return x + self.mlp(self.mlp_norm(x))


class CrossLayer(nnx.Module):
    """Attention to a source and feed-forward, behind norms and beside residuals."""

    def __init__(self, config: ForecastConfig, *, num_chunks: int = 1, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.attention_norm, self.source_norm, self.mlp_norm = (LayerNorm(D) for _ in range(3))
        self.attention = MultiHead(config, num_chunks=num_chunks, rngs=rngs)
        self.mlp = FeedForward(D, config.mlp_dim, bias=True, rngs=rngs)

    @jax.named_scope("cross_layer")
    def __call__(
        self, x: Tokens, source: Float[Array, "B S D"], seen: Bool[Array, "B S"]
    ) -> Tokens:
        y = self.attention_norm(x)
        x = x + self.attention(y, self.source_norm(source), seen=seen)
        return x + self.mlp(self.mlp_norm(x))


def _self_stack(config: ForecastConfig, num_layers: int, num_chunks: int, rngs: nnx.Rngs) -> Stack:
    def make(rngs: nnx.Rngs) -> nnx.Module:
        return SelfLayer(config, num_chunks=num_chunks, rngs=rngs)

    return Stack(make, num_layers, layers=config.layers, remat=config.remat, rngs=rngs)


class Polylines(nnx.Module):
    """Points through two products; what each polyline keeps of its points, through a third."""

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.enter = Linear(NUM_FEATURES, D, (None, "embed"), rngs=rngs)
        self.point = Linear(D, D, ("embed", "mlp"), rngs=rngs)
        self.out = Linear(D, D, ("mlp", "embed"), rngs=rngs)
        reads = config.pooling == "attention"
        self.query = weight(rngs, (1, D), (None, "embed"), fan_in=1) if reads else None
        self.reader = MultiHead(config, rngs=rngs) if reads else None

    @jax.named_scope("polylines")
    def __call__(self, points: Points, seen: Bool[Array, "B R P"]) -> Float[Array, "B R D"]:
        x = self.point(nnx.gelu(self.enter(points.astype(DTYPE))))
        if self.reader is None or self.query is None:
            largest = jnp.max(jnp.where(seen[..., None], x, NEVER), axis=2)
            pooled = jnp.where(jnp.any(seen, axis=-1)[..., None], largest, 0)
        else:
            B, R, P, D = x.shape
            query = jnp.broadcast_to(self.query[...].astype(DTYPE)[None], (B * R, 1, D))
            pooled = self.reader(query, x.reshape(B * R, P, D), seen=seen.reshape(B * R, P))
            pooled = pooled.reshape(B, R, D)
        return self.out(nnx.gelu(pooled))


class Steps(nnx.Module):
    """Every step of an agent as a token, with its time and whether the agent is the forecast one.

    Factorised, half of the encoder's layers mix an agent's steps, and the last step stands for it.
    """

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.enter = Linear(NUM_FEATURES, D, (None, "embed"), rngs=rngs)
        self.time = weight(rngs, (config.num_history, D), (None, "embed"), fan_in=D)
        self.chosen = weight(rngs, (1, D), (None, "embed"), fan_in=D)
        factorised = config.axes == "factorised"
        depth = config.num_layers // 2
        self.stack = _self_stack(config, depth, 1, rngs) if factorised else None

    @jax.named_scope("steps")
    def __call__(
        self, history: Points, seen: Bool[Array, "B R P"]
    ) -> tuple[Tokens, Bool[Array, "B T"]]:
        B, A, P, _ = history.shape
        x = self.enter(history.astype(DTYPE)) + self.time[...].astype(DTYPE)[None, None, :P]
        first = (jnp.arange(A) == 0)[None, :, None, None]
        x = x + jnp.where(first, self.chosen[...].astype(DTYPE)[None, None], 0)
        if self.stack is None:
            return x.reshape(B, A * P, -1), seen.reshape(B, A * P)
        x = self.stack(x.reshape(B * A, P, -1), seen.reshape(B * A, P))
        return x[:, -1].reshape(B, A, -1), jnp.any(seen, axis=-1)


class Latents(nnx.Module):
    """Learnt queries that read all tokens and then attend to each other."""

    def __init__(
        self, config: ForecastConfig, num_latents: int, num_layers: int, *, rngs: nnx.Rngs
    ) -> None:
        self.start = weight(rngs, (num_latents, config.embed_dim), (None, "embed"), fan_in=1)
        self.read = CrossLayer(config, num_chunks=config.num_chunks, rngs=rngs)
        self.stack = _self_stack(config, num_layers, config.num_chunks, rngs)

    @jax.named_scope("latents")
    def __call__(self, tokens: Tokens, seen: Bool[Array, "B T"]) -> Float[Array, "B L D"]:
        start = self.start[...].astype(tokens.dtype)[None]
        x = jnp.broadcast_to(start, (tokens.shape[0], *start.shape[1:]))
        return self.stack(self.read(constrain(x, ("batch", None, None)), tokens, seen))


class LatentEncoder(nnx.Module):
    """Agents' steps and polylines, fused early, late or in between."""

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        self.steps, self.lanes = Steps(config, rngs=rngs), Polylines(config, rngs=rngs)
        depth, num = config.num_layers, config.num_latents
        depth = depth // 2 if config.axes == "factorised" else depth
        apart = {"early": 0, "hierarchical": max(depth // 2, 1), "late": depth}[config.fusion]
        own = [Latents(config, num // 2, apart, rngs=rngs) for _ in range(2)] if apart else []
        self.own = nnx.List(own)
        joint = config.fusion != "late"
        self.joint = Latents(config, num, max(depth - apart, 1), rngs=rngs) if joint else None

    @jax.named_scope("latent_encoder")
    def __call__(self, scene: Scene) -> tuple[Tokens, Bool[Array, "B T"]]:
        seen_steps, seen_points = scene.seen()
        steps, seen = self.steps(scene.history, seen_steps)
        parts = [(steps, seen)]
        parts += [(self.lanes(scene.lanes, seen_points), jnp.any(seen_points, axis=-1))]
        if len(self.own):
            read = [own(*part) for own, part in zip(self.own, parts, strict=True)]
            parts = [(tokens, jnp.ones(tokens.shape[:2], bool)) for tokens in read]
        tokens, seen = (jnp.concatenate(pair, axis=1) for pair in zip(*parts, strict=True))
        if self.joint is None:
            return tokens, seen
        x = self.joint(tokens, seen)
        return x, jnp.ones(x.shape[:2], bool)


class TokenEncoder(nnx.Module):
    """An agent or a polyline a token; layers of attention to the nearest, or to all."""

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        self.local = config.mixing == "local"
        self.agents, self.lanes = Polylines(config, rngs=rngs), Polylines(config, rngs=rngs)
        self.stack = _self_stack(config, config.num_layers, config.num_chunks, rngs)

    @jax.named_scope("token_encoder")
    def __call__(self, scene: Scene) -> tuple[Tokens, Bool[Array, "B T"]]:
        seen_steps, seen_points = scene.seen()
        parts = [self.agents(scene.history, seen_steps), self.lanes(scene.lanes, seen_points)]
        x = jnp.concatenate(parts, axis=1)
        seen = [jnp.any(part, axis=-1) for part in (seen_steps, seen_points)]
        seen = jnp.concatenate(seen, axis=1)
        if not self.local:
            return self.stack(x, seen), seen
        return self.stack(x, seen, nearest(scene.positions(), seen, NUM_NEIGHBOURS)), seen


class DecoderLayer(nnx.Module):
    """Modes attend to each other, then to the scene."""

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        self.norm = LayerNorm(config.embed_dim)
        self.among = MultiHead(config, rngs=rngs)
        self.scene = CrossLayer(config, rngs=rngs)

    @jax.named_scope("decoder_layer")
    def __call__(self, x: Tokens, scene: Float[Array, "B S D"], seen: Bool[Array, "B S"]) -> Tokens:
        return self.scene(x + self.among(self.norm(x)), scene, seen)


class Forecast(nnx.Module):
    """Encoder of the scene and decoder of the modes."""

    def __init__(self, config: ForecastConfig, *, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        encoder = LatentEncoder if config.mixing == "latent" else TokenEncoder
        self.encoder: Any = encoder(config, rngs=rngs)
        self.modes = weight(rngs, (config.num_modes, D), (None, "embed"), fan_in=1)
        self.decoder = Stack(
            lambda rngs: DecoderLayer(config, rngs=rngs),
            config.num_decoder_layers,
            layers=config.layers,
            remat=config.remat,
            rngs=rngs,
        )
        self.norm = LayerNorm(D)
        self.out = Linear(D, 1 + config.num_future * NUM_PARAMETERS, ("embed", None), rngs=rngs)

    @jax.named_scope("forecast")
    def __call__(
        self, history: Points, lanes: Float[Array, "B R2 P2 C"]
    ) -> tuple[Float[Array, "B M"], Float[Array, "B M F 5"]]:
        """Returns a logit of each mode and the normals of its path's steps."""
        tokens, seen = self.encoder(Scene(history, lanes))
        modes = self.modes[...].astype(DTYPE)[None]
        x = jnp.broadcast_to(modes, (tokens.shape[0], *modes.shape[1:]))
        x = self.decoder(constrain(x, ("batch", None, None)), tokens, seen)
        with jax.named_scope("paths"):
            out = self.out(self.norm(x)).astype(jnp.float32)
        return out[..., 0], out[..., 1:].reshape(*out.shape[:2], -1, NUM_PARAMETERS)


def build(config: ForecastConfig, rngs: nnx.Rngs) -> Forecast:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return Forecast(config, rngs=rngs)


def negative_log_likelihood(
    normals: Float[Array, "*dims 5"], points: Float[Array, "*dims 2"]
) -> Float[Array, "*dims"]:
    """Computes -log of a correlated normal's density; deviations from 0.2 to 150, as in MTR."""
    log_x, log_y = (jnp.clip(normals[..., at], -1.609, 5.0) for at in (2, 3))
    correlation = 0.5 * jnp.tanh(normals[..., 4])
    x = (points[..., 0] - normals[..., 0]) * jnp.exp(-log_x)
    y = (points[..., 1] - normals[..., 1]) * jnp.exp(-log_y)
    rest = 1 - jnp.square(correlation)
    distance = (jnp.square(x) + jnp.square(y) - 2 * correlation * x * y) / rest
    return math.log(2 * math.pi) + log_x + log_y + (jnp.log(rest) + distance) / 2


def loss(module: Forecast, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the chosen mode's mean negative log likelihood plus its cross entropy.

    Chosen is the mode whose means lie nearest to the true path, as published.
    """
    history, lanes = (
        constrain(batch[name], ("batch", None, None, None)) for name in ("history", "lanes")
    )
    velocity = history[:, 0, -1:, 2:4]
    path = jnp.cumsum(velocity + 0.1 * batch["walk"], axis=1)
    logits, normals = module(history, lanes)
    normals, truth = normals[:, :, : path.shape[1]], path[:, None]
    apart = jnp.sqrt(jnp.sum(jnp.square(normals[..., :2] - truth), axis=-1))
    chosen = jnp.argmin(jnp.mean(apart, axis=-1), axis=-1)
    best = jnp.take_along_axis(normals, chosen[:, None, None, None], axis=1)[:, 0]
    return jnp.mean(negative_log_likelihood(best, path)) + cross_entropy(logits, chosen)


CPU = ForecastConfig(
    num_layers=2,
    num_decoder_layers=1,
    embed_dim=32,
    mlp_dim=64,
    num_heads=4,
    head_dim=8,
    num_latents=8,
    num_modes=3,
    num_history=4,
    num_future=8,
)
WAYFORMER = ForecastConfig(
    num_layers=2,
    num_decoder_layers=8,
    embed_dim=256,
    mlp_dim=1024,
    num_heads=8,
    head_dim=32,
    num_latents=192,
)
MTR = dataclasses.replace(WAYFORMER, num_layers=6, num_decoder_layers=6, mixing="local")
FLEET = dataclasses.replace(WAYFORMER, num_layers=6, num_latents=512, num_history=31)


def _workload(
    config: ForecastConfig, scene: tuple[int, int, int], global_batch: int, rate: float = 1e-4
) -> Workload:
    """Returns a training step on a scene of so many agents, polylines and points of a polyline."""
    num_agents, num_lanes, num_points = scene
    history = Input(shape=(num_agents, config.num_history, NUM_FEATURES))
    lanes = Input(shape=(num_lanes, num_points, NUM_FEATURES))
    walk = Input(shape=(config.num_future, 2))
    return Workload(
        global_batch=global_batch,
        inputs=(("history", history), ("lanes", lanes), ("walk", walk)),
        learning_rate=rate,
    )


CPU_SOURCE = "Wayformer's parts, two narrow layers, 4 agents and 20 lanes, to step on two cores"
WAYFORMER_SOURCE = (
    "Wayformer as UniTraj configures it (ECCV 2024), 8 heads of 32 for its 4 of 64; 80 steps of "
    "Waymo's motion challenge; the batch is ours"
)
MTR_SOURCE = (
    "Shi et al., MTR, NeurIPS 2022, as UniTraj configures it; the decoder and batch are ours"
)
FLEET_SOURCE = "no publication: Wayformer's width with 128 agents of 31 steps and 2048 polylines"

Change = tuple[str, str, Validity, dict[str, Any]]  # name, replaces, validity, fields
LOCAL: Change = ("local", "latents by attention to the 16 nearest", "T2", {"mixing": "local"})
GLOBAL: Change = ("global", "latents by attention to all", "T2", {"mixing": "global"})
CHANGES: tuple[Change, ...] = (
    LOCAL,
    ("late", "one set of latents by one each and none after", "T2", {"fusion": "late"}),
    ("hierarchical", "one set of latents by one each first", "T2", {"fusion": "hierarchical"}),
    ("factorised", "layers over all tokens by half over time", "T2", {"axes": "factorised"}),
    ("pointattn", "the largest of the points by attention", "T2", {"pooling": "attention"}),
    ("chunked", "all scores at once by keys in two chunks", "T0", {"num_chunks": 2}),
    ("full", "kept activations by kept layer inputs", "T0", {"remat": "full"}),
)
CPU_CHANGES: tuple[Change, ...] = (
    GLOBAL,
    ("head16", "4 heads of 8 by 2 of 16", "T1", {"num_heads": 2, "head_dim": 16}),
    ("unroll", "the loop over layers by layers written out", "T0", {"layers": "unroll"}),
)
HEAD_CHANGES: tuple[Change, ...] = (
    ("head64", "8 heads of 32 by 4 of 64", "T1", {"num_heads": 4, "head_dim": 64}),
    ("head128", "8 heads of 32 by 2 of 128", "T1", {"num_heads": 2, "head_dim": 128}),
)
MTR_CHANGES: tuple[Change, ...] = (
    ("global", "attention to the 16 nearest by one to all", "T2", {"mixing": "global"}),
    *HEAD_CHANGES,
)


def _rivals(
    base: str, config: ForecastConfig, workload: Workload, source: str, changes: tuple[Change, ...]
) -> list[Candidate]:
    """Returns the base and its variants, whose names leave out a base's `-base`."""
    itself: Change = ("", "", "base", {})
    return [
        Candidate(
            name=f"{base.removesuffix('-base')}-{change}" if change else base,
            family="forecast",
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


_AT_CPU, _AT_FLEET = _workload(CPU, (4, 20, 6), 4, 1e-2), _workload(FLEET, (128, 2048, 20), 128)
_AT_WAYFORMER, _AT_MTR = (
    _workload(WAYFORMER, (32, 384, 20), 128),
    _workload(MTR, (64, 768, 20), 128),
)
_WAYFORMER_CHANGES, _FLEET_CHANGES = (*CHANGES, *HEAD_CHANGES), (LOCAL, HEAD_CHANGES[1])

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("forecast-cpu-base", CPU, _AT_CPU, CPU_SOURCE, (*CHANGES, *CPU_CHANGES)),
    *_rivals(
        "forecast-paper-wayformer", WAYFORMER, _AT_WAYFORMER, WAYFORMER_SOURCE, _WAYFORMER_CHANGES
    ),
    *_rivals("forecast-paper-mtr", MTR, _AT_MTR, MTR_SOURCE, MTR_CHANGES),
    *_rivals("forecast-fleet-wayformer", FLEET, _AT_FLEET, FLEET_SOURCE, _FLEET_CHANGES),
)
