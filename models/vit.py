"""Vision transformer: an image as a sequence of patches, and what may stand in its places.

The base is ViT as published: patches of one convolution, a class token, learned positions,
attention and feed-forward behind layer norms, exact GELU, biases. Dropout is left out, as the step
is deterministic, and so is the hidden layer of the published head for pre-training.

What may be put in place of its parts, openly:
- Windows. An image is cut into `windows` x `windows` windows, and tokens see their own window; the
  last layer of each of four groups is global, as in ViTDet. Tokens lie window after window from the
  start, so no layer moves them. Windows need no class token, so the variant takes the mean of the
  tokens; where there are tokens of no place (class, registers), each window has them as keys and
  queries, and they go on as the mean over the windows.
- Registers: tokens of no place that nothing reads in the end.
- A stem of 3x3 convolutions of stride 2 with batch norm, for which one layer is left out.
Several cameras are so many images, each with a label of its own. Positions are interpolated where
the image has another number of patches than the table.

Letters: `B` batch, `I` `J` rows and columns of an image, `X` `Y` of patches, `T` tokens, `D` model,
`N` heads, `H` head, `P` projections (query, key, value), `K` classes. A `2` marks what a layer puts
out.

Sources: Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021 (86 and 307 million
parameters for B and L); Touvron et al., "DeiT", ICML 2021 (S: 22 million); Li et al., "ViTDet",
ECCV 2022; Darcet et al., "Vision Transformers Need Registers", ICLR 2024; Xiao et al., "Early
Convolutions", NeurIPS 2021; Beyer et al., "Better plain ViT baselines", 2022 (mean of tokens);
Dehghani et al., "ViT-22B", ICML 2023 (parallel layers).
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.attention import AttentionKind, attend
from jaxbench.models.blocks.convolution import Conv, ConvNorm
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.norms import make_norm
from jaxbench.models.blocks.stack import Layers, Remat, Stack
from jaxbench.models.blocks.weights import Linear, constant, spread, weight

DTYPE = jnp.bfloat16
CHUNK = 128  # keys at a time in chunked attention: a TPU's lanes


@dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """Shape of the network.

    Attributes:
      patch: Edge of a patch in pixels; a power of two for the convolutional stem.
      grid: Rows and columns of patches that the table of positions has.
      stem: One convolution that cuts patches, or 3x3 convolutions of stride 2 and a 1x1.
      registers: Tokens of no place beside the class token.
      windows: Windows along each edge of the image in layers that are not global.
      order: Attention then feed-forward, or both from one norm and added.
      pool: What the classifier reads: the class token, or the mean of the image's tokens.
    """

    patch: int
    grid: tuple[int, int]
    num_layers: int
    embed_dim: int
    num_heads: int
    head_dim: int
    mlp_dim: int
    num_classes: int
    stem: Literal["patch", "conv"] = "patch"
    registers: Literal[0, 4] = 0
    windows: Literal[1, 2, 4] = 1
    order: Literal["serial", "parallel"] = "serial"
    pool: Literal["token", "mean"] = "token"
    norm: Literal["layer", "rms"] = "layer"
    activation: Literal["gelu", "gelu_tanh"] = "gelu"
    attention: AttentionKind = "einsum"
    layers: Layers = "scan"
    remat: Remat = "none"


class Embed(nnx.Module):
    """Image to tokens: class token and registers first, then patches, window after window."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        D, patch = config.embed_dim, config.patch
        self.grid, self.windows = config.grid, config.windows
        widths = (3,)
        if config.stem == "conv":
            num_convs, patch = patch.bit_length() - 1, 1
            widths = (3, *(D >> (num_convs - 1 - i) for i in range(num_convs)))
        self.stem = nnx.List(
            ConvNorm(num_in, num_out, kernel=(3, 3), stride=2, rngs=rngs)
            for num_in, num_out in itertools.pairwise(widths)
        )
        self.project = Conv(
            widths[-1],
            D,
            kernel=(patch, patch),
            stride=patch,
            padding="VALID",
            bias=True,
            rngs=rngs,
        )
        has_token, num_places = config.pool == "token", config.grid[0] * config.grid[1]
        self.positions = weight(rngs, (has_token + num_places, D), (None, "embed"), fan_in=D)
        self.token = constant((1, D), (None, "embed"), 0.0) if has_token else None
        registers = (config.registers, D)
        self.registers = (
            weight(rngs, registers, (None, "embed"), fan_in=D) if registers[0] else None
        )

    @jax.named_scope("embed")
    def __call__(self, images: Float[Array, "B I J 3"]) -> Float[Array, "B T D"]:
        x = images
        for conv in self.stem:
            x = conv(x)
        x = constrain(self.project(x), ("batch", None, None, None))
        table = self.positions[...].astype(x.dtype)
        num_places = self.grid[0] * self.grid[1]
        places = table[-num_places:].reshape(*self.grid, -1)
        if x.shape[1:] != places.shape:
            places = jax.image.resize(places, x.shape[1:], "linear")
        tokens = window_by_window(x + places[None], self.windows)
        prefix = []
        if self.token is not None:
            prefix.append(self.token[...].astype(x.dtype) + table[:1])
        if self.registers is not None:
            prefix.append(self.registers[...].astype(x.dtype))
        prefix = [jnp.broadcast_to(row[None], (x.shape[0], *row.shape)) for row in prefix]
        return jnp.concatenate([*prefix, tokens], axis=1)


