"""Round-to-nearest quantization of one weight matrix, as pure functions on (inputs, outputs) arrays.

A weight is w ~= (q - z) * s with signed integers q in [-2^(b-1), 2^(b-1) - 1] and one scale s (and zero point z) per
group of inputs and output channel. All arithmetic is float32.
"""

from collections.abc import Collection
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8

from qtale_jax.errors import InputError, mended_group_size
from qtale_jax.models.specification import TensorFormat


class Rounded(NamedTuple):
    """Quantized matrix: integers (inputs, outputs), scales and zero points (groups, outputs), None if symmetric."""

    values: Int8[Array, "i o"]
    scales: Float[Array, "g o"]
    zero_points: Int8[Array, "g o"] | None


def validate(
    format: TensorFormat, inputs: int, name: str, key: str = "quantize.group_size", others: Collection[int] = ()
) -> None:
    """Checks that the groups divide the inputs of a linear.

    Args:
        format: of the linear.
        inputs: of the linear.
        name: of the linear.
        key: where the group size was given.
        others: inputs of the other linears that the key counts for: what is proposed suits them, too.

    Raises:
        InputError: names the linear, the group size, the number of inputs, and values of the key that would do.
    """
    if format.group_size != -1 and (format.group_size <= 0 or inputs % format.group_size):
        raise InputError(
            f"{key}={format.group_size} does not divide the {inputs} inputs of {name}; "
            + mended_group_size(key, format.group_size, {inputs, *others})
        )


class Grid(NamedTuple):
    """Where integers stand: float32 scales and zero points (groups, outputs); zero points are whole, None if symmetric.

    Scales are values of the type that `TensorFormat.scale_dtype` names, held in float32.
    """

    scales: Float[Array, "g o"]
    zero_points: Float[Array, "g o"] | None


def grouped(weight: Float[Array, "i o"], format: TensorFormat) -> Float[Array, "g n o"]:
    """A matrix in float32, its inputs cut into groups."""
    inputs, outputs = weight.shape
    return weight.astype(jnp.float32).reshape(format.groups(inputs), -1, outputs)


def integer_range(format: TensorFormat) -> tuple[int, int]:
    """Lowest and highest integer: the whole range, or an even one about 0 without zero points."""
    high = 2 ** (format.bits - 1) - 1
    return (-high if format.symmetric else -high - 1), high


def fit_grid(groups: Float[Array, "g n o"], format: TensorFormat, shrink: Float[Array, "g o"] | None = None) -> Grid:
    """The grid that spans the weights of each group and output channel.

    Symmetric: s = max|w| / (2^(b-1) - 1), integers within +-(2^(b-1) - 1), so that the range is even about 0 (at 2 bits
    only three levels remain). Asymmetric: the range is widened to contain 0, s = (max - min) / (2^b - 1), and z is an
    integer, so that a real 0 is represented exactly. A group of zeros gets scale 1, and so does one whose scale would
    not be a normal number of its type.

    Args:
        groups: weights, float32.
        format: bits, symmetry and type of the scales.
        shrink: factors by which each range is made smaller before (clipping); default: none.
    """
    low, high = integer_range(format)
    factor = 1.0 if shrink is None else shrink
    if format.symmetric:
        return Grid(_usable(jnp.max(jnp.abs(groups), axis=1) * factor / high, format), None)
    bottom = jnp.minimum(jnp.min(groups, axis=1), 0.0) * factor
    top = jnp.maximum(jnp.max(groups, axis=1), 0.0) * factor
    scales = _usable((top - bottom) / (high - low), format)
    return Grid(scales, jnp.clip(low - jnp.round(bottom / scales), low, high))


def _usable(scales: Float[Array, "g o"], format: TensorFormat) -> Float[Array, "g o"]:
    dtype = jnp.dtype(format.scale_dtype)
    # Below the smallest normal number hardware may flush to 0, and dividing by it gives no number.
    scales = jnp.where(scales < float(jnp.finfo(dtype).tiny), 1.0, scales)
    # What a narrow type cannot hold is clipped; infinite weights stay visible.
    held = jnp.minimum(scales, float(jnp.finfo(dtype).max)).astype(dtype).astype(jnp.float32)
    return jnp.where(jnp.isinf(scales), scales, held)


def round_to_grid(
    weight: Float[Array, "*n o"], scales: Float[Array, "*m o"], zero_points: Array | None, format: TensorFormat
) -> Float[Array, "*n o"]:
    """The nearest integers, as float32; scales and zero points broadcast against the weights. Ties round to even."""
    low, high = integer_range(format)
    return jnp.clip(jnp.round(weight / scales) + (0.0 if zero_points is None else zero_points), low, high)


def restore(values: Array, scales: Array, zero_points: Array | None) -> Array:
    """(q - z) * s in float32; the arguments broadcast."""
    values = values.astype(jnp.float32)
    shifted = values if zero_points is None else values - zero_points.astype(jnp.float32)
    return shifted * scales.astype(jnp.float32)


def quantize_to_grid(weight: Float[Array, "i o"], grid: Grid, format: TensorFormat) -> Rounded:
    """Rounds a matrix to a given grid."""
    zero = None if grid.zero_points is None else grid.zero_points[:, None]
    values = round_to_grid(grouped(weight, format), grid.scales[:, None], zero, format)
    return as_rounded(values.reshape(weight.shape), grid, format)


def as_rounded(values: Float[Array, "i o"], grid: Grid, format: TensorFormat) -> Rounded:
    """Integers that stand in float32, and their grid, in the types that are stored."""
    zero_points = None if grid.zero_points is None else grid.zero_points.astype(jnp.int8)
    return Rounded(values.astype(jnp.int8), grid.scales.astype(format.scale_dtype), zero_points)


def quantize(weight: Float[Array, "i o"], format: TensorFormat) -> Rounded:
    """Rounds a matrix to nearest at `format.bits`: a restored weight is at most s / 2 away."""
    return quantize_to_grid(weight, fit_grid(grouped(weight, format), format), format)


def dequantize(rounded: Rounded, dtype: jnp.dtype = jnp.float32) -> Float[Array, "i o"]:
    """(q - z) * s, in float32, returned as `dtype`."""
    inputs, outputs = rounded.values.shape
    values = rounded.values.reshape(rounded.scales.shape[0], -1, outputs)
    zero = None if rounded.zero_points is None else rounded.zero_points[:, None]
    return restore(values, rounded.scales[:, None], zero).reshape(inputs, outputs).astype(dtype)


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
