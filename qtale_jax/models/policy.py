"""Route policies as values: how a forward pass turns router logits into executed layers.

A policy is a pytree that any forward pass takes: `Dense` runs everything, `Sampled` adds Gumbel noise (training),
`Thresholded` compares the execute probability with theta (inference), `Fixed` follows given masks.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense:
    """Every token executes every layer."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampled:
    """Hard Gumbel-softmax of the raw logits with a straight-through gradient (D-LLM, temperature 1).

    With `eviction_gradient` the gate is also trained through the keys that eviction hides, as in D-LLM's reference.
    """

    key: PRNGKeyArray
    temperature: Float[Array, ""] | float = 1.0
    eviction_gradient: bool = field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Thresholded:
    """Execute iff p >= theta; theta (routed layers,) float32. A tie executes, so theta <= 0 executes everything."""

    threshold: Float[Array, " r"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed:
    """Masks given from outside: execute (batch, length, layers) bool; entries of always-on layers are ignored."""

    execute: Bool[Array, "b t l"]


Policy = Dense | Sampled | Thresholded | Fixed


def gap(logits: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """The logit gap, execute minus skip: all that decisions depend on."""
    return logits[..., 1] - logits[..., 0]


def probability(logits: Float[Array, "... 2"]) -> Float[Array, "..."]:
    """softmax(logits)[execute] in float32, as the logistic function of the gap."""
    return jax.nn.sigmoid(gap(logits).astype(jnp.float32))


def straight_through(hard: Bool[Array, "..."], soft: Float[Array, "..."]) -> Float[Array, "..."]:
    """Value of `hard` (exactly 0 or 1), gradient of `soft`."""
    return hard.astype(jnp.float32) + (soft - jax.lax.stop_gradient(soft))


def decide(
    policy: Policy, logits: Float[Array, "b t 2"], routed: Int[Array, ""] | int, layer: Int[Array, ""] | int
) -> tuple[Bool[Array, "b t"], Float[Array, "b t"] | None]:
    """Decides one layer for every token.

    Args:
        policy: the route policy.
        logits: router output, float32.
        routed: index of the layer among the routed ones; may be traced.
        layer: index among all layers; may be traced.

    Returns:
        execute, and the gate with the same values that carries a gradient to the logits (None: no gradient flows).
    """
    if isinstance(policy, Sampled):
        # The difference of two Gumbel variables is logistic: one draw decides, with the same distribution.
        noise = jax.random.logistic(jax.random.fold_in(policy.key, routed), logits.shape[:-1], jnp.float32)
        noisy = gap(logits) + noise
        execute = noisy >= 0
        return execute, straight_through(execute, jax.nn.sigmoid(noisy / policy.temperature))
    if isinstance(policy, Thresholded):
        return probability(logits) >= policy.threshold.astype(jnp.float32)[routed], None
    if isinstance(policy, Fixed):
        return jnp.take(policy.execute, layer, axis=2), None
    return jnp.ones(logits.shape[:-1], jnp.bool_), None
