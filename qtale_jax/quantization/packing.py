"""2- and 3-bit integers stored in exactly 2 and 3 bits, for any number of inputs.

Inputs are taken in blocks of 32. Signed values have 2^(b-1) added, and the result is cut into fields: 2 bits are one
field of 2, 3 bits are a field of 2 (the low bits) and a field of 1 (the high bit). A field of f bits of a block takes
4 f bytes per output; byte r holds the inputs r, r + 4f, r + 8f, ... of the block, the first in its lowest bits:

    2-bit field, 8 bytes     bits 7 6    5 4    3 2   1 0
                       r       r + 24  r + 16  r + 8   r

    1-bit field, 4 bytes     bit 7      6     ...   1    0
                       r       r + 28  r + 24  ... r + 4 r

A block is the bytes of its fields, one after the other: 8 rows of bytes at 2 bits, 12 at 3. Inputs that do not fill the
last block are padded with zero bits. Nothing crosses a byte, so a field is one shift and one mask, and each of its
8 / f positions meets a strided slice of the inputs: a product with few rows needs no unpacked matrix (`blockwise`).
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt8

BLOCK = 32

FIELDS = {2: (2,), 3: (2, 1)}
"""Widths of the fields of a value, from its lowest bits up."""


def packed_rows(inputs: int, bits: int) -> int:
    """Rows of bytes that `inputs` values of `bits` bits take."""
    return -(-inputs // BLOCK) * BLOCK * bits // 8


def pack(values: Int8[Array, "i o"], bits: int) -> UInt8[Array, "r o"]:
    """Packs signed integers in [-2^(bits-1), 2^(bits-1) - 1] along the inputs."""
    inputs, outputs = values.shape
    shifted = (values.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint8)
    blocks = jnp.pad(shifted, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, BLOCK, outputs)
    rows, low = [], 0
    for width in FIELDS[bits]:
        field = (blocks >> jnp.uint8(low)) & jnp.uint8(2**width - 1)
        positions = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(1, -1, 1, 1)
        parts = field.reshape(-1, 8 // width, 4 * width, outputs) << positions
        rows.append(jnp.sum(parts, axis=1, dtype=jnp.uint8))  # the parts share no bit
        low += width
    return jnp.concatenate(rows, axis=1).reshape(-1, outputs)


def fields(rows: UInt8[Array, "n r o"], bits: int) -> Iterator[tuple[int, int, UInt8[Array, "n s o"]]]:
    """Yields (lowest bit, width, its rows) for each field of packed blocks (blocks, rows of a block, outputs)."""
    low, start = 0, 0
    for width in FIELDS[bits]:
        yield low, width, rows[:, start : start + 4 * width]
        low, start = low + width, start + 4 * width


def unpack(rows: UInt8[Array, "r o"], bits: int, inputs: int) -> Int8[Array, "i o"]:
    """The inverse of `pack`; `inputs` cuts the padding off."""
    outputs = rows.shape[1]
    value = jnp.zeros((), jnp.uint8)
    for low, width, field in fields(rows.reshape(-1, BLOCK * bits // 8, outputs), bits):
        positions = jnp.arange(0, 8, width, dtype=jnp.uint8).reshape(1, -1, 1, 1)
        part = (field[:, None] >> positions) & jnp.uint8(2**width - 1)
        value = value | (part.reshape(-1, BLOCK, outputs) << jnp.uint8(low))
    signed = value.astype(jnp.int8) - jnp.int8(2 ** (bits - 1))
    return signed.reshape(-1, outputs)[:inputs]
