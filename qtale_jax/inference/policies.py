"""The route policy that a model decides by at inference."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from qtale_jax.errors import InputError
from qtale_jax.models.policy import Dense, Policy, Thresholded
from qtale_jax.models.specification import ModelSpecification


def inference_policy(spec: ModelSpecification, theta: float | None = None) -> Policy:
    """Thresholds of the specification at its bit width, or one `theta` for all layers; dense for a dense model."""
    if spec.routing is None:
        return Dense()
    values = spec.thresholds if theta is None else (theta,) * len(spec.routed_layers)
    return Thresholded(jnp.asarray(values, jnp.float32))


def layer_thresholds(theta: ArrayLike | Sequence[float], layers: int) -> tuple[float, ...]:
    """Theta of each of the routed layers, from one number for all of them or one for each.

    Raises:
        InputError: no numbers, too few or many, or one outside [0, 1].
    """
    try:
        values = np.asarray(theta)
    except ValueError:  # rows of different lengths
        values = np.asarray(None)
    numeric = jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)
    if values.ndim > 1 or not numeric:
        raise InputError(f"theta={theta!r}; allowed: a number, or one per routed layer")
    if values.ndim == 1 and len(values) != layers:
        raise InputError(f"theta: {len(values)} thresholds for {layers} routed layers; allowed: 1 or {layers}")
    found = tuple(map(float, np.broadcast_to(values, (layers,))))
    if not all(0 <= value <= 1 for value in found):
        raise InputError(f"theta={theta}; allowed: 0 to 1")
    return found
