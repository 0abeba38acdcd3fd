"""The two layouts in which Hugging Face checkpoints hold 4-bit matrices, as pure functions on NumPy arrays.

Both put eight unsigned 4-bit values ("nibbles") into an int32, the first in its lowest bits, with w = (q - z) s:

    AutoAWQ "gemm"   qweight (inputs, outputs / 8)   along the outputs, in the order 0 2 4 6 1 3 5 7
                     qzeros  (groups, outputs / 8)   likewise
    GPTQ             qweight (inputs / 8, outputs)   along the inputs, in their own order
                     qzeros  (groups, outputs / 8)   along the outputs, in their own order; version 1 stores z - 1
                     g_idx   (inputs,)               the group of each input

Scales are (groups, outputs) in both. Our integers and zero points are signed, 8 lower than theirs: a difference that
(q - z) does not see. AWQ: Lin et al., 2024 (arXiv 2306.00978). GPTQ: Frantar et al., 2023 (arXiv 2210.17323).
"""

import numpy as np
from jaxtyping import Int8, Int32, UInt8

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The nibble at position i of a word belongs to output AWQ_ORDER[i] of its eight."""

NIBBLES, OFFSET = 8, 8
"""Nibbles of a word, and how much higher than ours the unsigned integers are."""

_WORD = np.dtype("<u4")


def pack_nibbles(nibbles: UInt8[np.ndarray, "*n 8"]) -> Int32[np.ndarray, "*n"]:
    """Puts eight values in [0, 15] into a word, the first in its lowest bits."""
    pairs = nibbles[..., 0::2] | (nibbles[..., 1::2] << np.uint8(4))
    return np.ascontiguousarray(pairs).view(_WORD)[..., 0].astype(np.int32)


def unpack_nibbles(words: Int32[np.ndarray, "*n"]) -> UInt8[np.ndarray, "*n 8"]:
    """The inverse of `pack_nibbles`."""
    pairs = np.ascontiguousarray(words.astype(_WORD)[..., None]).view(np.uint8)
    return np.stack([pairs & np.uint8(15), pairs >> np.uint8(4)], axis=-1).reshape(*words.shape, NIBBLES)


def pack_awq(integers: Int8[np.ndarray, "r o"]) -> Int32[np.ndarray, "r w"]:
    """Signed integers in [-8, 7] -> words of AutoAWQ's layout: qweight, or qzeros of zero points; w = o / 8."""
    nibbles = _unsigned(integers).reshape(integers.shape[0], -1, NIBBLES)
    return pack_nibbles(nibbles[..., list(AWQ_ORDER)])


def unpack_awq(words: Int32[np.ndarray, "r w"]) -> Int8[np.ndarray, "r o"]:
    """The inverse of `pack_awq`."""
    nibbles = unpack_nibbles(words)[..., np.argsort(AWQ_ORDER)]
    return _signed(nibbles.reshape(words.shape[0], -1))


def unpack_gptq_weights(words: Int32[np.ndarray, "w o"]) -> Int8[np.ndarray, "i o"]:
    """The qweight of a GPTQ checkpoint -> signed integers; i = 8 w."""
    nibbles = np.moveaxis(unpack_nibbles(words), -1, 1)
    return _signed(nibbles.reshape(-1, words.shape[1]))


def unpack_gptq_zeros(words: Int32[np.ndarray, "g w"], added: int) -> Int8[np.ndarray, "g o"]:
    """The qzeros of a GPTQ checkpoint -> signed zero points.

    Args:
        words: eight outputs each.
        added: what the format takes off before storing and readers add, modulo 16: 1 in version 1, else 0.
    """
    nibbles = unpack_nibbles(words).reshape(words.shape[0], -1)
    return _signed((nibbles + np.uint8(added)) & np.uint8(15))


def group_order(groups: Int32[np.ndarray, " i"], count: int) -> Int32[np.ndarray, " i"] | None:
    """The inputs, sorted by group without changing their order within one; row k of a sorted matrix is input order[k].

    Args:
        groups: the group of each input (g_idx).
        count: number of groups.

    Returns:
        The order, or None if the inputs stand in it already.

    Raises:
        ValueError: the groups are not `count` groups of one size.
    """
    if groups.size and (groups.min() < 0 or groups.max() >= count):
        raise ValueError(f"holds groups from {groups.min()} to {groups.max()}, expected 0 to {count - 1}")
    sizes = np.bincount(groups, minlength=count)
    if (sizes != groups.size // count).any():
        raise ValueError(f"makes groups of {sizes.min()} to {sizes.max()} inputs; allowed: groups of one size")
    order = np.argsort(groups, kind="stable").astype(np.int32)
    return None if np.array_equal(order, np.arange(groups.size)) else order


def _unsigned(integers: Int8[np.ndarray, "r o"]) -> UInt8[np.ndarray, "r o"]:
    return (integers + np.int8(OFFSET)).astype(np.uint8)


def _signed(nibbles: UInt8[np.ndarray, "r o"]) -> Int8[np.ndarray, "r o"]:
    return nibbles.astype(np.int8) - np.int8(OFFSET)
