"""Bit planes: 2- and 3-bit integers stored in exactly 2 and 3 bits, for any number of inputs.

Inputs are taken in blocks of 32. A block of b-bit integers becomes b words of 32 bits, one per bit plane:

    input of the block     31 30 29 ...  1  0        packed row
    plane 0 (lowest bit) [  .  .  .  ...  .  . ]     b * block + 0
    plane 1              [  .  .  .  ...  .  . ]     b * block + 1
    plane 2 (if b = 3)   [  .  .  .  ...  .  . ]     b * block + 2

so bit i of row (b * block + p) is bit p of input 32 * block + i. Signed values are stored with 2^(b-1) added. Inputs
that do not fill the last block are padded with zero bits. No field crosses a word, so unpacking is b shifts, masks and
ors per value without any gather, which vectorises on every device.
"""

import jax.numpy as jnp
from jaxtyping import Array, Int8, UInt32

BLOCK = 32


def packed_rows(inputs: int, bits: int) -> int:
    """Rows of 32-bit words that `inputs` values of `bits` bits take."""
    return -(-inputs // BLOCK) * bits


def pack(values: Int8[Array, "i o"], bits: int) -> UInt32[Array, "r o"]:
    """Packs signed integers in [-2^(bits-1), 2^(bits-1) - 1] along the inputs."""
    inputs, outputs = values.shape
    shifted = (values.astype(jnp.int32) + 2 ** (bits - 1)).astype(jnp.uint32)
    blocks = jnp.pad(shifted, ((0, -inputs % BLOCK), (0, 0))).reshape(-1, 1, BLOCK, outputs)
    planes = jnp.arange(bits, dtype=jnp.uint32).reshape(1, bits, 1, 1)
    positions = jnp.arange(BLOCK, dtype=jnp.uint32).reshape(1, 1, BLOCK, 1)
    words = jnp.sum(((blocks >> planes) & jnp.uint32(1)) << positions, axis=2, dtype=jnp.uint32)
    return words.reshape(-1, outputs)


def unpack(words: UInt32[Array, "r o"], bits: int, inputs: int) -> Int8[Array, "i o"]:
    """The inverse of `pack`; `inputs` cuts the padding off."""
    outputs = words.shape[1]
    planes = words.reshape(-1, bits, 1, outputs)
    positions = jnp.arange(BLOCK, dtype=jnp.uint32).reshape(1, BLOCK, 1)
    value = jnp.zeros((planes.shape[0], BLOCK, outputs), jnp.uint32)
    for plane in range(bits):
        value = value | (((planes[:, plane] >> positions) & jnp.uint32(1)) << jnp.uint32(plane))
    signed = value.astype(jnp.int32) - 2 ** (bits - 1)
    return signed.reshape(-1, outputs)[:inputs].astype(jnp.int8)
