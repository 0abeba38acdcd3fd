"""A product of few rows with a stored weight for TPUs: integers travel, and become numbers where they are used.

Decode reads every weight once for a handful of rows, so its time is that of the bytes that travel. A block of integers
comes into the vector memory as it is stored, becomes numbers there, and meets the rows; scales are applied to the
products, group after group. The plain JAX form is `quantization.groupwise`, which by the compiler's count moves no more
bytes: which of them is faster, only a TPU can tell (`benchmarks/kernels.py`).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.packing import BLOCK, FIELDS

LANES = 128
"""Entries of a vector register's last axis: blocks are multiples of them, or whole."""

BLOCK_INPUTS, BLOCK_OUTPUTS = 1024, 512
"""Most inputs and outputs of a block: at 8 bits half a megabyte of integers, two of what they are restored to."""

WHOLE_INPUTS = 2048
"""Most inputs that are taken at once where they do not fall into blocks."""

_ROWS = 16
"""Rows are filled up to a multiple of these, the sublanes of a bfloat16 register."""


def block_inputs(inputs: int, format: TensorFormat) -> int | None:
    """Inputs of a block: whole groups and whole packed blocks; None: this form does not fit."""
    if format.activation_bits != 16 or inputs % (BLOCK if format.bits in FIELDS else 1):
        return None
    group = inputs if format.group_size == -1 else format.group_size
    if format.bits in FIELDS and group % BLOCK:
        return None
    unit = LANES if format.group_size == -1 else math.lcm(LANES, group)
    fitting = [size for size in range(unit, min(inputs, BLOCK_INPUTS) + 1, unit) if inputs % size == 0]
    if fitting:
        return fitting[-1]
    return inputs if inputs <= WHOLE_INPUTS else None


def product(
    x: Float[Array, "m i"],
    values: Array,
    scales: Float[Array, "g o"],
    zero_points: Array | None,
    format: TensorFormat,
    *,
    interpret: bool = False,
) -> Float[Array, "m o"]:
    """X @ W in float32, for a weight that has `block_inputs`.

    Args:
        x: rows, the inputs in the order in which they are stored; float32 or bfloat16, as the products are then.
        values: as `quantization.storage` holds them.
        scales: one per group and output.
        zero_points: likewise, or None.
        format: what they mean.
        interpret: run the kernel by Pallas' interpreter, on any device.
    """
    (rows, inputs), outputs = x.shape, scales.shape[1]
    size = block_inputs(inputs, format)
    assert size is not None
    steps, width = inputs // size, min(outputs, BLOCK_OUTPUTS)
    per_step = 1 if format.group_size == -1 else size // format.group_size
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    if format.bits in FIELDS:  # blocks of whole rows of bytes
        packed = BLOCK * format.bits // 8
        values = values.reshape(-1, packed, outputs)
        stored = pl.BlockSpec((size // BLOCK, packed, width), lambda o, i: (i, 0, o))
    else:
        stored = pl.BlockSpec((size, width), lambda o, i: (i, o))
    per_channel = format.group_size == -1

    def grid_of(array: Array) -> Array:
        return array.reshape(1 if per_channel else steps, per_step, outputs)

    # Of all steps the same scales, if there is one per output: a block that stays is not fetched again.
    grid = pl.BlockSpec((1, per_step, width), lambda o, i: (0 if per_channel else i, 0, o))
    operands = [x, values, grid_of(scales.astype(jnp.float32))]
    specs = [pl.BlockSpec((len(x), size), lambda o, i: (0, i)), stored, grid]
    if zero_points is not None:
        operands.append(grid_of(zero_points.astype(jnp.int32)))
        specs.append(grid)
    out = pl.pallas_call(
        functools.partial(_kernel, format=format, groups=per_step),
        out_shape=jax.ShapeDtypeStruct((len(x), outputs), jnp.float32),
        grid=(pl.cdiv(outputs, width), steps),
        in_specs=specs,
        out_specs=pl.BlockSpec((len(x), width), lambda o, i: (0, o)),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name=f"quantized_matmul_{format.bits}_bit",
    )(*operands)
    return out[:rows]


def _kernel(x_ref, values_ref, scales_ref, *refs, format: TensorFormat, groups: int):
    zero_ref, out_ref = refs if len(refs) == 2 else (None, refs[0])

    @pl.when(pl.program_id(1) == 0)
    def _():
        out_ref[...] = jnp.zeros_like(out_ref)

    x, integers = x_ref[...], _integers(values_ref, format)
    size = x.shape[1] // groups
    total = out_ref[...]
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        block = integers[part]
        if zero_ref is not None:
            block = block - zero_ref[0, group : group + 1]
        # Through float32: not every type of integer can become bfloat16 at once.
        block = block.astype(jnp.float32).astype(x.dtype)
        total += jnp.dot(x[:, part], block, preferred_element_type=jnp.float32) * scales_ref[0, group : group + 1]
    out_ref[...] = total


def _integers(ref, format: TensorFormat) -> Array:
    """Signed integers (inputs, outputs) of a block, int32."""
    if format.bits not in FIELDS:
        return ref[...].astype(jnp.int32)
    bytes_ = ref[...].astype(jnp.int32)  # (packed blocks, rows of a block, outputs)
    low = bytes_[:, :8]
    parts = [(low >> position) & 3 for position in (0, 2, 4, 6)]
    if format.bits == 3:
        # Four rows hold the high bits of eight inputs: those of the first four, and one position further the others'.
        high = jnp.concatenate([bytes_[:, 8:12]] * 2, axis=1)
        further = jax.lax.broadcasted_iota(jnp.int32, high.shape, 1) >> 2
        parts = [part | (((high >> (2 * n + further)) & 1) << 2) for n, part in enumerate(parts)]
    values = jnp.concatenate(parts, axis=1) - 2 ** (format.bits - 1)
    return values.reshape(-1, values.shape[-1])
