"""Equal layers one after another, as a loop over stacked parameters or written out."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx
from jaxtyping import Array, Float

Layers = Literal["scan", "unroll"]
# `full` keeps only each layer's input for the backward pass; `dots` also the results of products
# with weights, which cost most to make again.
# Where a layer names its parts with `checkpoint_name`, `kept` keeps those of KEPT on the device and
# `offload` those of OFFLOADED in the host's memory: the lists of published recipes. Source:
# AI-Hypercomputer/tpu-recipes@c8cfe2f, training/ironwood/llama3.1-70b and
# training/trillium/Llama3.1-8B-MaxText.
Remat = Literal["none", "kept", "offload", "dots", "full"]
KEPT = ("layer_input", "query", "key", "value", "mixed")
OFFLOADED = ("layer_input", "query", "key", "value", "attention_out")

_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "kept": jax.checkpoint_policies.save_only_these_names(*KEPT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(OFFLOADED),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def make_apply(remat: Remat) -> Callable[..., Any]:
    """Returns the function that calls a layer on x and what all share, and keeps what it may."""

    def apply(x: Any, layer: Any, *shared: Any) -> Any:
        return layer(x, *shared)

    return apply if remat == "none" else nnx.remat(apply, policy=_POLICIES[remat])


class Stack(nnx.Module):
    """`num_layers` layers made by `make(rngs)`; each takes x and what all share, and returns x.

    A loop is traced and compiled once for all layers. The stacking dim gets no logical axis:
    layers are never split over devices.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        layers: Layers = "scan",
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ) -> None:
        self.scanned = layers == "scan"
        self.remat: Remat = remat
        self.layers: Any
        if self.scanned:
            stacked = nnx.vmap(
                lambda key: make(nnx.Rngs(params=key)),
                transform_metadata={nnx.PARTITION_NAME: None},
            )
            self.layers = stacked(jax.random.split(rngs.params(), num_layers))
        else:
            self.layers = nnx.List([make(rngs) for _ in range(num_layers)])

    @jax.named_scope("stack")
    def __call__(self, x: Float[Array, "..."], *shared: Any) -> Float[Array, "..."]:
        apply = make_apply(self.remat)
        if not self.scanned:
            for layer in self.layers:
                x = apply(x, layer, *shared)
            return x
        loop = nnx.scan(
            apply,
            in_axes=(nnx.Carry, 0, *(None,) * len(shared)),
            out_axes=nnx.Carry,
            transform_metadata={nnx.PARTITION_NAME: None},
        )
        return loop(x, self.layers, *shared)