def window_by_window(x: Float[Array, "B X Y D"], windows: int) -> Float[Array, "B T D"]:
    """Lists the tokens of an image window after window, each row by row."""
    B, X, Y, D = x.shape
    if X % windows or Y % windows:
        raise ValueError(f"{X} x {Y} patches do not divide into {windows} x {windows} windows.")
    x = x.reshape(B, windows, X // windows, windows, Y // windows, D)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, X * Y, D)


class SelfAttention(nnx.Module):
    """Attention over all tokens or within windows; one product makes queries, keys and values."""

    def __init__(self, config: ViTConfig, *, windows: int, rngs: nnx.Rngs) -> None:
        D, N, H = config.embed_dim, config.num_heads, config.head_dim
        self.kind: AttentionKind = config.attention
        self.num_windows = windows**2
        self.num_prefix = (config.pool == "token") + config.registers
        self.project = weight(rngs, (D, 3, N, H), ("embed", None, "heads", None), fan_in=D)
        self.project_bias = constant((3, N, H), (None, "heads", None), 0.0)
        self.out = weight(rngs, (N, H, D), ("heads", None, "embed"), fan_in=N * H)
        self.out_bias = constant((D,), (None,), 0.0)

    @jax.named_scope("attention")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        heads = jnp.einsum("BTD,DPNH->BTPNH", x, self.project[...].astype(x.dtype))
        heads = heads + self.project_bias[...].astype(x.dtype)[None, None]
        # Without this the partitioner may do all of attention on every device.
        heads = constrain(heads, ("batch", None, None, "heads", None))
        if self.num_windows > 1:
            heads = constrain(self._split(heads), ("batch", None, None, "heads", None))
        mixed = self._attend(heads[:, :, 0], heads[:, :, 1], heads[:, :, 2])
        if self.num_windows > 1:
            mixed = self._join(mixed)
        y = jnp.einsum("BTNH,NHD->BTD", mixed, self.out[...].astype(x.dtype))
        return y + spread(self.out_bias[...], y)

    def _split(self, heads: Float[Array, "B T P N H"]) -> Float[Array, "B2 T2 P N H"]:
        """Makes each window a sample, with the tokens of no place in each."""
        B, T, *rest = heads.shape
        size = (T - self.num_prefix) // self.num_windows
        tokens = heads[:, self.num_prefix :].reshape(B * self.num_windows, size, *rest)
        if not self.num_prefix:
            return tokens
        prefix = jnp.repeat(heads[:, : self.num_prefix], self.num_windows, axis=0)
        return jnp.concatenate([prefix, tokens], axis=1)

    def _join(self, mixed: Float[Array, "B2 T2 N H"]) -> Float[Array, "B T N H"]:
        """Puts windows one after another again; tokens of no place become the mean over them."""
        _, T, N, H = mixed.shape
        windows = mixed.reshape(-1, self.num_windows, T, N, H)
        tokens = windows[:, :, self.num_prefix :].reshape(windows.shape[0], -1, N, H)
        if not self.num_prefix:
            return tokens
        prefix = jnp.mean(windows[:, :, : self.num_prefix], axis=1)
        return jnp.concatenate([prefix, tokens], axis=1)

    def _attend(
        self, query: Float[Array, "B T N H"], key: Float[Array, "B T N H"], value: Any
    ) -> Float[Array, "B T N H"]:
        """Attends; for chunks, fills up the last one with keys that nothing sees."""
        if self.kind == "einsum":
            return attend(query, key, value)
        T = key.shape[1]
        missing = -T % CHUNK
        fill = ((0, 0), (0, missing), (0, 0), (0, 0))
        mask = (jnp.arange(T + missing) < T)[None, None]
        key, value = jnp.pad(key, fill), jnp.pad(value, fill)
        return attend(query, key, value, mask=mask, kind=self.kind, chunk=CHUNK)


class Layer(nnx.Module):
    """Attention and feed-forward beside a residual: one after the other, or both at once."""

    def __init__(self, config: ViTConfig, *, windows: int, rngs: nnx.Rngs) -> None:
        D = config.embed_dim
        self.attention_norm: Any = make_norm(config.norm, D)
        self.attention = SelfAttention(config, windows=windows, rngs=rngs)
        self.mlp_norm: Any = make_norm(config.norm, D) if config.order == "serial" else None
        self.mlp = FeedForward(
            D, config.mlp_dim, activation=config.activation, bias=True, rngs=rngs
        )

    @jax.named_scope("layer")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = constrain(x, ("batch", None, None))
        y = self.attention_norm(x)
        if self.mlp_norm is None:
            return x + self.attention(y) + self.mlp(y)
        x = x + self.attention(y)
        return x + self.mlp(self.mlp_norm(x))


class Group(nnx.Module):
    """Layers within windows, and then a global one."""

    def __init__(self, config: ViTConfig, num_layers: int, *, rngs: nnx.Rngs) -> None:
        def stack(windows: int, depth: int) -> Stack:
            make = functools.partial(_make_layer, config, windows)
            return Stack(make, depth, layers=config.layers, remat=config.remat, rngs=rngs)

        self.within, self.across = stack(config.windows, num_layers - 1), stack(1, 1)

    @jax.named_scope("group")
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.across(self.within(x))


def _make_layer(config: ViTConfig, windows: int, rngs: nnx.Rngs) -> Layer:
    return Layer(config, windows=windows, rngs=rngs)


def _make_stack(config: ViTConfig, *, rngs: nnx.Rngs) -> Stack:
    """Makes all layers: global ones, or groups of layers within windows and a global one."""
    if config.windows == 1:
        make = functools.partial(_make_layer, config, 1)
        return Stack(make, config.num_layers, layers=config.layers, remat=config.remat, rngs=rngs)
    # ViTDet has four global layers; a shallow network has fewer, each after one within windows.
    num_groups = min(4, config.num_layers // 2)
    if num_groups == 0 or config.num_layers % num_groups:
        raise ValueError(
            f"num_layers={config.num_layers} does not divide into groups of layers within windows "
            "and a global one. Use an even number below 8, or a multiple of 4."
        )
    size = config.num_layers // num_groups
    return Stack(
        lambda rngs: Group(config, size, rngs=rngs), num_groups, layers=config.layers, rngs=rngs
    )


class ViT(nnx.Module):
    """Tokens, layers, norm, and a class from one token or from their mean."""

    def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs) -> None:
        self.pool, self.num_prefix = config.pool, (config.pool == "token") + config.registers
        self.embed = Embed(config, rngs=rngs)
        self.stack = _make_stack(config, rngs=rngs)
        self.norm: Any = make_norm(config.norm, config.embed_dim)
        self.classify = Linear(config.embed_dim, config.num_classes, ("embed", None), rngs=rngs)

    @jax.named_scope("vit")
    def __call__(self, images: Float[Array, "B *cameras I J 3"]) -> Float[Array, "B *cameras K"]:
        images = constrain(images.astype(DTYPE), ("batch", *(None,) * (images.ndim - 1)))
        x = self.norm(self.stack(self.embed(images.reshape(-1, *images.shape[-3:]))))
        x = x[:, 0] if self.pool == "token" else jnp.mean(x[:, self.num_prefix :], axis=1)
        with jax.named_scope("head"):
            y = self.classify(x)
        return y.reshape(*images.shape[:-3], -1)


def build(config: ViTConfig, rngs: nnx.Rngs) -> ViT:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return ViT(config, rngs=rngs)


def loss(module: ViT, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of `labels`, one for each image of `images`."""
    return cross_entropy(module(batch["images"]), batch["labels"])


def _config(num_layers: int, embed_dim: int) -> ViTConfig:
    """Returns a published size at 224 x 224: heads of 64, feed-forward four times as wide."""
    return ViTConfig(
        patch=16,
        grid=(14, 14),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=embed_dim // 64,
        head_dim=64,
        mlp_dim=4 * embed_dim,
        num_classes=1000,
    )


def _workload(
    images: tuple[int, ...], num_classes: int, global_batch: int, learning_rate: float = 1e-3
) -> Workload:
    """Returns a training step on images [..., I, J], each with a label."""
    inputs = (
        ("images", Input(shape=(*images, 3))),
        ("labels", Input(shape=images[:-2], dtype="int32", high=num_classes)),
    )
    return Workload(global_batch=global_batch, inputs=inputs, learning_rate=learning_rate)


Change = tuple[str, str, Validity, dict[str, Any]]


def _changes(config: ViTConfig) -> tuple[Change, ...]:
    """Lists the variants of a base: name, what is replaced, class and changed fields."""
    wide = {"num_heads": config.num_heads // 2, "head_dim": 2 * config.head_dim}
    windows = {"windows": 2, "pool": "mean"}
    stem = {"stem": "conv", "num_layers": config.num_layers - 1}
    return (
        ("wideheads", "heads by half as many of twice the width", "T1", wide),
        ("mean", "the class token by the mean of tokens", "T1", {"pool": "mean"}),
        ("tanh", "exact GELU by its tanh form", "T1", {"activation": "gelu_tanh"}),
        ("rms", "layer norm by RMS norm", "T1", {"norm": "rms"}),
        ("windows", "attention and class token by windows and the mean of tokens", "T2", windows),
        ("registers", "nothing; four registers are added", "T2", {"registers": 4}),
        ("parallel", "attention then MLP by both at once", "T2", {"order": "parallel"}),
        ("convstem", "patches and one layer by a stem of 3x3 convolutions", "T2", stem),
        ("chunked", "attention by chunks of keys", "T0", {"attention": "chunked"}),
        ("rematdots", "kept activations by kept products", "T0", {"remat": "dots"}),
        ("rematfull", "kept activations by kept layer inputs", "T0", {"remat": "full"}),
    )


# Written out, twelve layers take seconds to trace and long to compile: shown at `cpu` alone.
_UNROLLED: Change = (
    "unrolled",
    "the loop over layers by layers written out",
    "T0",
    {"layers": "unroll"},
)
_GLOBAL: tuple[Change, ...] = (
    ("global", "windows by attention over the whole image", "T2", {"windows": 1}),
    (
        "chunked",
        "windows by attention over the whole image, by chunks of keys",
        "T2",
        {"windows": 1, "attention": "chunked"},
    ),
)


def _rivals(
    base: str,
    config: ViTConfig,
    workload: Workload,
    source: str,
    changes: tuple[Change, ...] = (),
) -> tuple[Candidate, ...]:
    """Returns the base and its variants."""
    root = Candidate(
        name=base,
        family="vit",
        size=base.split("-")[1],
        config=config,
        build=build,
        loss=loss,
        workload=workload,
        base=base,
        source=source,
    )
    stem = base.removesuffix("-base")
    variants = (
        dataclasses.replace(
            root,
            name=f"{stem}-{change}",
            config=dataclasses.replace(config, **fields),
            replaces=replaces,
            validity=validity,
        )
        for change, replaces, validity, fields in changes
    )
    return (root, *variants)


CPU = ViTConfig(
    patch=4,
    grid=(12, 12),
    num_layers=2,
    embed_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_classes=10,
)
S16, B16, L16 = _config(12, 384), _config(12, 768), _config(24, 1024)
FLEET = dataclasses.replace(L16, grid=(60, 80), windows=4, pool="mean", remat="full")

CPU_SOURCE = "no publication: ViT's parts, narrow and two layers deep, to step on two cores"
PAPER_SOURCE = "Dosovitskiy et al., ICLR 2021, table 1, at 224 x 224; the batch is ours"
S16_SOURCE = "Touvron et al., DeiT, ICML 2021, table 1, without distillation; the batch is ours"
FLEET_SOURCE = (
    "ViT-L/16 with four global layers as in Li et al., ViTDet, ECCV 2022; eight cameras of 960 x "
    "1280, windows of 15 x 20 tokens and the batch are ours"
)
_PAPER_WORK = _workload((224, 224), 1000, 512)

_CPU_CHANGES = (*_changes(CPU), _UNROLLED)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("vit-cpu-base", CPU, _workload((48, 48), 10, 8), CPU_SOURCE, _CPU_CHANGES),
    *_rivals("vit-paper-b16", B16, _PAPER_WORK, PAPER_SOURCE, _changes(B16)),
    *_rivals("vit-paper-s16", S16, _PAPER_WORK, S16_SOURCE),
    *_rivals("vit-paper-l16", L16, _PAPER_WORK, PAPER_SOURCE),
    *_rivals("vit-fleet-l16", FLEET, _workload((8, 960, 1280), 1000, 32), FLEET_SOURCE, _GLOBAL),
)
