"""A product of few rows with a stored weight, as CPUs like it: block after block of inputs, restored in the cache.

XLA for CPUs restores a whole matrix in memory before it multiplies, which for one row costs more than the product, and
its integer dots with few rows are ten times slower than float32. Here a scan takes a few blocks of inputs at a time:
their integers become float32 while they are in the cache, and each block is an ordinary float32 dot. A dot with few
rows has one thread, but independent ones run side by side, which is why a step has several. Measured ratios stand in
`benchmarks/results/decode_quantized_cpu.json`.

Zero points of 8, 3 and 2 bits are taken off before the product: q x - z sum(x) would be the same number but loses
digits where most integers stand near z, as two large sums cancel. At 4 bits that costs at most four of the 24 binary
digits of float32, and it is done because a subtraction per weight takes a quarter of the time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.packing import BLOCK, fields

DOTS = {8: 1, 4: 2, 3: 12, 2: 4}
"""Dots that a block of inputs becomes, by bits: one for every place that a field can have within a byte."""

DOTS_AT_ONCE = 8
"""Most dots of a step: more of them take long to compile."""

BLOCK_INPUTS, BLOCK_WEIGHTS = 128, 2**21
"""Most inputs and most weights of a block: enough that a dot costs little beside its work, few enough for the cache."""

SMALLEST = 16
"""Fewer inputs to a block are not worth a dot."""

FEW_ROWS = 16
"""More rows than this are faster with a matrix that is restored as a whole."""


def steps(inputs: int, outputs: int, format: TensorFormat) -> tuple[int, int] | None:
    """(steps, blocks per step) of the scan; a block is a group where there are groups. None: this form does not fit.

    The padded inputs have to fall into blocks of whole packed blocks, and 4-bit outputs into pairs. Matrices of more
    than one block take at least two steps: without a loop XLA restores all of them at once.
    """
    unit = BLOCK if format.bits in (2, 3) else 1
    if format.bits == 4 and outputs % 2:
        return None
    if format.group_size == -1:
        units = -(-inputs // unit)
        size = unit * _largest_divisor(units, min(BLOCK_INPUTS, BLOCK_WEIGHTS // outputs) // unit)
        if size < min(inputs, SMALLEST):
            return None
        blocks = units * unit // size
    else:
        if format.group_size % unit or format.group_size < SMALLEST:
            return None
        size, blocks = format.group_size, inputs // format.group_size
    most = min(DOTS_AT_ONCE // DOTS[format.bits], 4 * BLOCK_INPUTS // size, 2 * BLOCK_WEIGHTS // (size * outputs))
    at_once = _largest_divisor(blocks, min(most, blocks // 2))
    return blocks // at_once, at_once


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
    grouped = format.group_size != -1
    grid = (scales, zero_points) if grouped else (None, None)
    grid = jax.tree.map(lambda array: array.reshape(count, at_once, 1, outputs), grid)

    def step(carry: Array, block: tuple[Array, Array, tuple[Array | None, ...]]) -> tuple[Array, None]:
        x, values, grid = block
        for group in range(at_once):
            scale, zero = (None if array is None else array[group] for array in grid)
            part = _integers(x[group], values[group], zero if grouped else zero_points, format)
            carry = carry + (part if scale is None else part * scale.astype(jnp.float32))
        return carry, None

    total, _ = jax.lax.scan(step, jnp.zeros((rows, outputs), jnp.float32), (inputs, blocks, grid))
    return total if grouped else total * scales.astype(jnp.float32)


def _integers(x: Float[Array, "m n"], values: Array, zero: Array | None, format: TensorFormat) -> Float[Array, "m o"]:
    """X @ (q - z) for one block of integers that share their zero points (1, outputs)."""
    if format.bits == 8:
        return x @ _shifted(values, zero, jnp.int16)
    if format.bits == 4:
        high = values.astype(jnp.int8) >> jnp.int8(4)  # arithmetic shifts carry the sign along
        low = (values << jnp.uint8(4)).astype(jnp.int8) >> jnp.int8(4)
        pair = [x @ nibble.astype(jnp.float32) for nibble in (low, high)]
        total = jnp.stack(pair, axis=-1).reshape(x.shape[0], -1)
        return total if zero is None else total - jnp.sum(x, axis=1, keepdims=True) * zero.astype(jnp.float32)
    total, blocks = jnp.zeros((), jnp.float32), values.reshape(-1, BLOCK * format.bits // 8, values.shape[-1])
    # The zero point as it would be packed: cut into fields like the values, so that q = z is 0 in every field.
    code = (jnp.zeros((1, 1), jnp.int8) if zero is None else zero) + jnp.int8(2 ** (format.bits - 1))
    for low, width, field in fields(blocks, format.bits):
        bytes_ = field.reshape(-1, values.shape[-1])
        inputs = x.reshape(x.shape[0], -1, 8 // width, 4 * width)
        off = (code >> jnp.int8(low)) & jnp.int8(2**width - 1)
        for position in range(8 // width):
            value = (bytes_ >> jnp.uint8(position * width)) & jnp.uint8(2**width - 1)
            part = inputs[:, :, position].reshape(x.shape[0], -1)
            total = total + (2.0**low * part) @ _shifted(value, off, jnp.int8)
    return total


def _shifted(values: Array, zero: Array | None, dtype: jnp.dtype) -> Float[Array, "n o"]:
    if zero is None:
        return values.astype(jnp.float32)
    # As integers, as narrow as the difference allows: a subtraction in float32 costs a pass of its own.
    return (values.astype(dtype) - zero.astype(dtype)).astype(jnp.float32)
