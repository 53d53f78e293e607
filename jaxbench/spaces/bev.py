"""Networks around a camera-to-map network that trains here: widths, depths, strides, lift.

The question stays the same: images of six cameras in, a map of one class out. The count of
parameters and FLOPs may go down to half, and up by a tenth; whether a smaller network drives as
well is for `jaxbench quality` to say. The receptive field of a pixel of the last camera feature map
must not shrink by more than a quarter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.candidate import Candidate
from jaxbench.models import bev
from jaxbench.search import Array, Band, Block, Choice, Space

BASE = next(one for one in bev.CANDIDATES if one.name == "bev-drive-gather")


class Stem(nnx.Module):
    """A convolution with norm, and its rectifier."""

    def __init__(self, rngs: nnx.Rngs, **shape: int) -> None:
        self.conv = bev.ConvNorm(shape.pop("num_in"), shape.pop("num_out"), rngs=rngs, **shape)

    @jax.named_scope("stem")
    def __call__(self, x: Any) -> Any:
        return nnx.relu(self.conv(x))


class CameraHead(nnx.Module):
    """Features to depth and context, the end of `bev.CameraEncoder`."""

    def __init__(self, rngs: nnx.Rngs, *, num_in: int, num_bins: int, context: int, cameras: int):
        self.head = bev.pointwise(num_in, num_bins + context, rngs=rngs)
        self.num_bins, self.cameras = num_bins, cameras

    @jax.named_scope("camera_head")
    def __call__(self, x: Any) -> Any:
        x = self.head(x).reshape(-1, self.cameras, *x.shape[1:3], self.head.out_features)
        depth = jax.nn.softmax(x[..., : self.num_bins].astype(jnp.float32))
        return depth.astype(bev.DTYPE), x[..., self.num_bins :]


class Lift(nnx.Module):
    """One of the lifts; no parameters."""

    def __init__(self, rngs: nnx.Rngs, *, config: Any, edge: int) -> None:
        self.config, self.edge = bev.BevConfig(**config), edge

    def __call__(self, depth: Any, context: Any) -> Any:
        cells = bev.rig_cells(
            self.config, num_cameras=depth.shape[1], num_columns=depth.shape[3], edge=self.edge
        )
        lifted = bev.LIFTS[self.config.lift](depth, context, cells, self.edge * self.edge)
        return lifted.reshape(-1, self.edge, self.edge, lifted.shape[-1])


class Map(nnx.Module):
    """The end of `bev.BevEncoder`, with the loss."""

    def __init__(self, rngs: nnx.Rngs, *, skip: int, top: int) -> None:
        self.merge = bev.ConvNorm(skip + top, top, rngs=rngs)
        self.refine = bev.ConvNorm(top, top // 2, rngs=rngs)
        self.head = bev.pointwise(top // 2, 1, rngs=rngs)

    @jax.named_scope("map")
    def __call__(self, skip: Any, x: Any, labels: Any) -> Any:
        x = jnp.concatenate([skip, bev.enlarge(x, skip.shape[1] // x.shape[1])], axis=-1)
        x = bev.enlarge(nnx.relu(self.merge(x)), 2)
        logits = self.head(nnx.relu(self.refine(x)))[..., 0].astype(jnp.float32)
        wanted = labels.astype(jnp.float32)
        return jnp.mean(jax.nn.softplus(logits) - logits * wanted)


def blocks(candidate: Candidate) -> Iterator[Block]:
    """Lists the blocks of a network's step, from the images to the loss."""
    config, inputs = candidate.config, dict(candidate.workload.inputs)
    cameras, height, width, _ = inputs["images"].shape
    edge, batch = inputs["labels"].shape[0], candidate.workload.global_batch
    images = batch * cameras
    yield Block(
        kind="camera stem",
        build=Stem,
        arguments={"num_in": 3, "num_out": config.stem, "stride": 2},
        inputs=(Array(shape=(images, height, width, 3), dtype="float32", gradient=False),),
    )
    size, last = (height // 2, width // 2), config.stem
    for num_out, depth in zip(config.camera_channels, config.camera_depths, strict=True):
        yield from _stage("camera block", images, size, last, num_out, depth, stride=2)
        size, last = (-(-size[0] // 2), -(-size[1] // 2)), num_out
    yield Block(
        kind="camera head",
        build=CameraHead,
        arguments={
            "num_in": last,
            "num_bins": config.num_bins,
            "context": config.context,
            "cameras": cameras,
        },
        inputs=(Array(shape=(images, *size, last)),),
    )
    geometry = {
        name: getattr(config, name)
        for name in ("lift", "num_bins", "nearest_m", "bin_m", "fov_degrees", "extent_m", "context")
    }
    unused = {
        "stem": 0,
        "camera_channels": (),
        "camera_depths": (),
        "bev_channels": (),
        "bev_depths": (),
    }
    yield Block(
        kind=f"lift by {config.lift}",
        build=Lift,
        arguments={"config": {**geometry, **unused}, "edge": edge},
        inputs=(
            Array(shape=(batch, cameras, *size, config.num_bins)),
            Array(shape=(batch, cameras, *size, config.context)),
        ),
    )
    first, top = config.bev_channels[0], config.bev_channels[-1]
    yield Block(
        kind="map stem",
        build=Stem,
        arguments={"num_in": config.context, "num_out": first, "kernel": 7, "stride": 2},
        inputs=(Array(shape=(batch, edge, edge, config.context)),),
    )
    half, last = edge // 2, first
    skip, stride = half, 1
    for num_out, depth in zip(config.bev_channels, config.bev_depths, strict=True):
        yield from _stage("map block", batch, (half, half), last, num_out, depth, stride=stride)
        half, last, stride = half // stride, num_out, 2
    yield Block(
        kind="map head",
        build=Map,
        arguments={"skip": first, "top": top},
        inputs=(
            Array(shape=(batch, skip, skip, first)),
            Array(shape=(batch, half, half, top)),
            Array(shape=(batch, edge, edge), dtype="int32"),
        ),
    )


def _stage(
    kind: str,
    images: int,
    size: tuple[int, int],
    num_in: int,
    num_out: int,
    depth: int,
    *,
    stride: int,
) -> Iterator[Block]:
    """Yields the first block of a stage, which strides, and the others, which do not."""

    def block(num_in: int, size: tuple[int, int], stride: int, count: int) -> Block:
        return Block(
            kind=kind,
            build=_residual,
            arguments={"num_in": num_in, "num_out": num_out, "stride": stride},
            inputs=(Array(shape=(images, *size, num_in)),),
            count=count,
        )

    yield block(num_in, size, stride, 1)
    if depth > 1:
        yield block(num_out, (-(-size[0] // stride), -(-size[1] // stride)), 1, depth - 1)


def _residual(rngs: nnx.Rngs, *, num_in: int, num_out: int, stride: int) -> Any:
    return bev.ResidualBlock(num_in, num_out, stride=stride, rngs=rngs)


def receptive_field(candidate: Candidate) -> float:
    """Pixels along an edge that a pixel of the last camera feature map sees.

    Grows by (kernel - 1) x the product of the strides before it, layer by layer.
    """
    field, jump = 3, 2
    for depth in candidate.config.camera_depths:
        field += 2 * jump  # the first convolution of the stage, which strides
        jump *= 2
        field += 2 * jump * (2 * depth - 1)
    return float(field)


SPACE = Space(
    name="bev",
    base=BASE,
    choices=(
        Choice("lift", ("segment_sum", "gather", "product"), validity="T0"),
        Choice("stem", (2, 4, 6, 8)),
        Choice("camera_channels.0", (2, 4, 6, 8, 12)),
        Choice("camera_channels.1", (4, 6, 8, 12, 16, 24)),
        Choice("camera_depths.0", (1, 2, 3)),
        Choice("camera_depths.1", (1, 2, 3)),
        Choice("context", (2, 4, 6, 8, 12)),
        Choice("bev_channels.0", (2, 4, 6, 8, 12)),
        Choice("bev_channels.1", (4, 8, 12, 16, 24)),
        Choice("bev_depths.0", (1, 2, 3)),
        Choice("bev_depths.1", (1, 2, 3)),
    ),
    bands=(
        Band("num_params", 0.5, 1.1),
        Band("forward_flops", 0.5, 1.1),
        Band("activation_bytes", 0.0, 1.2),
        Band("receptive_field", 0.75),
    ),
    measures={"receptive_field": receptive_field},
    layout="data",
    blocks=blocks,
)
