"""How a quantized matrix is held in memory and on disk: int8, int4, or packed bytes, with scales and zero points."""

import jax
import jax.numpy as jnp
import qwix
from jaxtyping import Array, Float, Int32

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.packing import pack, packed_rows, unpack
from qtale_jax.quantization.rounding import Rounded, dequantize, quantize

Stored = dict[str, Array]
"""values, scales, zero_points unless symmetric, and order if permuted."""

PACKED = (2, 3)
"""Bit widths without a hardware type, stored as fields of bytes."""


def _integer(bits: int) -> jnp.dtype:
    return jnp.dtype(jnp.int4) if bits == 4 else jnp.dtype(jnp.int8)


def store(weight: Float[Array, "i o"], format: TensorFormat) -> Stored:
    """Rounds a matrix to nearest and lays it out."""
    return lay_out(quantize(weight, format), format)


def lay_out(rounded: Rounded, format: TensorFormat, order: Int32[Array, " i"] | None = None) -> Stored:
    """Integers of any quantizer -> stored arrays.

    Args:
        rounded: integers, scales and zero points, the inputs in the order in which they are stored.
        format: how they are stored.
        order: for permuted formats, the input that each stored row belongs to.
    """
    integer = _integer(format.bits)
    packed = format.bits in PACKED
    stored = {
        "values": pack(rounded.values, format.bits) if packed else rounded.values.astype(integer),
        "scales": rounded.scales,
    }
    if rounded.zero_points is not None:
        stored["zero_points"] = rounded.zero_points.astype(integer)
    if order is not None:
        stored["order"] = order.astype(jnp.int32)
    return stored


def abstract(shape: tuple[int, int], format: TensorFormat) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of `store` without weights."""
    inputs, outputs = shape
    groups, integer = format.groups(inputs), _integer(format.bits)
    if format.bits in PACKED:
        values = jax.ShapeDtypeStruct((packed_rows(inputs, format.bits), outputs), jnp.uint8)
    else:
        values = jax.ShapeDtypeStruct(shape, integer)
    arrays = {"values": values, "scales": jax.ShapeDtypeStruct((groups, outputs), jnp.dtype(format.scale_dtype))}
    if not format.symmetric:
        arrays["zero_points"] = jax.ShapeDtypeStruct((groups, outputs), integer)
    if format.permuted:
        arrays["order"] = jax.ShapeDtypeStruct((inputs,), jnp.int32)
    return arrays


def recover(stored: Stored, shape: tuple[int, int], format: TensorFormat) -> Rounded:
    """The integers behind stored arrays, the inputs in the order in which they are stored."""
    values = stored["values"]
    values = unpack(values, format.bits, shape[0]) if format.bits in PACKED else values.astype(jnp.int8)
    zero_points = stored.get("zero_points")
    return Rounded(values, stored["scales"], None if zero_points is None else zero_points.astype(jnp.int8))


def unstore(
    stored: Stored, shape: tuple[int, int], format: TensorFormat, dtype: jnp.dtype = jnp.float32
) -> Float[Array, "i o"]:
    """The weight that stored arrays stand for, its inputs in their own order."""
    weight = dequantize(recover(stored, shape, format), dtype)
    return jnp.zeros_like(weight).at[stored["order"]].set(weight) if "order" in stored else weight


def as_qarray(stored: Stored, format: TensorFormat) -> qwix.QArray:
    """An 8- or 4-bit matrix as `qwix.QArray`, for qwix's integer dots.

    Raises:
        ValueError: packed widths have no QArray form.
    """
    if format.bits in PACKED:
        raise ValueError(f"{format.bits}-bit values are packed, not a QArray")
    return qwix.QArray(stored["values"], stored["scales"], stored.get("zero_points"))


def storage_bytes(shape: tuple[int, int], format: TensorFormat) -> int:
    """Bytes that a (inputs, outputs) matrix takes in `format`: integers, scales, zero points and order."""
    return sum(map(array_bytes, abstract(shape, format).values()))


def array_bytes(leaf: Array | jax.ShapeDtypeStruct) -> int:
    """Bytes that an array takes; two int4 share one."""
    if leaf.dtype == jnp.dtype(jnp.int4):
        return -(-leaf.size // 2)
    return leaf.size * leaf.dtype.itemsize
