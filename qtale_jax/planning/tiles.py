"""What arrays take in a TPU's memory, where they lie in tiles: of 128 lanes, and of up to eight rows of 32 bits.

The last axis is padded to lanes and the one before it to rows. Which axes come last the compiler chooses for the
arguments of a program, so that the padding is least; arrays of layers are therefore hardly padded, scalars and the
arrays of tiny models are.
"""

import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from qtale_jax.quantization.storage import array_bytes

LANES, ROWS = 128, 8


def tiled_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Bytes of an array that is an argument of a program for TPUs."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    bits = 4 if leaf.dtype == jnp.dtype(jnp.int4) else 8 * leaf.dtype.itemsize
    packed = max(1, 32 // bits)  # so many numbers share a word, and are rows of one lane
    if len(leaf.shape) < 2:
        size = _padded(math.prod(leaf.shape), LANES * packed, LANES * ROWS)
        return size * bits // 8
    sizes = []
    for last, before in itertools.permutations(range(len(leaf.shape)), 2):
        rest = math.prod(size for axis, size in enumerate(leaf.shape) if axis not in (last, before))
        lanes, rows = -(-leaf.shape[last] // LANES) * LANES, _padded(leaf.shape[before], packed, ROWS)
        sizes.append(rest * rows * lanes * bits // 8)
    return min(sizes)


def padding(leaves: Iterable[jax.ShapeDtypeStruct]) -> int:
    """Bytes that the tiles of some arguments take beyond the numbers in them."""
    return sum(tiled_bytes(leaf) - array_bytes(leaf) for leaf in leaves)


def _padded(size: int, least: int, most: int) -> int:
    """`size` rounded up to the tile that it is given: the smallest, doubled while it is too small, up to `most`."""
    tile = least
    while tile < min(size, most):
        tile *= 2
    return -(-size // tile) * tile
