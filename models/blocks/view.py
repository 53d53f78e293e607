"""Attention of a bird's-eye raster to the cameras of a fixed rig: level, evenly spaced yaws.

Letters: `B` batch, `N` cameras, `H` `W` rows and columns of features, `S` tokens of a camera, `C`
channels in, `X` `Y` the raster's edges (forward, left), `Q` its cells, `D` model, `G` heads, `E` a
head's width.

Source: Tesla AI Day, 2021: positions of a raster through an MLP are the queries, all cameras' image
features the keys. The encoding of rays is ours.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxbench.candidate import constrain
from jaxbench.models.blocks.attention import AttentionKind, attend
from jaxbench.models.blocks.feedforward import FeedForward
from jaxbench.models.blocks.norms import LayerNorm
from jaxbench.models.blocks.positions import waves
from jaxbench.models.blocks.stack import Remat, Stack
from jaxbench.models.blocks.weights import Linear, weight

NUM_WAVES = 6


def raster_positions(edge: int) -> Float[np.ndarray, "Q 2"]:
    """Computes forward and left of the raster's cells, row by row, between -1 and 1."""
    centre = (2 * np.arange(edge, dtype=np.float32) + 1) / edge - 1
    forward, left = np.meshgrid(centre, centre, indexing="ij")
    return np.stack([forward.reshape(-1), left.reshape(-1)], axis=-1)


def sector_order(edge: int, num_cameras: int) -> Int[np.ndarray, " Q"]:
    """Lists raster cells by their direction, so that equal parts of the list belong to one camera.

    Part n of `num_cameras` is centred on the direction of camera n, 2 pi n / num_cameras.
    """
    if edge * edge % num_cameras:
        raise ValueError(f"{edge}x{edge} cells do not divide among {num_cameras} cameras.")
    forward, left = raster_positions(edge).T
    # Rounded: a cell straight ahead must come first, not last.
    direction = np.round(np.arctan2(left, forward), 5) % (2 * math.pi)
    order = np.argsort(direction, kind="stable").astype(np.int32)
    return np.roll(order, order.size // num_cameras // 2)


def ray_directions(
    num_cameras: int, num_rows: int, num_columns: int, *, fov_degrees: float
) -> Float[np.ndarray, "N H W 2"]:
    """Computes yaw and pitch of every pixel's ray, in half turns."""
    tangent = math.tan(math.radians(fov_degrees) / 2)
    column = 1 - (2 * np.arange(num_columns) + 1) / num_columns
    row = (1 - (2 * np.arange(num_rows) + 1) / num_rows) * num_rows / num_columns
    yaw = np.arange(num_cameras)[:, None] * (2 * math.pi / num_cameras)
    yaw = yaw + np.arctan(column * tangent)[None]
    pitch = np.arctan2(row[:, None] * tangent, np.hypot(1, column * tangent)[None])
    shape = (num_cameras, num_rows, num_columns)
    angles = [np.broadcast_to(yaw[:, None], shape), np.broadcast_to(pitch[None], shape)]
    return (np.stack(angles, axis=-1) / math.pi).astype(np.float32)


class ViewLayer(nnx.Module):
    """Attention of queries to the tokens of cameras, then feed-forward."""

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        mlp_dim: int,
        kind: AttentionKind,
        rngs: nnx.Rngs,
    ) -> None:
        heads = num_heads
        shape, axes = (dim, heads, dim // heads), ("embed", "heads", None)
        self.kind: AttentionKind = kind
        self.attention_norm, self.mlp_norm = LayerNorm(dim), LayerNorm(dim)
        self.query = weight(rngs, shape, axes, fan_in=dim)
        self.key = weight(rngs, shape, axes, fan_in=dim)
        self.value = weight(rngs, shape, axes, fan_in=dim)
        out = (heads, dim // heads, dim)
        self.out = weight(rngs, out, ("heads", None, "embed"), fan_in=dim)
        self.mlp = FeedForward(dim, mlp_dim, rngs=rngs)

    @jax.named_scope("view_layer")
    def __call__(
        self, x: Float[Array, "B Q D"], tokens: Float[Array, "B N S D"]
    ) -> Float[Array, "B Q D"]:
        num_tokens, flat = tokens.shape[2], tokens.reshape(tokens.shape[0], -1, tokens.shape[3])
        given = ((self.attention_norm(x), self.query), (flat, self.key), (flat, self.value))
        # Without the constraint the partitioner may do all of attention on every device.
        query, key, value = (
            constrain(
                jnp.einsum("BQD,DGE->BQGE", source, kernel[...].astype(x.dtype)),
                ("batch", None, "heads", None),
            )
            for source, kernel in given
        )
        mixed = attend(query, key, value, kind=self.kind, chunk=num_tokens)
        x = x + jnp.einsum("BQGE,GED->BQD", mixed, self.out[...].astype(x.dtype))
        return x + self.mlp(self.mlp_norm(x))


class View(nnx.Module):
    """Cameras' maps to a bird's-eye map: its cells ask, rays with features answer.

    Args:
      local: A cell asks the camera that looks its way, instead of all.
      fov_degrees: Horizontal field of view of a camera.
    """

    def __init__(
        self,
        num_in: int,
        dim: int,
        *,
        local: bool,
        fov_degrees: float,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        kind: AttentionKind,
        remat: Remat,
        rngs: nnx.Rngs,
    ) -> None:
        def make(rngs: nnx.Rngs) -> ViewLayer:
            return ViewLayer(dim, num_heads=num_heads, mlp_dim=mlp_dim, kind=kind, rngs=rngs)

        num_features = 2 * 2 * NUM_WAVES
        self.local, self.fov_degrees = local, fov_degrees
        self.cell = Linear(num_features, dim, (None, "embed"), rngs=rngs)
        self.raster = FeedForward(dim, mlp_dim, rngs=rngs)
        self.ray = Linear(num_features, dim, (None, "embed"), rngs=rngs)
        self.feature = Linear(num_in, dim, (None, "embed"), rngs=rngs)
        self.stack = Stack(make, num_layers, remat=remat, rngs=rngs)

    @jax.named_scope("view")
    def __call__(self, maps: Float[Array, "B N H W C"], edge: int) -> Float[Array, "B X Y D"]:
        B, N, H, W, _ = maps.shape
        rays = ray_directions(N, H, W, fov_degrees=self.fov_degrees)
        rays = self.ray(waves(rays, num_waves=NUM_WAVES).astype(maps.dtype))
        tokens = (self.feature(maps) + rays[None]).reshape(B, N, H * W, -1)
        order = sector_order(edge, N) if self.local else np.arange(edge * edge)
        cells = waves(raster_positions(edge)[order], num_waves=NUM_WAVES).astype(maps.dtype)
        queries = self.raster(self.cell(cells))
        queries = jnp.broadcast_to(queries[None], (B, *queries.shape))
        if self.local:
            # Every camera is a sample of its own, with its tokens and the cells of its sector.
            queries = queries.reshape(B * N, -1, queries.shape[-1])
            tokens = tokens.reshape(B * N, 1, *tokens.shape[2:])
        x = self.stack(constrain(queries, ("batch", None, None)), tokens)
        x = x.reshape(B, edge * edge, -1)
        if self.local:
            x = jnp.take(x, np.argsort(order), axis=1)
        return x.reshape(B, edge, edge, -1)
