"""A product of few rows with a stored weight, as CPUs like it: block after block of inputs, restored in the cache.

XLA for CPUs restores a whole matrix in memory before it multiplies, which for one row costs more than the product, and
its integer dots with few rows are ten times slower than float32. Here a scan takes a block of inputs at a time: its
integers become float32 while they are in the cache, and the product of the block is an ordinary float32 dot. Measured
ratios stand in `benchmarks/results/decode_quantized`.

Zero points are taken off afterwards: (q - z) s x = (q x - z sum(x)) s.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.packing import BLOCK, fields

INPUTS_AT_ONCE, WEIGHTS_AT_ONCE = 256, 2**21
"""Most inputs and most weights of a step: enough that a step costs little beside its work, few enough for the cache."""

SMALLEST = 16
"""Fewer inputs to a block are not worth a step."""

FEW_ROWS = 16
"""More rows than this are faster with a matrix that is restored as a whole."""


def steps(inputs: int, outputs: int, format: TensorFormat) -> tuple[int, int] | None:
    """(steps, groups per step) of the scan; one group per step without groups. None: this form does not fit.

    The padded inputs have to fall into blocks of whole packed blocks, and 4-bit outputs into pairs.
    """
    unit = BLOCK if format.bits in (2, 3) else 1
    if format.bits == 4 and outputs % 2:
        return None
    most = min(INPUTS_AT_ONCE, WEIGHTS_AT_ONCE // outputs)
    if format.group_size == -1:
        units = -(-inputs // unit)
        at_once = unit * _largest_divisor(units, most // unit)
        return (units * unit // at_once, 1) if at_once >= min(inputs, SMALLEST) else None
    if format.group_size % unit or format.group_size < SMALLEST:
        return None
    groups = inputs // format.group_size
    at_once = _largest_divisor(groups, most // format.group_size)
    return groups // at_once, at_once


def _largest_divisor(number: int, limit: int) -> int:
    return max((n for n in range(1, min(number, limit) + 1) if number % n == 0), default=1)


def product(
    x: Float[Array, "m i"],
    values: Array,
    scales: Float[Array, "g o"],
    zero_points: Array | None,
    format: TensorFormat,
) -> Float[Array, "m o"]:
    """X @ W in float32, for a weight whose `steps` exist.

    Args:
        x: float32 rows.
        values: as `quantization.storage` holds them.
        scales: one per group and output.
        zero_points: likewise, or None.
        format: what they mean.
    """
    rows, outputs = x.shape[0], scales.shape[1]
    found = steps(x.shape[1], outputs, format)
    assert found is not None
    count, at_once = found
    if format.bits in (2, 3):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK)))
    if format.bits == 4:  # two neighbouring outputs to a byte
        values = jax.lax.bitcast_convert_type(values.reshape(-1, outputs // 2, 2), jnp.uint8)
    inputs = jnp.moveaxis(x.reshape(rows, count, at_once, -1), 0, 2)
    blocks = values.reshape(count, at_once, -1, values.shape[-1])
    grid: tuple[Array, ...] = ()
    if format.group_size != -1:
        grid = tuple(array.reshape(count, at_once, outputs) for array in (scales, zero_points) if array is not None)

    def scaled(total: Array, x: Array, scale: Array, zero: Array | None) -> Array:
        if zero is not None:
            total = total - jnp.sum(x, axis=-1, keepdims=True) * zero.astype(jnp.float32)
        return total * scale.astype(jnp.float32)

    def step(carry: Array, block: tuple[Array, Array, tuple[Array, ...]]) -> tuple[Array, None]:
        x, values, grid = block
        for group in range(at_once):
            part = _integers(x[group], values[group], format)
            if grid:
                scale, *zero = (array[group][None] for array in grid)
                part = scaled(part, x[group], scale, zero[0] if zero else None)
            carry = carry + part
        return carry, None

    total, _ = jax.lax.scan(step, jnp.zeros((rows, outputs), jnp.float32), (inputs, blocks, grid))
    return scaled(total, x, scales, zero_points) if format.group_size == -1 else total


def _integers(x: Float[Array, "m n"], values: Array, format: TensorFormat) -> Float[Array, "m o"]:
    """X @ q for one block of integers."""
    if format.bits == 8:
        return x @ values.astype(jnp.float32)
    if format.bits == 4:
        high = values.astype(jnp.int8) >> jnp.int8(4)  # arithmetic shifts carry the sign along
        low = (values << jnp.uint8(4)).astype(jnp.int8) >> jnp.int8(4)
        pair = [x @ nibble.astype(jnp.float32) for nibble in (low, high)]
        return jnp.stack(pair, axis=-1).reshape(x.shape[0], -1)
    total, blocks = jnp.zeros((), jnp.float32), values.reshape(-1, BLOCK * format.bits // 8, values.shape[-1])
    for low, width, field in fields(blocks, format.bits):
        bytes_ = field.reshape(-1, values.shape[-1])
        inputs = x.reshape(x.shape[0], -1, 8 // width, 4 * width)
        offset = 2.0 ** (width - 1) if low + width == format.bits else 0.0  # what was added before packing
        for position in range(8 // width):
            value = (bytes_ >> jnp.uint8(position * width)) & jnp.uint8(2**width - 1)
            part = inputs[:, :, position].reshape(x.shape[0], -1)
            total = total + (2.0**low * part) @ (value.astype(jnp.float32) - offset)
    return total
