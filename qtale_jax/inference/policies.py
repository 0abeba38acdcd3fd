"""The route policy that a model decides by at inference."""

import jax.numpy as jnp

from qtale_jax.models.policy import Dense, Policy, Thresholded
from qtale_jax.models.specification import ModelSpecification


def inference_policy(spec: ModelSpecification, theta: float | None = None) -> Policy:
    """Thresholds of the specification at its bit width, or one `theta` for all layers; dense for a dense model."""
    if spec.routing is None:
        return Dense()
    values = spec.thresholds if theta is None else (theta,) * len(spec.routed_layers)
    return Thresholded(jnp.asarray(values, jnp.float32))
