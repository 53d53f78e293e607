"""Necks that mix a backbone's maps: top-down sums, or weighted sums down and up again.

Maps go from fine to coarse, each half as large as the one before.

Letters: `B` batch, `H` `W` a map's edges, `C` channels.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbench.models.blocks.convolution import Conv, ConvNorm, upsample
from jaxbench.models.blocks.weights import Linear, constant

NeckKind = Literal["bifpn", "fpn"]
Maps = list[Float[Array, "B _ _ _"]]


class Fuse(nnx.Module):
    """Sum of maps by learnt shares, w_i / (sum of w + 1e-4), then a separable convolution.

    Source: Tan et al., "EfficientDet", CVPR 2020, "fast normalized fusion"; group norm is ours.
    """

    def __init__(self, dim: int, num_maps: int, *, rngs: nnx.Rngs) -> None:
        self.shares = constant((num_maps,), (None,), 1.0)
        self.depthwise = Conv(dim, dim, kernel=(3, 3), groups=dim, rngs=rngs)
        self.pointwise = ConvNorm(dim, dim, norm="group", activation=nnx.silu, rngs=rngs)

    @jax.named_scope("fuse")
    def __call__(self, *maps: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shares = nnx.relu(self.shares[...])
        shares = (shares / (jnp.sum(shares) + 1e-4)).astype(maps[0].dtype)
        mixed = shares[0] * maps[0]
        for i in range(1, len(maps)):
            mixed = mixed + shares[i] * maps[i]
        return self.pointwise(self.depthwise(mixed))


class BiFpn(nnx.Module):
    """One round: fuses from the coarsest map down to the finest, then up again.

    Source: Tan et al., "EfficientDet", CVPR 2020, figure 2d.
    """

    def __init__(self, dim: int, num_maps: int, *, rngs: nnx.Rngs) -> None:
        ups = [2 if index == num_maps - 1 else 3 for index in range(1, num_maps)]
        self.down = nnx.List([Fuse(dim, 2, rngs=rngs) for _ in ups])
        self.up = nnx.List([Fuse(dim, num, rngs=rngs) for num in ups])

    @jax.named_scope("bifpn")
    def __call__(self, maps: Maps) -> Maps:
        last = len(maps) - 1
        inner = list(maps)
        for i in reversed(range(last)):
            inner[i] = self.down[i](maps[i], upsample(inner[i + 1]))
        outer = inner[:1]
        for i in range(1, last + 1):
            below = nnx.max_pool(outer[-1], (3, 3), strides=(2, 2), padding="SAME")
            given = (maps[i], below) if i == last else (maps[i], inner[i], below)
            outer.append(self.up[i - 1](*given))
        return outer


class Fpn(nnx.Module):
    """Adds each coarser map to the next finer one, then a dense 3x3 convolution of each.

    Source: Lin et al., "Feature Pyramid Networks", CVPR 2017.
    """

    def __init__(self, dim: int, num_maps: int, *, rngs: nnx.Rngs) -> None:
        self.smooth = nnx.List(
            [ConvNorm(dim, dim, kernel=(3, 3), norm="group", rngs=rngs) for _ in range(num_maps)]
        )

    @jax.named_scope("fpn")
    def __call__(self, maps: Maps) -> Maps:
        inner = list(maps)
        for i in reversed(range(len(maps) - 1)):
            inner[i] = maps[i] + upsample(inner[i + 1])
        return [smooth(x) for smooth, x in zip(self.smooth, inner, strict=True)]


class Neck(nnx.Module):
    """Brings maps to one width, mixes them, and sums their means at the coarsest resolution.

    Args:
      num_rounds: Rounds of `bifpn`; `fpn` makes one.
    """

    def __init__(
        self,
        num_in: tuple[int, ...],
        dim: int,
        *,
        kind: NeckKind,
        num_rounds: int,
        rngs: nnx.Rngs,
    ) -> None:
        axes = ("conv_in", "conv_out")
        self.lateral = nnx.List([Linear(num, dim, axes, rngs=rngs) for num in num_in])
        make: Any = BiFpn if kind == "bifpn" else Fpn
        num_rounds = num_rounds if kind == "bifpn" else 1
        self.rounds = nnx.List([make(dim, len(num_in), rngs=rngs) for _ in range(num_rounds)])

    @jax.named_scope("neck")
    def __call__(self, maps: Maps) -> Float[Array, "B H W C"]:
        maps = [lateral(x) for lateral, x in zip(self.lateral, maps, strict=True)]
        for mix in self.rounds:
            maps = mix(maps)
        mixed = maps[-1]
        for step, x in enumerate(reversed(maps[:-1]), start=1):
            window = (2**step, 2**step)
            mixed = mixed + nnx.avg_pool(x, window, strides=window)
        return mixed
