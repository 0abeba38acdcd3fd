"""What one step of fine-tuning aims at: executed share, noise, and the weights of the routing losses."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qtale_jax.config.schema import RoutingConfig
from qtale_jax.models.policy import ExpertChoice, Policy, Sampled
from qtale_jax.models.specification import ModelSpecification

Scalar = Float[Array, ""]

CLOSED = 1e-6
"""Distance from 0 and 1 that a routed share keeps, so that its logit is finite: nearly nothing, nearly everything."""


@dataclass(frozen=True)
class Aim:
    """Scalars of one step; they may be traced.

    Attributes:
        target: executed share, in the counting of the configuration.
        routed_share: the same, of the routed layers.
        shift: added to the logit gap, so that gap = 0 stands for theta = 1 - routed share.
        noise: scale of the logistic noise.
        rate_weight: lambda_1.
        entropy_weight: lambda_2.
    """

    target: Scalar | float
    routed_share: Scalar | float
    shift: Scalar | float
    noise: Scalar | float
    rate_weight: Scalar | float
    entropy_weight: Scalar | float


def annealed(progress: Scalar) -> Scalar:
    """1 up to 20 percent of the steps, 0 from 80 percent on, straight between."""
    return jnp.clip((0.8 - progress) / 0.6, 0.0, 1.0)


def rising(progress: Scalar) -> Scalar:
    """A quarter of a sine from 0 to 1 (D-LLM's schedule of lambda_1)."""
    return jnp.sin(0.5 * math.pi * progress)


def routed_share(target: Scalar | float, layers: int, always_on: int, counting: str) -> Scalar | float:
    """The share of the routed layers that makes a share `target` in this counting, away from 0 and 1 by `CLOSED`."""
    share = target if counting == "routed" else (target * layers - always_on) / (layers - always_on)
    return jnp.clip(share, CLOSED, 1 - CLOSED)


def target_of(config: RoutingConfig, step: Int[Array, ""], key: PRNGKeyArray) -> Scalar | float:
    """The share that this step aims at: `target`, or in turn the highest, the lowest and one drawn from the range.

    The two ends get a third of the steps each (the sandwich rule of slimmable networks, Yu and Huang, 2019).
    """
    if config.target_range is None:
        return config.target
    low, high = config.target_range
    drawn = jax.random.uniform(key, (), jnp.float32, low, high)
    turn = step % 3
    return jnp.where(turn == 0, jnp.float32(high), jnp.where(turn == 1, jnp.float32(low), drawn))


def aim_of(config: RoutingConfig, spec: ModelSpecification, step: Int[Array, ""], steps: int, key: PRNGKeyArray) -> Aim:
    """The aim of a step: a function of its number and of the run's key alone."""
    progress = step.astype(jnp.float32) / steps
    target = target_of(config, step, jax.random.fold_in(key, step))
    share = routed_share(target, spec.architecture.num_layers, config.always_on_layers, config.counting)
    moves = config.target_range is not None or config.method == "random"
    fading = annealed(progress)
    return Aim(
        target=target,
        routed_share=share,
        shift=jnp.log(share) - jnp.log1p(-share) if moves else 0.0,
        noise=0.0 if config.method == "random" else fading if config.noise_schedule == "anneal" else 1.0,
        rate_weight=config.rate_weight * (rising(progress) if config.rate_schedule == "sin" else 1.0),
        entropy_weight=config.effective_entropy_weight * (fading if config.entropy_schedule == "anneal" else 1.0),
    )


def training_policy(config: RoutingConfig, aim: Aim, key: PRNGKeyArray) -> Policy:
    """The route policy of a training step."""
    if config.method == "mod":
        return ExpertChoice(aim.routed_share, config.eviction_gradient)
    return Sampled(key, config.temperature, aim.shift, aim.noise, config.eviction_gradient)
