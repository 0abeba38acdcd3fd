"""The losses of D-LLM and QTALE, and the routing statistics that the paper shows.

L = L_CE + lambda_1 L_rate + lambda_2 L_entropy (+ distillation). All are float32 means over the tokens that count.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qtale_jax.models.policy import gap


def weighted_mean(
    values: Float[Array, "..."], weights: Float[Array, "..."], total: Float[Array, ""]
) -> Float[Array, ""]:
    """sum(values * weights) / total; `total` is given so that microbatches add up to the whole batch."""
    return jnp.sum(values * weights) / jnp.maximum(total, 1.0)


def token_cross_entropy(logits: Float[Array, "b t v"], targets: Int[Array, "b t"]) -> Float[Array, "b t"]:
    """Negative log-likelihood of each target, nats."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def executed_share(
    gates: Float[Array, "b t r"], always_on_layers: int, counting: Literal["all", "routed"]
) -> Float[Array, "b t"]:
    """Share of layers that each token executes: of all layers (D-LLM's reference) or of the routed ones."""
    routed = gates.shape[-1]
    if counting == "routed":
        return jnp.mean(gates, axis=-1)
    return (jnp.sum(gates, axis=-1) + always_on_layers) / (routed + always_on_layers)


def rate_loss(
    share: Float[Array, "b t"],
    counted: Float[Array, "b t"],
    total: Float[Array, ""],
    target: Float[Array, ""] | float,
    form: Literal["token", "batch", "squared"],
) -> Float[Array, ""]:
    """Distance of the executed share from `target`.

    "token" is D-LLM's: mean over tokens of |share - target|. "batch" is |mean share - target|: tokens may differ, and
    the mean is held without the drift that the per-token form shows. "squared" is (mean share - target)^2: what a layer
    costs a token is 2 lambda_1 (mean - target), a price that settles, where the others push up or down with full weight
    in every step. It settles beside the target, by the price over 2 lambda_1. The mean of the last two is that of a
    microbatch: it is what one forward pass sees, so small microbatches are held to the target one by one.
    """
    if form == "token":
        return weighted_mean(jnp.abs(share - target), counted, total)
    off = weighted_mean(share - target, counted, total)
    if form == "batch":
        return jnp.abs(off)
    return off**2 * total / jnp.maximum(jnp.sum(counted), 1.0)  # a microbatch's own mean, weighted by its tokens


def entropy_penalty(gaps: Float[Array, "..."], form: Literal["log_cosh", "entropy"]) -> Float[Array, "..."]:
    """How far a decision is from undecided, 0 at p = 1/2; QTALE's term that keeps paths diverse.

    "log_cosh": log cosh(gap / 2) = -(log p_0 + log p_1) / 2 - ln 2, grows with the gap and never saturates.
    "entropy": 1 - H(p) / ln 2, bounded by 1, so its gradient vanishes for saturated routers.
    """
    half = jnp.abs(gaps) / 2
    if form == "log_cosh":
        return half + jnp.log1p(jnp.exp(-2 * half)) - math.log(2)
    log_execute, log_skip = jax.nn.log_sigmoid(gaps), jax.nn.log_sigmoid(-gaps)
    return 1 + (jnp.exp(log_execute) * log_execute + jnp.exp(log_skip) * log_skip) / math.log(2)


def choice_loss(gaps: Float[Array, "..."], chosen: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Cross-entropy of "p >= 1/2" with an expert choice: what lets Mixture-of-Depths route without later tokens."""
    return -jax.nn.log_sigmoid(jnp.where(chosen, gaps, -gaps))


def distillation_loss(
    logits: Float[Array, "b t v"], teacher: Float[Array, "b t v"], temperature: float
) -> Float[Array, "b t"]:
    """KL(teacher || student) per token at the given temperature, times temperature^2 (Hinton et al., 2015)."""
    student_log = jax.nn.log_softmax(logits / temperature, axis=-1)
    teacher_log = jax.nn.log_softmax(teacher / temperature, axis=-1)
    return jnp.sum(jnp.exp(teacher_log) * (teacher_log - student_log), axis=-1) * temperature**2


GAP_QUANTILES = (0.1, 0.5, 0.9)


def routing_statistics(
    logits: Float[Array, "b t r 2"], execute: Bool[Array, "b t r"], counted: Float[Array, "b t"]
) -> dict[str, Float[Array, "..."]]:
    """Executed share per routed layer, |gap| mean and quantiles, flip rate and entropy over the counted tokens.

    The flip rate is the share of decisions that the noise turned against the noiseless one, gap >= 0.
    """
    weights = jnp.broadcast_to(counted[:, :, None], execute.shape)
    total = jnp.maximum(jnp.sum(weights), 1.0)
    gaps, executed = gap(logits), execute.astype(jnp.float32)
    magnitude = jnp.abs(gaps)
    flipped = (execute != (gaps >= 0)).astype(jnp.float32)
    entropy = (1 - entropy_penalty(gaps, "entropy")) * math.log(2)
    # Uncounted entries become NaN, which nanquantile leaves out: shapes stay static.
    quantiles = jnp.nanquantile(jnp.where(weights > 0, magnitude, jnp.nan), jnp.asarray(GAP_QUANTILES, jnp.float32))
    return {
        "executed_per_layer": jnp.sum(executed * weights, axis=(0, 1)) / jnp.maximum(jnp.sum(counted), 1.0),
        "logit_gap_mean": jnp.sum(magnitude * weights) / total,
        **{f"logit_gap_q{round(100 * q)}": quantiles[i] for i, q in enumerate(GAP_QUANTILES)},
        "flip_rate": jnp.sum(flipped * weights) / total,
        "entropy": jnp.sum(entropy * weights) / total,
    }


def hidden_distance(hidden: Float[Array, "b t d"], teacher: Float[Array, "b t d"]) -> Float[Array, "b t"]:
    """Mean squared difference of two residual streams, each scaled to a root mean square of one."""

    def unit(x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)

    return jnp.mean(jnp.square(unit(hidden) - unit(teacher)), axis=-1)
