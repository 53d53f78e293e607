"""NFNet: residual networks without normalisation, and what may stand in its places.

A convolution's weights are standardised over their fan-in instead of its outputs over the batch;
every activation is scaled so that it keeps the variance; a block sees its input divided by the
deviation expected there, and adds alpha times its result. Blocks are pre-activation bottlenecks
with two grouped 3x3 convolutions, squeeze-excite and a gain that starts at zero. Dropout,
stochastic depth and adaptive gradient clipping (the optimiser's) are left out. GELU is the tanh
form, as in the authors' code. A stage's blocks but the first are a loop; the deviations expected in
them differ and are variables that nothing trains.

What may be put in place of its parts, openly:
- Batch norm after each convolution stands for standardised weights, everywhere but in the stem;
  scaled activations and expected deviations stay, so it is no ResNet.
- Groups of half the width halve the FLOPs and parameters of the 3x3 convolutions.

Letters: `B` batch, `I` `J` rows and columns of an image, `H` `W` of features, `C` channels in, `F`
channels out, `K` classes. A `2` marks the edges that a layer puts out.

Sources: Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization", ICML
2021, figure 2, tables 1 and 7 (F0, F1, F3, F5: 71.5, 132.6, 254.9 and 377.2 million parameters; F0
12.38 GFLOPs, multiply-adds at 256); Brock et al., "Characterizing signal propagation", ICLR 2021
(scaled standardisation, gamma).
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Validity, Workload, constrain
from jaxbench.models.blocks.convolution import ConvNorm
from jaxbench.models.blocks.feedforward import ACTIVATIONS
from jaxbench.models.blocks.losses import cross_entropy
from jaxbench.models.blocks.stack import Stack
from jaxbench.models.blocks.weights import Linear, constant, spread

DTYPE = jnp.bfloat16

# 1 / deviation of the activation of a standard normal. Source: Brock et al., ICLR 2021, and the
# authors' code.
GAMMA = {"gelu_tanh": 1.7015043497, "silu": 1.7881293297, "relu": 1.7139588594}


class Deviation(nnx.Variable):
    """A number of a block that is known from its place and is not trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NFNetConfig:
    """Shape of the network; the tuples have one entry per stage.

    Attributes:
      stem: Channels of the last of the stem's four convolutions; each before has half as many.
      channels: Channels that a stage puts out; blocks are half as wide inside.
      depths: Blocks in a stage; the first one has stride 2, but for the first stage's.
      group: Channels that a grouped convolution mixes.
      alpha: Weight of a block's result beside its input.
      weights: Standardised, or plain with batch norm after the convolution.
      gate: Squeeze-excite, at half the channels, or nothing.
    """

    stem: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    group: int
    num_classes: int
    alpha: float = 0.2
    weights: Literal["standardised", "batch"] = "standardised"
    activation: Literal["gelu_tanh", "silu", "relu"] = "gelu_tanh"
    gate: Literal["squeeze_excite", "none"] = "squeeze_excite"


@jax.jit  # convolutions of one shape, of which there are many, are traced once
@jax.named_scope("standardise")
def standardise(
    kernel: Float[Array, "_ _ C F"], gain: Float[Array, " F"]
) -> Float[Array, "_ _ C F"]:
    """Computes gain * (w - mean) / (deviation * sqrt(fan_in)), by output channel."""
    fan_in = kernel.size // kernel.shape[-1]
    mean = jnp.mean(kernel, axis=(0, 1, 2), keepdims=True)
    variance = jnp.mean(jnp.square(kernel - mean), axis=(0, 1, 2), keepdims=True)
    factor = jax.lax.rsqrt(jnp.maximum(variance * fan_in, 1e-4))
    return (kernel - mean) * factor * spread(gain, kernel)


