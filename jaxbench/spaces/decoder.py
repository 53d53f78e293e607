"""Networks around Llama 3.2 1B at equal parameters: deep or wide, many heads or few, which MLP.

Parameters stay within 3 %, and FLOPs of a token's forward pass within 5 %. Which of those networks
learns as well is for a training run to say; loss depends on shape only weakly over a wide range
(Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxbench.candidate import Candidate, constrain
from jaxbench.models import decoder
from jaxbench.search import Array, Band, Block, Choice, Space

BASE = next(one for one in decoder.CANDIDATES if one.name == "decoder-paper-head64")
TRIPS = 4  # of a block's loop; a network has a multiple of it, or a part


class AttentionLayer(nnx.Module):
    """The first half of `decoder.Layer`."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.norm = decoder.RMSNorm(config.embed_dim, rngs)
        self.attention = decoder.Attention(config, rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Any) -> Any:
        x = constrain(x, ("batch", None, None))
        return x + self.attention(self.norm(x))


class MlpLayer(nnx.Module):
    """The second half of `decoder.Layer`."""

    def __init__(self, config: Any, rngs: nnx.Rngs) -> None:
        self.norm = decoder.RMSNorm(config.embed_dim, rngs)
        self.mlp = decoder.FeedForward(config, rngs)

    @jax.named_scope("layer")
    def __call__(self, x: Any) -> Any:
        x = constrain(x, ("batch", None, None))
        return x + self.mlp(self.norm(x))


def _apply(x: Any, layer: Any) -> Any:
    return layer(x)


class Loop(nnx.Module):
    """`TRIPS` layers in a loop over stacked parameters, as `decoder.Decoder` has them."""

    def __init__(self, rngs: nnx.Rngs, *, half: str, config: Any) -> None:
        self.config = decoder.DecoderConfig(**config)
        layer = AttentionLayer if half == "attention" else MlpLayer
        stack = nnx.vmap(
            lambda key: layer(self.config, nnx.Rngs(params=key)),
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        self.stack = stack(jax.random.split(rngs.params(), TRIPS))

    @jax.named_scope("decoder")
    def __call__(self, x: Any) -> Any:
        loop = nnx.scan(
            nnx.remat(_apply) if self.config.remat == "full" else _apply,
            in_axes=(nnx.Carry, 0),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        return loop(x, self.stack)


class Ends(nnx.Module):
    """Token table, last norm, output projection and loss: all of the network but its layers."""

    def __init__(self, rngs: nnx.Rngs, *, vocab_size: int, embed_dim: int) -> None:
        self.table = decoder.weight(rngs, (vocab_size, embed_dim), ("vocab", "embed"), embed_dim)
        self.norm = decoder.RMSNorm(embed_dim, rngs)

    @jax.named_scope("decoder")
    def __call__(self, tokens: Any, x: Any) -> Any:
        table = self.table[...].astype(decoder.DTYPE)
        embedded = constrain(table[tokens[:, :-1]], ("batch", None, None))
        logits = jnp.einsum("BTD,VD->BTV", self.norm(x), table)
        return embedded, decoder.cross_entropy(logits, tokens)


def blocks(candidate: Candidate) -> Iterator[Block]:
    """Lists the blocks of a network's step."""
    config, work = candidate.config, candidate.workload
    length = dict(work.inputs)["tokens"].shape[0]
    x = Array(shape=(work.global_batch, length - 1, config.embed_dim))
    fixed = {"num_layers": TRIPS, "vocab_size": 0, "embed_dim": config.embed_dim}
    heads = ("num_heads", "num_kv_heads", "head_dim")
    attention = {name: getattr(config, name) for name in (*heads, "remat")}
    for half, own in (
        ("attention", {**attention, "mlp_dim": 0}),
        ("mlp", {**dict.fromkeys(heads, 1), "mlp_dim": config.mlp_dim, "remat": config.remat}),
    ):
        yield Block(
            kind=half,
            build=Loop,
            arguments={"half": half, "config": {**fixed, **own}},
            inputs=(x,),
            count=config.num_layers / TRIPS,
        )
    yield Block(
        kind="ends",
        build=Ends,
        arguments={"vocab_size": config.vocab_size, "embed_dim": config.embed_dim},
        inputs=(Array(shape=(work.global_batch, length), dtype="int32"), x),
    )


SPACE = Space(
    name="decoder",
    base=BASE,
    choices=(
        Choice("num_layers", tuple(range(8, 29))),
        Choice("embed_dim", (1536, 1792, 2048, 2304, 2560)),
        Choice("mlp_dim", tuple(range(4096, 12288 + 1, 1024))),
        Choice("num_heads", (8, 12, 16, 24, 32, 40)),
        Choice("num_kv_heads", (1, 2, 4, 8)),
        Choice("head_dim", (64, 128, 256)),
        Choice("remat", ("full", "none"), validity="T0"),
    ),
    bands=(Band("num_params", 0.97, 1.03), Band("forward_flops", 0.95, 1.05)),
    layout="fsdp",
    blocks=blocks,
)
