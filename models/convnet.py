"""EfficientNet with MBConv blocks fused by stage: where does a dense convolution pay?

An MBConv block widens by a 1x1 convolution, filters each channel on its own (depthwise), gates the
channels (squeeze-excite) and projects back. A Fused-MBConv block widens and filters in one dense
convolution: several times the FLOPs. It stands in no stage, in stages 1-3, in 1-5 or in all seven.

EfficientNetV2's table 3 has these four rows for B4; `paper` applies them to B0, because B4's step
had not compiled for a TPU after six minutes of a core. The table leaves two details of the
fused block open; here
- it has squeeze-excite after the dense convolution, as figure 2 draws it;
- stage 3 goes from 5x5 to 3x3, stages 5 and 6 stay 5x5. At B4's size that gives 20.0, 43.2 and
  134.3 million parameters against the table's 20.0, 43.4 and 132.0; 3x3 everywhere would end at
  68.6 million.
Dropout and stochastic depth are left out: a step is deterministic. Batch norm's statistics are
those of the global batch.

Letters: `B` batch, `H` `W` image or feature map, `C` channels in, `F` channels out, `K` classes.
A `2` marks the edges that a layer puts out.

Sources: Tan and Le, "EfficientNetV2", ICML 2021, figure 2, table 3; Tan and Le, "EfficientNet",
ICML 2019, table 1 (B0: 5,288,548 parameters).
"""
# jaxtyping's dims are strings that are no expressions.
# ruff: noqa: F722

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.candidate import Candidate, Input, Workload, constrain