class WSConv(nnx.Module):
    """Convolution with standardised weights and a bias.

    Args:
      sharded: Give the output channels their logical axis; never if grouped, as in `Conv`.
    """

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        edge: int = 1,
        stride: int = 1,
        groups: int = 1,
        sharded: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.stride, self.groups = stride, groups
        out = "conv_out" if sharded and groups == 1 else None
        axes = (None, None, "conv_in" if groups == 1 else None, out)
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), axes)
        shape = (edge, edge, num_in // groups, num_out)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.gain = constant((num_out,), (out,), 1.0)
        self.bias = constant((num_out,), (out,), 0.0)

    @jax.named_scope("ws_conv")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = jax.lax.conv_general_dilated(
            x,
            standardise(self.kernel[...], self.gain[...]).astype(x.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return y + spread(self.bias[...], y)


class ScaledActivation(nnx.Module):
    """gamma * act(x), which has variance 1 where x is standard normal."""

    def __init__(self, config: NFNetConfig) -> None:
        self.activation = config.activation

    @jax.named_scope("activation")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return GAMMA[self.activation] * ACTIVATIONS[self.activation](x)


class SqueezeExcite(nnx.Module):
    """Multiplies channels by twice a gate, made of their mean over the image by two layers."""

    def __init__(self, num_channels: int, *, rngs: nnx.Rngs) -> None:
        hidden = num_channels // 2
        self.reduce = Linear(num_channels, hidden, ("embed", "mlp"), rngs=rngs)
        self.expand = Linear(hidden, num_channels, ("mlp", "embed"), rngs=rngs)

    @jax.named_scope("squeeze_excite")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * (2 * nnx.sigmoid(self.expand(nnx.relu(self.reduce(mean)))))


class Stem(nnx.Module):
    """Four 3x3 convolutions with activations between, of stride 4 in all."""

    def __init__(self, config: NFNetConfig, *, rngs: nnx.Rngs) -> None:
        widths = (3, *(config.stem // part for part in (8, 4, 2, 1)))
        self.act = ScaledActivation(config)
        self.convs = nnx.List(
            # The first are narrower than there are devices.
            WSConv(num_in, num_out, edge=3, stride=stride, sharded=False, rngs=rngs)
            for num_in, num_out, stride in zip(widths[:-1], widths[1:], (2, 1, 1, 2), strict=True)
        )

    @jax.named_scope("stem")
    def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B H2 W2 F"]:
        first, *others = self.convs
        x = first(x)
        for conv in others:
            x = conv(self.act(x))
        return x


class Block(nnx.Module):
    """shortcut + alpha * gain * gate(bottleneck(act(x) / deviation)).

    The shortcut is x, or where the shape changes a 1x1 convolution of act(x) / deviation, after a
    mean over 2x2 pixels if the block has stride 2.
    """

    def __init__(
        self, config: NFNetConfig, num_in: int, num_out: int, *, stride: int = 1, rngs: nnx.Rngs
    ) -> None:
        groups = max(1, num_out // 2 // config.group)
        inner = groups * config.group
        self.alpha, self.stride = config.alpha, stride
        self.act = ScaledActivation(config)
        self.deviation = Deviation(jnp.ones((1,), jnp.float32))
        changes = stride > 1 or num_in != num_out
        self.shortcut: Any = _conv(config, num_in, num_out, rngs=rngs) if changes else None
        self.convs = nnx.List(
            [
                _conv(config, num_in, inner, rngs=rngs),
                _conv(config, inner, inner, edge=3, stride=stride, groups=groups, rngs=rngs),
                _conv(config, inner, inner, edge=3, groups=groups, rngs=rngs),
                _conv(config, inner, num_out, rngs=rngs),
            ]
        )
        gated = config.gate == "squeeze_excite"
        self.gate = SqueezeExcite(num_out, rngs=rngs) if gated else None
        self.gain = constant((1,), (None,), 0.0)

    @jax.named_scope("block")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = constrain(x, ("batch", None, None, None))
        y = self.act(x) * spread(1 / self.deviation[...], x)
        shortcut = x
        if self.shortcut is not None:
            shortcut = self.shortcut(_mean_of_four(y) if self.stride > 1 else y)
        first, *others = self.convs
        y = first(y)
        for conv in others:
            y = conv(self.act(y))
        if self.gate is not None:
            y = self.gate(y)
        return shortcut + y * spread(self.alpha * self.gain[...], y)


def _conv(
    config: NFNetConfig,
    num_in: int,
    num_out: int,
    *,
    edge: int = 1,
    stride: int = 1,
    groups: int = 1,
    rngs: nnx.Rngs,
) -> Any:
    """Makes a convolution with standardised weights, or one with batch norm."""
    if config.weights == "standardised":
        return WSConv(num_in, num_out, edge=edge, stride=stride, groups=groups, rngs=rngs)
    return ConvNorm(
        num_in,
        num_out,
        kernel=(edge, edge),
        stride=stride,
        groups=groups,
        activation=None,
        rngs=rngs,
    )


def _mean_of_four(x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 C"]:
    B, H, W, C = x.shape
    return jnp.mean(x.reshape(B, H // 2, 2, W // 2, 2, C), axis=(2, 4))


def expected_deviations(
    depths: tuple[int, ...], alpha: float
) -> tuple[Float[np.ndarray, " L"], ...]:
    """Computes the deviation of each block's input, by stage, where convolutions keep variance.

    A block adds alpha^2 to the variance of its shortcut: its input's, but 1 in a stage's first
    block, whose shortcut is a convolution of normalised values. The stem puts out variance 1.
    Gains count as 1, although they start at 0.
    """
    variance, stages = 1.0, []
    for depth in depths:
        inputs = []
        for block in range(depth):
            inputs.append(variance)
            variance = (variance if block else 1.0) + alpha**2
        stages.append(np.sqrt(np.array(inputs, np.float32)))
    return tuple(stages)


class Stage(nnx.Module):
    """Blocks of one width: the first one by itself, the others as a loop."""

    def __init__(self, config: NFNetConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        num_in, num_out = (config.stem, *config.channels)[stage : stage + 2]
        deviations = jnp.asarray(expected_deviations(config.depths, config.alpha)[stage])
        self.first = Block(config, num_in, num_out, stride=1 if stage == 0 else 2, rngs=rngs)
        self.first.deviation[...] = deviations[:1]
        others = None
        if len(deviations) > 1:
            others = Stack(
                lambda rngs: Block(config, num_out, num_out, rngs=rngs),
                len(deviations) - 1,
                rngs=rngs,
            )
            others.layers.deviation[...] = deviations[1:, None]
        self.others = others

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.first(x)
        return x if self.others is None else self.others(x)


class NFNet(nnx.Module):
    """Stem, stages, a last convolution of twice the width, mean over the image, classifier."""

    def __init__(self, config: NFNetConfig, *, rngs: nnx.Rngs) -> None:
        width = config.channels[-1]
        self.stem = Stem(config, rngs=rngs)
        stages = range(len(config.channels))
        self.stages = nnx.List([Stage(config, stage, rngs=rngs) for stage in stages])
        self.last = _conv(config, width, 2 * width, rngs=rngs)
        self.act = ScaledActivation(config)
        self.classify = Linear(2 * width, config.num_classes, ("embed", None), rngs=rngs)

    @jax.named_scope("nfnet")
    def __call__(self, images: Float[Array, "B I J 3"]) -> Float[Array, "B K"]:
        images = constrain(images.astype(DTYPE), ("batch", None, None, None))
        x = self.stem(images)
        for stage in self.stages:
            x = constrain(stage(x), ("batch", None, None, None))
        with jax.named_scope("head"):
            x = self.act(self.last(x))
            return self.classify(jnp.mean(x, axis=(1, 2)))


def build(config: NFNetConfig, rngs: nnx.Rngs) -> NFNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return NFNet(config, rngs=rngs)


def loss(module: NFNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean cross entropy of `labels` for `images`."""
    return cross_entropy(module(batch["images"]), batch["labels"])


def _config(factor: int) -> NFNetConfig:
    """Returns F0, F1, F2 ... for 1, 2, 3 ...: the published depths are multiples of F0's."""
    return NFNetConfig(
        stem=128,
        channels=(256, 512, 1536, 1536),
        depths=(factor, 2 * factor, 6 * factor, 3 * factor),
        group=128,
        num_classes=1000,
    )


def _workload(
    edge: int, num_classes: int, global_batch: int, learning_rate: float = 1e-3
) -> Workload:
    """Returns a training step on square images of `edge` pixels."""
    inputs = (
        ("images", Input(shape=(edge, edge, 3))),
        ("labels", Input(shape=(), dtype="int32", high=num_classes)),
    )
    return Workload(global_batch=global_batch, inputs=inputs, learning_rate=learning_rate)


Change = tuple[str, str, Validity, dict[str, Any]]


def _changes(config: NFNetConfig) -> tuple[Change, ...]:
    """Lists the variants of a base: name, what is replaced, class and changed fields."""
    group = config.group // 2
    return (
        ("silu", "GELU by SiLU", "T1", {"activation": "silu"}),
        ("relu", "GELU by ReLU", "T1", {"activation": "relu"}),
        ("bn", "standardised weights by batch norm", "T2", {"weights": "batch"}),
        ("halfgroup", f"groups of {config.group} by groups of {group}", "T2", {"group": group}),
        ("nose", "squeeze-excite by nothing", "T2", {"gate": "none"}),
    )


def _rivals(
    base: str,
    config: NFNetConfig,
    workload: Workload,
    source: str,
    changes: tuple[Change, ...] = (),
) -> tuple[Candidate, ...]:
    """Returns the base and its variants."""
    root = Candidate(
        name=base,
        family="nfnet",
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


CPU = NFNetConfig(stem=32, channels=(32, 64), depths=(1, 1), group=16, num_classes=10)
F0, F1, F3, F5 = _config(1), _config(2), _config(4), _config(6)

CPU_SOURCE = "no publication: NFNet's parts, narrow and two stages deep, to step on two cores"
PAPER_SOURCE = (
    "Brock et al., NFNets, ICML 2021, table 1, at the published training resolution; the batch is "
    "ours"
)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("nfnet-cpu-base", CPU, _workload(32, 10, 8, 3e-3), CPU_SOURCE, _changes(CPU)),
    *_rivals("nfnet-paper-f0", F0, _workload(192, 1000, 512), PAPER_SOURCE, _changes(F0)),
    *_rivals("nfnet-paper-f1", F1, _workload(224, 1000, 512), PAPER_SOURCE),
    *_rivals("nfnet-paper-f3", F3, _workload(320, 1000, 512), PAPER_SOURCE),
    *_rivals("nfnet-fleet-f5", F5, _workload(416, 1000, 256), PAPER_SOURCE),
)
