"""Route policies as values: how a forward pass turns router logits into executed layers.

A policy is a pytree that any forward pass takes: `Dense` runs everything, `Sampled` adds Gumbel noise (training),
`ExpertChoice` lets a layer take its share of a row's tokens (training of Mixture-of-Depths), `Thresholded` compares the
execute probability with theta (inference), `Fixed` follows given masks.
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

    Attributes:
        key: of the noise.
        temperature: of the straight-through gradient.
        shift: added to the logit gap: log(R / (1 - R)) is training for theta = 1 - R.
        noise: scale of the noise; 0 decides as `Thresholded` does.
        eviction_gradient: the gate is also trained through the keys that eviction hides, as in D-LLM's reference.
    """

    key: PRNGKeyArray
    temperature: Float[Array, ""] | float = 1.0
    shift: Float[Array, ""] | float = 0.0
    noise: Float[Array, ""] | float = 1.0
    eviction_gradient: bool = field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertChoice:
    """A layer executes the `share` of each row's tokens whose gap is largest (Mixture-of-Depths, Raposo et al., 2024).

    That looks at later tokens, so it is for training only: an auxiliary loss teaches p >= 1/2 to give the same choice.
    """

    share: Float[Array, ""] | float
    eviction_gradient: bool = field(default=True, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Thresholded:
    """Execute iff p >= theta; theta (routed layers,) float32. A tie executes, so theta <= 0 executes everything.

    A theta per row has the shape (routed layers, batch, 1).
    """

    threshold: Float[Array, "r ..."]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fixed:
    """Masks given from outside: execute (batch, length, layers) bool; entries of always-on layers are ignored."""

    execute: Bool[Array, "b t l"]


Policy = Dense | Sampled | ExpertChoice | Thresholded | Fixed


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
    policy: Policy,
    logits: Float[Array, "b t 2"],
    routed: Int[Array, ""] | int,
    layer: Int[Array, ""] | int,
    eligible: Bool[Array, "b t"] | None = None,
) -> tuple[Bool[Array, "b t"], Float[Array, "b t"] | None]:
    """Decides one layer for every token.

    Args:
        policy: the route policy.
        logits: router output, float32.
        routed: index of the layer among the routed ones; may be traced.
        layer: index among all layers; may be traced.
        eligible: tokens that an expert choice is made among: neither padding nor always on. Default: all.

    Returns:
        execute, and the gate with the same values that carries a gradient to the logits (None: no gradient flows).
    """
    if isinstance(policy, Sampled):
        # The difference of two Gumbel variables is logistic: one draw decides, with the same distribution.
        noise = jax.random.logistic(jax.random.fold_in(policy.key, routed), logits.shape[:-1], jnp.float32)
        noisy = gap(logits) + policy.shift + policy.noise * noise
        execute = noisy >= 0
        return execute, straight_through(execute, jax.nn.sigmoid(noisy / policy.temperature))
    if isinstance(policy, ExpertChoice):
        execute = _largest(gap(logits), policy.share, eligible)
        return execute, straight_through(execute, probability(logits))
    if isinstance(policy, Thresholded):
        return probability(logits) >= policy.threshold.astype(jnp.float32)[routed], None
    if isinstance(policy, Fixed):
        return jnp.take(policy.execute, layer, axis=2), None
    return jnp.ones(logits.shape[:-1], jnp.bool_), None


def _largest(
    values: Float[Array, "b t"], share: Float[Array, ""] | float, eligible: Bool[Array, "b t"] | None
) -> Bool[Array, "b t"]:
    """Marks the `share` of each row's eligible entries that are largest; of equal ones the first."""
    eligible = jnp.ones(values.shape, jnp.bool_) if eligible is None else eligible
    order = jnp.argsort(jnp.where(eligible, -values, jnp.inf), axis=1, stable=True)
    rank = jnp.argsort(order, axis=1, stable=True)
    count = jnp.round(share * jnp.sum(eligible, axis=1, keepdims=True).astype(jnp.float32))
    return eligible & (rank < count.astype(rank.dtype))
