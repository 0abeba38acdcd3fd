"""MagR (arXiv 2406.00800): weights are moved to smaller maxima along directions that the data hardly has.

What is smaller at the maximum is rounded with finer steps. Nothing has to be undone at inference.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

POWER_STEPS = 100
"""Steps of the power iteration. The descent converges while the eigenvalue is not underestimated by half."""


@functools.partial(jax.jit, static_argnames=("iterations", "group_size"))
def magr(
    kernel: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    *,
    strength: float | Float[Array, ""],
    iterations: int = 200,
    group_size: int = -1,
) -> Float[Array, "i o"]:
    """Minimizes 1/2 tr((W - W0)^T H (W - W0)) + alpha sum ||w||_inf by proximal gradient descent (arXiv 2406.00800).

    The sum goes over output channels, or over groups of inputs and output channels. H is scaled so that its largest
    eigenvalue is 1, as in the reference (which divides X^T X by the square of the largest singular value of X).

    Args:
        kernel: W0 (inputs, outputs), any float type; computed in float32.
        hessian: sum of x x^T over calibration rows, any factor.
        strength: alpha over the root mean square of W0. The reference's alpha is absolute, 0.001 per channel and 0.0001
            per group, for weights with an RMS of about 0.02: 0.05 and 0.005 here.
        iterations: proximal gradient steps.
        group_size: inputs per group, a divisor; -1: all.

    Returns:
        W, float32. W0 where the Hessian is 0 or not finite.
    """
    start, hessian = kernel.astype(jnp.float32), hessian.astype(jnp.float32)
    largest = _largest_eigenvalue(hessian)
    usable = (largest > 0) & jnp.isfinite(largest)
    hessian = hessian / jnp.where(usable, largest, 1.0)
    alpha = strength * jnp.sqrt(jnp.mean(jnp.square(start)))
    inputs, outputs = start.shape
    groups = 1 if group_size == -1 else inputs // group_size

    def step(_: Array, weight: Float[Array, "i o"]) -> Float[Array, "i o"]:
        weight = weight - jnp.matmul(hessian, weight - start, precision="highest")
        cut = prox_of_maximum(weight.reshape(groups, -1, outputs), alpha)
        return cut.reshape(inputs, outputs)

    return jnp.where(usable, jax.lax.fori_loop(0, iterations, step, start), start)


def prox_of_maximum(vectors: Float[Array, "g n o"], alpha: float | Float[Array, ""]) -> Float[Array, "g n o"]:
    """The u with the smallest 1/2 ||u - v||^2 + alpha ||u||_inf, for each vector v along axis 1 (arXiv 2406.00800).

    By Moreau, v minus alpha times the projection of v / alpha on the l1 ball. The projection takes t off every |v|, so
    what remains is v clipped at t, where t is such that alpha is clipped in all; 0 if the vector has less than alpha.
    """
    magnitudes = jnp.abs(vectors)

    def raised(threshold: Float[Array, "g 1 o"]) -> Float[Array, "g 1 o"]:
        above = magnitudes > threshold
        count = jnp.maximum(jnp.sum(above, axis=1, keepdims=True), 1).astype(jnp.float32)
        total = jnp.sum(jnp.where(above, magnitudes, 0.0), axis=1, keepdims=True)
        return jnp.maximum(threshold, (total - alpha) / count)

    # Newton's method on the amount clipped, convex and piecewise linear in t: from below it rises to t in a few steps
    # and stands still there. Sorting gives the same t at many times the cost of the product with H.
    def step(state: tuple[Array, Array]) -> tuple[Array, Array]:
        threshold = raised(state[0])
        return threshold, jnp.any(threshold > state[0])

    start = jnp.zeros_like(magnitudes[:, :1])
    threshold, _ = jax.lax.while_loop(lambda state: state[1], step, (start, jnp.bool_(True)))
    return jnp.clip(vectors, -threshold, threshold)


def _largest_eigenvalue(hessian: Float[Array, "i i"]) -> Float[Array, ""]:
    """By power iteration from a fixed random vector; never more than the eigenvalue; 0 if the diagonal is 0."""
    scale = jnp.max(jnp.diagonal(hessian))
    # Squares of the entries have to fit into float32.
    unit = hessian / jnp.where(scale == 0, 1.0, scale)

    def multiply(vector: Float[Array, " i"]) -> Float[Array, " i"]:
        return jnp.matmul(unit, vector, precision="highest")

    def step(_: Array, vector: Float[Array, " i"]) -> Float[Array, " i"]:
        vector = multiply(vector)
        return vector / jnp.maximum(jnp.linalg.norm(vector), float(jnp.finfo(jnp.float32).tiny))

    vector = jax.random.normal(jax.random.key(0), hessian.shape[:1], jnp.float32)
    vector = jax.lax.fori_loop(0, POWER_STEPS, step, vector)
    return scale * jnp.linalg.norm(multiply(vector))