DTYPE = jnp.bfloat16


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvNetConfig:
    """Shape of the network; the tuples have one entry per stage.

    Attributes:
      stem: Channels after the first convolution.
      channels: Channels that a stage puts out.
      depths: Blocks in a stage.
      kernels: Edge of the depthwise kernel, or of the dense one where the stage is fused.
      strides: Stride of a stage's first block.
      expansions: Inner channels of a block over its input channels; at 1 MBConv does not widen.
      fused_stages: So many stages, from the first on, are Fused-MBConv.
      squeeze: Block input channels over squeeze-excite channels.
      head: Channels of the last convolution, before pooling.
      num_classes: Width of the classifier.
    """

    stem: int
    channels: tuple[int, ...]
    depths: tuple[int, ...]
    kernels: tuple[int, ...]
    strides: tuple[int, ...]
    expansions: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    fused_stages: Literal[0, 3, 5, 7] = 0
    squeeze: int = 4
    head: int
    num_classes: int


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm, and SiLU if `active`."""

    def __init__(
        self,
        num_in: int,
        num_out: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        depthwise: bool = False,
        active: bool = True,
        rngs: nnx.Rngs,
    ) -> None:
        self.active = active
        axes = (None, None, None if depthwise else "conv_in", "conv_out")
        self.conv = nnx.Conv(
            num_in,
            num_out,
            (kernel, kernel),
            strides=(stride, stride),
            feature_group_count=num_in if depthwise else 1,
            use_bias=False,
            dtype=DTYPE,
            kernel_init=nnx.with_partitioning(nnx.initializers.he_normal(), axes),
            rngs=rngs,
        )
        # Momentum and epsilon are EfficientNet's.
        self.norm = nnx.BatchNorm(
            num_out,
            momentum=0.99,
            epsilon=1e-3,
            dtype=DTYPE,
            scale_init=nnx.with_partitioning(nnx.initializers.ones_init(), ("conv_out",)),
            bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), ("conv_out",)),
            rngs=rngs,
        )

    @jax.named_scope("conv_norm")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        x = self.norm(self.conv(x), use_running_average=False)
        return nnx.silu(x) if self.active else x


class SqueezeExcite(nnx.Module):
    """Gates channels by a two-layer network of their mean over the image."""

    def __init__(self, num_channels: int, num_squeezed: int, *, rngs: nnx.Rngs) -> None:
        self.reduce = _linear(num_channels, num_squeezed, axes=("conv_in", None), rngs=rngs)
        self.expand = _linear(num_squeezed, num_channels, axes=(None, "conv_out"), rngs=rngs)

    @jax.named_scope("squeeze_excite")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        mean = jnp.mean(x, axis=(1, 2), keepdims=True)
        return x * nnx.sigmoid(self.expand(nnx.silu(self.reduce(mean))))


class MBConv(nnx.Module):
    """Inverted bottleneck: widen and filter, gate, project; residual where the shape stays."""

    def __init__(self, config: ConvNetConfig, stage: int, depth: int, *, rngs: nnx.Rngs) -> None:
        num_out = config.channels[stage]
        num_in = num_out if depth else (config.stem, *config.channels)[stage]
        num_inner = num_in * config.expansions[stage]
        stride = 1 if depth else config.strides[stage]
        fused = stage < config.fused_stages
        widen = not fused and num_inner != num_in
        self.residual = stride == 1 and num_in == num_out
        self.widen = ConvNorm(num_in, num_inner, rngs=rngs) if widen else None
        self.filter = ConvNorm(
            num_in if fused else num_inner,
            num_inner,
            kernel=config.kernels[stage],
            stride=stride,
            depthwise=not fused,
            rngs=rngs,
        )
        # The gate's width follows the block's input, not the widened channels.
        self.gate = SqueezeExcite(num_inner, max(1, num_in // config.squeeze), rngs=rngs)
        self.project = ConvNorm(num_inner, num_out, active=False, rngs=rngs)

    @jax.named_scope("mbconv")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        y = x if self.widen is None else self.widen(x)
        y = self.project(self.gate(self.filter(y)))
        return x + y if self.residual else y


class Stage(nnx.Module):
    """Blocks of one width, unrolled; the first one may stride."""

    def __init__(self, config: ConvNetConfig, stage: int, *, rngs: nnx.Rngs) -> None:
        depths = range(config.depths[stage])
        self.blocks = nnx.List([MBConv(config, stage, depth, rngs=rngs) for depth in depths])

    @jax.named_scope("stage")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H2 W2 F"]:
        for block in self.blocks:
            x = block(x)
        return constrain(x, ("batch", None, None, None))


class Head(nnx.Module):
    """Last convolution, mean over the image, classifier."""

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs) -> None:
        self.conv = ConvNorm(config.channels[-1], config.head, rngs=rngs)
        self.classify = _linear(config.head, config.num_classes, axes=("embed", None), rngs=rngs)

    @jax.named_scope("head")
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        return self.classify(jnp.mean(self.conv(x), axis=(1, 2)))


class ConvNet(nnx.Module):
    """Stem, seven stages, head."""

    def __init__(self, config: ConvNetConfig, *, rngs: nnx.Rngs) -> None:
        self.stem = ConvNorm(3, config.stem, kernel=3, stride=2, rngs=rngs)
        stages = range(len(config.channels))
        self.stages = nnx.List([Stage(config, stage, rngs=rngs) for stage in stages])
        self.head = Head(config, rngs=rngs)

    @jax.named_scope("convnet")
    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B K"]:
        images = constrain(images, ("batch", None, None, None))
        with jax.named_scope("stem"):
            x = self.stem(images)
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def _linear(
    num_in: int, num_out: int, *, axes: tuple[str | None, str | None], rngs: nnx.Rngs
) -> nnx.Linear:
    """Returns a biased linear layer whose parameters carry `axes`."""
    return nnx.Linear(
        num_in,
        num_out,
        dtype=DTYPE,
        kernel_init=nnx.with_partitioning(nnx.initializers.lecun_normal(), axes),
        bias_init=nnx.with_partitioning(nnx.initializers.zeros_init(), axes[1:]),
        rngs=rngs,
    )


def build(config: ConvNetConfig, rngs: nnx.Rngs) -> ConvNet:
    """Builds the network; works abstractly under `nnx.eval_shape`."""
    return ConvNet(config, rngs=rngs)


def loss(module: ConvNet, batch: dict[str, Any]) -> Float[Array, ""]:
    """Computes the mean softmax cross entropy, in float32, of `images` against `labels`."""
    log_probs = jax.nn.log_softmax(module(batch["images"]).astype(jnp.float32))
    picked = log_probs * jax.nn.one_hot(batch["labels"], log_probs.shape[-1])
    return -jnp.mean(jnp.sum(picked, axis=-1))


CPU = ConvNetConfig(
    stem=8,
    channels=(8, 8, 16, 16, 24, 32, 32),
    depths=(1, 1, 1, 1, 1, 1, 1),
    kernels=(3, 3, 5, 3, 5, 5, 3),
    strides=(1, 2, 2, 2, 1, 2, 1),
    head=64,
    num_classes=10,
)
PAPER = ConvNetConfig(
    stem=32,
    channels=(16, 24, 40, 80, 112, 192, 320),
    depths=(1, 2, 2, 3, 3, 4, 1),
    kernels=(3, 3, 5, 3, 5, 5, 3),
    strides=(1, 2, 2, 2, 1, 2, 1),
    head=1280,
    num_classes=1000,
)


def _rivals(size: str, config: ConvNetConfig, workload: Workload, source: str) -> list[Candidate]:
    """Returns the table's four rows at one size."""
    rivals = []
    for change, fused in (("mbconv", 0), ("fused13", 3), ("fused15", 5), ("fusedall", 7)):
        kernels = (3, 3, 3, 3, 5, 5, 3) if fused else config.kernels
        rivals.append(
            Candidate(
                name=f"convnet-{size}-{change}",
                family="convnet",
                size=size,
                config=dataclasses.replace(config, fused_stages=fused, kernels=kernels),
                build=build,
                loss=loss,
                workload=workload,
                base=f"convnet-{size}-mbconv",
                replaces=f"MBConv with Fused-MBConv in stages 1-{fused}" if fused else "",
                validity="T2" if fused else "base",
                source=source,
            )
        )
    return rivals


def _workload(edge: int, num_classes: int, global_batch: int) -> Workload:
    """Returns a training step on square images of `edge` pixels."""
    images = Input(shape=(edge, edge, 3))
    labels = Input(shape=(), dtype="int32", high=num_classes)
    return Workload(global_batch=global_batch, inputs=(("images", images), ("labels", labels)))


CPU_SOURCE = "EfficientNet's stages, narrow and one block deep, to step on two cores"
PAPER_SOURCE = (
    "Tan and Le, EfficientNet, ICML 2019: B0 at 224x224; fused stages as in EfficientNetV2, ICML "
    "2021, table 3, which has them for B4; the batch is ours"
)

CANDIDATES: tuple[Candidate, ...] = (
    *_rivals("cpu", CPU, _workload(48, 10, 8), CPU_SOURCE),
    *_rivals("paper", PAPER, _workload(224, 1000, 512), PAPER_SOURCE),
)
