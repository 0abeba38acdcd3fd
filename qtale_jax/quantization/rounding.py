"""Round-to-nearest quantization of one weight matrix, as pure functions on (inputs, outputs) arrays.

A weight is w ~= (q - z) * s with signed integers q in [-2^(b-1), 2^(b-1) - 1] and one scale s (and zero point z) per
group of inputs and output channel. All arithmetic is float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from qtale_jax.errors import InputError
from qtale_jax.models.specification import TensorFormat


class Rounded(NamedTuple):
    """Quantized matrix: integers (inputs, outputs), scales and zero points (groups, outputs), None if symmetric."""

    values: Int8[Array, "i o"]
    scales: Float[Array, "g o"]
    zero_points: Int8[Array, "g o"] | None


def validate(format: TensorFormat, inputs: int, name: str) -> None:
    """Checks that the groups divide the inputs of linear `name`.

    Raises:
        InputError: names the linear, the group size and the number of inputs.
    """
    if format.group_size != -1 and (format.group_size <= 0 or inputs % format.group_size):
        divisors = [size for size in range(1, inputs + 1) if inputs % size == 0]
        closest = min(divisors, key=lambda size: abs(size - format.group_size))
        raise InputError(
            f"quantize.group_size={format.group_size} does not divide the {inputs} inputs of {name}; "
            f"allowed: -1 (one group) or a divisor, the nearest is {closest}"
        )


def _grouped(weight: Float[Array, "i o"], format: TensorFormat) -> Float[Array, "g n o"]:
    inputs, outputs = weight.shape
    return weight.astype(jnp.float32).reshape(format.groups(inputs), -1, outputs)


def _usable(scale: Float[Array, "g 1 o"]) -> Float[Array, "g 1 o"]:
    # Below the smallest normal number hardware may flush to 0, and dividing by it gives no number.
    return jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1.0, scale)


def quantize(weight: Float[Array, "i o"], format: TensorFormat) -> Rounded:
    """Rounds a matrix to `format.bits`.

    Symmetric: s = max|w| / (2^(b-1) - 1), integers within +-(2^(b-1) - 1), so that the range is even about 0 (at 2 bits
    only three levels remain). Asymmetric: the range is widened to contain 0, s = (max - min) / (2^b - 1), and z is an
    integer, so that a real 0 is represented exactly. A group of zeros gets scale 1, and so does one whose scale would
    not be a normal float32. Ties round to even. Either way a restored weight is at most s / 2 away.
    """
    groups = _grouped(weight, format)
    low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    if format.symmetric:
        scale = _usable(jnp.max(jnp.abs(groups), axis=1, keepdims=True) / high)
        values = jnp.clip(jnp.round(groups / scale), -high, high)
        zero = None
    else:
        bottom = jnp.minimum(jnp.min(groups, axis=1, keepdims=True), 0.0)
        top = jnp.maximum(jnp.max(groups, axis=1, keepdims=True), 0.0)
        scale = _usable((top - bottom) / (high - low))
        zero = jnp.clip(low - jnp.round(bottom / scale), low, high)
        values = jnp.clip(jnp.round(groups / scale) + zero, low, high)
        zero = zero[:, 0].astype(jnp.int8)
    return Rounded(values.reshape(weight.shape).astype(jnp.int8), scale[:, 0], zero)


def dequantize(rounded: Rounded, dtype: jnp.dtype = jnp.float32) -> Float[Array, "i o"]:
    """(q - z) * s, in float32, returned as `dtype`."""
    inputs, outputs = rounded.values.shape
    values = rounded.values.astype(jnp.float32).reshape(rounded.scales.shape[0], -1, outputs)
    if rounded.zero_points is not None:
        values = values - rounded.zero_points.astype(jnp.float32)[:, None]
    return (values * rounded.scales.astype(jnp.float32)[:, None]).reshape(inputs, outputs).astype(dtype)


def fake_quantize(weight: Float[Array, "... i o"], format: TensorFormat) -> Float[Array, "... i o"]:
    """Rounds and restores: what the quantized model computes with, in the type of `weight`; leading axes are mapped."""
    if weight.ndim > 2:
        return jax.vmap(lambda matrix: fake_quantize(matrix, format))(weight)
    return dequantize(quantize(weight, format), weight.dtype)


def fake_quantize_straight_through(weight: Float[Array, "... i o"], format: TensorFormat) -> Float[Array, "... i o"]:
    """`fake_quantize`, value for value, with the identity as gradient (straight-through, Bengio et al., 2013)."""
    # Exact: a weight and its rounding are within a factor of two of each other, or the rounding is 0, and then neither
    # the difference nor the sum rounds (Sterbenz).
    return weight + jax.lax.stop_gradient(fake_quantize(weight, format) - weight)
