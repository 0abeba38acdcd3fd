"""The keys and values that one layer keeps for later tokens, in floating point or in int8.

`LayerCache.insert` writes them, `key.astype(dtype)` and `value.astype(dtype)` read them, in either form. A block reads
back what it has just inserted, so queries see the rounded keys and values in prefill as in decode.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int8, Int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RoundedVectors:
    """Vectors along the last axis as integers in [-127, 127], each with its own scale: x ~= values * scales."""

    values: Int8[Array, "*n d"]
    scales: Float32[Array, "*n"]

    def astype(self, dtype: jnp.dtype) -> Float[Array, "*n d"]:
        """The vectors in floating point: restored in float32, returned as `dtype`."""
        return (self.values.astype(jnp.float32) * self.scales[..., None]).astype(dtype)


def round_vectors(x: Float[Array, "*n d"]) -> RoundedVectors:
    """Rounds each vector to int8, symmetric, with a scale of max|x| / 127: no element moves by more than half of it.

    A vector of zeros has scale 1, and so has one whose scale would not be a normal float32. A vector that holds an
    infinity or NaN comes back as NaN.
    """
    wide = x.astype(jnp.float32)
    scales = jnp.max(jnp.abs(wide), axis=-1) / 127
    scales = jnp.where(scales < float(jnp.finfo(jnp.float32).tiny), 1.0, scales)
    # An infinity divided by itself is NaN, which has no integer; its scale says so instead.
    scales = jnp.where(jnp.isfinite(scales), scales, jnp.nan)
    return RoundedVectors(jnp.round(wide / scales[..., None]).astype(jnp.int8), scales)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one layer, by position: b rows, s slots, k heads of width d.

    `kept` says which slots belong to tokens that executed the layer; what stands in the others is never seen.
    """

    key: Float[Array, "b s k d"] | RoundedVectors
    value: Float[Array, "b s k d"] | RoundedVectors
    kept: Bool[Array, "b s"]

    def insert(
        self,
        slots: Int32[Array, "b t"],
        key: Float[Array, "b t k d"],
        value: Float[Array, "b t k d"],
        execute: Bool[Array, "b t"],
    ) -> "LayerCache":
        """Writes the tokens at `slots`, in the form that the cache has."""
        rows = jnp.arange(slots.shape[0])[:, None]

        def write(stored, new):
            new = round_vectors(new) if isinstance(stored, RoundedVectors) else new.astype(stored.dtype)
            return jax.tree.map(lambda old, entry: old.at[rows, slots].set(entry), stored, new)

        return LayerCache(write(self.key, key), write(self.value, value), write(self.kept, execute))


def empty_cache(batch: int, slots: int, heads: int, width: int, dtype: jnp.dtype) -> LayerCache:
    """A cache in which nothing is kept.

    Args:
        batch: rows.
        slots: tokens per row.
        heads: KV heads.
        width: of a head.
        dtype: a floating-point type, or int8 for integers with one float32 scale per token and head.

    Raises:
        ValueError: another type.
    """
    dtype, shape = jnp.dtype(dtype), (batch, slots, heads, width)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a cache holds floating point or int8, found {dtype}")

    def zeros():
        values = jnp.zeros(shape, dtype)
        return RoundedVectors(values, jnp.ones(shape[:-1], jnp.float32)) if dtype == jnp.int8 else values

    return LayerCache(zeros(), zeros(), jnp.zeros((batch, slots), jnp.bool_))


def cache_bytes(caches: Any) -> int:
    """Bytes of all arrays in a pytree of caches, scales and `kept` included; shapes without memory count alike."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(caches))
