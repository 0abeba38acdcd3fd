"""What rounding does to the output of a linear: quadratic forms of the weights' error in the Hessian.

For rows x of a linear's input, H = sum x x^T, and y = x W: the squared error of the output over all rows is
sum ||x D||^2 = tr(D^T H D) with D = W - W' (GPTQ, arXiv 2210.17323, section 3). So H is all that is needed of the data.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def channel_errors(difference: Float[Array, "i o"], hessian: Float[Array, "i i"]) -> Float[Array, " o"]:
    """d^T H d for every output channel, float32, at least 0: sums to tr(D^T H D)."""
    difference = difference.astype(jnp.float32)
    pushed = jnp.matmul(hessian.astype(jnp.float32), difference, precision="highest")
    # A sum that is 0 up to rounding may come out below.
    return jnp.maximum(jnp.sum(difference * pushed, axis=0), 0.0)


def diagonal_blocks(hessian: Float[Array, "i i"], groups: int) -> Float[Array, "g n n"]:
    """The Hessian of every group of inputs on its own, float32; `groups` divides the inputs."""
    inputs = hessian.shape[0]
    index = jnp.arange(groups)
    blocks = hessian.astype(jnp.float32).reshape(groups, inputs // groups, groups, inputs // groups)
    return blocks[index, :, index, :]


def group_errors(difference: Float[Array, "g n o"], blocks: Float[Array, "g n n"]) -> Float[Array, "g o"]:
    """d^T H d for every group of inputs and output channel, as if the other groups were exact; float32, at least 0."""
    pushed = jnp.einsum("gnm,gmo->gno", blocks, difference, precision="highest")
    return jnp.maximum(jnp.sum(difference * pushed, axis=1), 0.0)


def relative(error: Float[Array, ""], size: Float[Array, ""]) -> Float[Array, ""]:
    """sqrt(error / size) of two sums of squares; 0 where `size` is 0."""
    return jnp.where(size == 0, 0.0, jnp.sqrt(error / jnp.where(size == 0, 1.0, size)))


def output_error(
    kernel: Float[Array, "i o"], restored: Float[Array, "i o"], hessian: Float[Array, "i i"]
) -> Float[Array, ""]:
    """Relative error of the output, sqrt(tr(D^T H D) / tr(W^T H W)) = ||X D|| / ||X W||; 0 if there is no output.

    Args:
        kernel: W, before rounding.
        restored: W', after.
        hessian: sum of x x^T over calibration rows; any factor cancels.

    Returns:
        A float32 scalar.
    """
    kernel = kernel.astype(jnp.float32)
    error = jnp.sum(channel_errors(kernel - restored.astype(jnp.float32), hessian))
    return relative(error, jnp.sum(channel_errors(kernel, hessian)))


def weight_error(kernel: Float[Array, "i o"], restored: Float[Array, "i o"]) -> Float[Array, ""]:
    """Relative error of the weights, ||W - W'|| / ||W|| (Frobenius), a float32 scalar; 0 if W is 0."""
    kernel = kernel.astype(jnp.float32)
    error = jnp.sum(jnp.square(kernel - restored.astype(jnp.float32)))
    return relative(error, jnp.sum(jnp.square(kernel)))
