"""Losses in float32: means over everything that is not a class, a bin or a coordinate."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@jax.named_scope("loss")
def cross_entropy(
    logits: Float[Array, "*dims K"],
    labels: Int[Array, "*dims"],
    where: Bool[Array, "*dims"] | None = None,
) -> Float[Array, ""]:
    """Mean softmax cross entropy of integer labels, over the places that `where` names."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return _mean(jax.nn.logsumexp(logits, axis=-1) - picked, where)


@jax.named_scope("loss")
def binary_cross_entropy(
    logits: Float[Array, "*dims"], labels: Int[Array, "*dims"]
) -> Float[Array, ""]:
    """Mean cross entropy of independent 0/1 labels."""
    logits = logits.astype(jnp.float32)
    return jnp.mean(jax.nn.softplus(logits) - logits * labels.astype(jnp.float32))


@jax.named_scope("loss")
def focal(
    logits: Float[Array, "*dims"], labels: Float[Array, "*dims"], *, gamma: float = 2.0
) -> Float[Array, ""]:
    """Mean binary focal loss. Source: Lin et al., "Focal Loss", ICCV 2017 (alpha 0.25)."""
    logits, labels = logits.astype(jnp.float32), labels.astype(jnp.float32)
    entropy = jax.nn.softplus(logits) - logits * labels
    hit = jax.nn.sigmoid(logits) * labels + jax.nn.sigmoid(-logits) * (1 - labels)
    weight = 0.25 * labels + 0.75 * (1 - labels)
    return jnp.mean(weight * (1 - hit) ** gamma * entropy)


@jax.named_scope("loss")
def absolute_error(
    found: Float[Array, "*dims"],
    wanted: Float[Array, "*dims"],
    where: Bool[Array, "*dims"] | None = None,
) -> Float[Array, ""]:
    """Mean absolute difference, over the places that `where` names."""
    return _mean(jnp.abs(found.astype(jnp.float32) - wanted.astype(jnp.float32)), where)


def _mean(values: Float[Array, "*dims"], where: Bool[Array, "*dims"] | None) -> Float[Array, ""]:
    if where is None:
        return jnp.mean(values)
    chosen = jnp.where(where, values, 0.0)
    return jnp.sum(chosen) / jnp.maximum(jnp.sum(where.astype(jnp.float32)), 1.0)
