"""A product of few rows with a stored weight for GPUs: integers travel, and become numbers in registers.

Decode reads every weight once for a handful of rows, so its time is that of the bytes that travel, if enough of them
are under way at once (a tile of outputs is cut along its inputs as well, and the parts are added up afterwards) and if
little is done to each. The instruction that turns an integer into a float has a fraction of the others' rate; but
1.5 x 2^23 + n is the float whose bits are those of 1.5 x 2^23 plus n, so that one integer addition and one subtraction
do it, and the zero point costs nothing. A single row is multiplied where the numbers are, several by the matrix unit.
The plain JAX form is `quantization.groupwise`, of which XLA writes parts to memory
(`benchmarks/results/kernels_h200.json`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.packing import BLOCK, FIELDS

STEP = 128
"""Most inputs of a step: those of one group at the usual group size."""

TILE, SINGLE_TILE = 64, 128
"""Most outputs of a program, of several rows and of one, which leaves registers for more."""

PROGRAMS = 1024
"""Programs that keep a large GPU busy: about eight for each of its multiprocessors."""

_ROWS = 16
"""Several rows are filled up to this power of two or a higher one: what the matrix unit takes at least."""

_SHIFT, _SHIFT_BITS = 1.5 * 2.0**23, 0x4B400000


def step_inputs(inputs: int, outputs: int, format: TensorFormat) -> int | None:
    """Inputs of a step, a power of two within a group; None: this form does not fit."""
    group = inputs if format.group_size == -1 else format.group_size
    step = math.gcd(group, STEP)
    # A step of packed integers is four products of a quarter of it each.
    if step < (4 * _ROWS if format.bits in FIELDS else _ROWS) or inputs % step or outputs % _ROWS:
        return None
    return step if format.activation_bits == 16 else None


def product(
    x: Float[Array, "m i"],
    values: Array,
    scales: Float[Array, "g o"],
    zero_points: Array | None,
    format: TensorFormat,
    *,
    interpret: bool = False,
) -> Float[Array, "m o"]:
    """X @ W in float32, for a weight that has `step_inputs`.

    Args:
        x: rows, the inputs in the order in which they are stored; float32 or bfloat16, as the products are then.
        values: as `quantization.storage` holds them.
        scales: one per group and output.
        zero_points: likewise, or None.
        format: what they mean.
        interpret: run the kernel by Pallas' interpreter, on any device.
    """
    (rows, inputs), outputs = x.shape, scales.shape[1]
    step = step_inputs(inputs, outputs, format)
    assert step is not None
    steps, tile = inputs // step, math.gcd(outputs, SINGLE_TILE if rows == 1 else TILE)
    tiles = outputs // tile
    per_part = pl.cdiv(steps, min(steps, pl.cdiv(PROGRAMS, tiles)))
    parts = pl.cdiv(steps, per_part)
    if rows > 1:
        x = jnp.pad(x, ((0, max(_ROWS, pl.next_power_of_2(rows)) - rows), (0, 0)))
    if format.bits in FIELDS:
        # The inputs of a byte's fields stand 8 apart in a block; here those of each field follow one another.
        x = x.reshape(len(x), inputs // BLOCK, 4, BLOCK // 4).swapaxes(1, 2).reshape(len(x), inputs)
        values = values.reshape(-1, BLOCK * format.bits // 8, outputs)

    def tile_of(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec((*array.shape[:-1], tile), lambda column, part: (0,) * (array.ndim - 1) + (column,))

    operands = [x, values, scales, *([] if zero_points is None else [zero_points])]
    specs = [pl.BlockSpec(x.shape, lambda column, part: (0, 0)), *map(tile_of, operands[1:])]
    out = pl.pallas_call(
        functools.partial(_kernel, format=format, step=step, steps=steps, per_part=per_part),
        out_shape=jax.ShapeDtypeStruct((parts, len(x), outputs), jnp.float32),
        grid=(tiles, parts),
        in_specs=specs,
        out_specs=pl.BlockSpec((None, len(x), tile), lambda column, part: (part, 0, column)),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name=f"quantized_matmul_{format.bits}_bit",
    )(*operands)
    return jnp.sum(out[:, :rows], axis=0)


def _kernel(x_ref, values_ref, scales_ref, *refs, format: TensorFormat, step: int, steps: int, per_part: int):
    zero_ref, out_ref = refs if len(refs) == 2 else (None, refs[0])
    rows, tile = out_ref.shape
    first = pl.program_id(1) * per_part
    last = jnp.minimum(first + per_part, steps)

    def pieces(index):
        """Where inputs of a step stand in the rows, and the numbers that they meet."""
        read = _packed_pieces if format.bits in FIELDS else _whole_pieces
        zero = _SHIFT + (2 ** (format.bits - 1) if format.bits in FIELDS else 0)
        if zero_ref is not None:
            zero += zero_ref[pl.ds(group(index), 1), :].astype(jnp.float32)
        for at, integers in read(x_ref, values_ref, index, step, format.bits):
            yield at, jax.lax.bitcast_convert_type(integers + _SHIFT_BITS, jnp.float32) - zero

    def group(index):
        return 0 if format.group_size == -1 else index * step // format.group_size

    def scale(index):
        return scales_ref[pl.ds(group(index), 1), :].astype(jnp.float32)

    def add_single(index, total):
        product = jnp.zeros_like(total)
        for at, numbers in pieces(index):
            product += x_ref[0, at].astype(jnp.float32)[:, None] * numbers
        return total + product * scale(index)

    def add(index, total):
        product = jnp.zeros_like(total)
        for at, numbers in pieces(index):
            product += _dot(x_ref[:, at], numbers.astype(x_ref.dtype))
        return total + product * scale(index)

    if rows == 1:
        total = jax.lax.fori_loop(first, last, add_single, jnp.zeros((step // 4, tile), jnp.float32))
        out_ref[0, :] = jnp.sum(total, axis=0)
    else:
        out_ref[...] = jax.lax.fori_loop(first, last, add, jnp.zeros((rows, tile), jnp.float32))


def _whole_pieces(x_ref, values_ref, index, step: int, bits: int):
    """Quarters for a single row, of which each thread keeps one; else all at once."""
    del bits
    size = step // 4 if len(x_ref) == 1 else step
    for piece in range(step // size):
        at = pl.ds(index * step + piece * size, size)
        yield at, values_ref[at, :].astype(jnp.int32)


def _packed_pieces(x_ref, values_ref, index, step: int, bits: int):
    """One piece for each of the four fields of bytes; unsigned."""
    blocks, quarter = step // BLOCK, x_ref.shape[1] // 4
    at = pl.ds(index * blocks, blocks)
    low = values_ref[at, pl.ds(0, 8), :].astype(jnp.int32)
    high = _third_bits(values_ref, at, low.shape) if bits == 3 else None
    for field in range(4):
        part = (low >> (2 * field)) & 3
        if high is not None:
            part |= (high >> (2 * field)) & 4
        yield pl.ds(field * quarter + index * 8 * blocks, 8 * blocks), part.reshape(8 * blocks, -1)


def _third_bits(values_ref, at, shape: tuple[int, ...]) -> Array:
    """Bytes of the third bit, that of the first field worth 4.

    Four rows hold it for the first four inputs, and one position further for the others.
    """
    rows = values_ref[at, pl.ds(8, 4), :].astype(jnp.int32) << 2
    rows = jnp.broadcast_to(rows[:, None], (shape[0], 2, *rows.shape[1:])).reshape(shape)
    return rows >> (jax.lax.broadcasted_iota(jnp.int32, shape, 1) >> 2)


def _dot(left: Array, right: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)
