"""Attention of one query per row to the pages that its layer keeps, for GPUs: only pages in use travel from memory.

The plain form, `inference.paged_attention`, gathers the pages of a block into a new array before it reads them. Here
each program looks its pages up and reads them where they stand. The pages of a row are cut into spans, each a program
per KV head with a running softmax of its own, so that one long row keeps the whole GPU busy; the spans are joined
afterwards (Flash-Decoding, Dao et al., 2023).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Float32, Int32

from qtale_jax.models.attention import HIDDEN

SLOTS_AT_ONCE = 64
"""Slots of a turn."""

SPAN = 256
"""Fewest slots of a span, if a row has more."""

MOST_SPANS = 16
"""Spans of a row at most."""

_HEADS = 16
"""Query heads of a KV head are filled up to this power of two or a higher one: what the matrix unit takes at least."""


def fits(width: int, slots: int) -> bool:
    """Whether heads of this width and pages of so many slots have the sizes that the kernel handles: powers of two."""
    return width >= 16 and all(size & (size - 1) == 0 for size in (width, slots)) and slots <= SLOTS_AT_ONCE


def attend_kept(
    query: Float[Array, "b n d"],
    key: Array,
    value: Array,
    table: Int32[Array, "b q"],
    counts: Int32[Array, " b"],
    *,
    scale: float,
    softcap: float | None = None,
    key_scale: Float32[Array, "p s k"] | None = None,
    value_scale: Float32[Array, "p s k"] | None = None,
    interpret: bool = False,
) -> tuple[Float32[Array, "b n"], Float32[Array, "b n"], Float32[Array, "b n d"]]:
    """A running softmax over what the pages of each row hold: largest score, sum of weights, weighted sum of values.

    Args:
        query: rotated queries, one per row and head.
        key: (p, s, k, d), the pool: p pages of s slots, k KV heads, floating point or int8.
        value: likewise.
        table: pages of each row.
        counts: tokens that each row keeps.
        scale: what scores are multiplied by.
        softcap: what they are capped at; None: nothing.
        key_scale: of int8 keys, one per page, slot and head.
        value_scale: of int8 values.
        interpret: run the kernel by Pallas' interpreter, on any device.

    Returns:
        float32. A row that keeps nothing has the score `HIDDEN` and sums of 0.
    """
    batch, heads, width = query.shape
    _, slots, groups, _ = key.shape
    most = table.shape[1] * slots
    spans = min(MOST_SPANS, pl.cdiv(most, SPAN))
    turns = pl.cdiv(pl.cdiv(most, spans), SLOTS_AT_ONCE)
    per_group = heads // groups
    padded = max(_HEADS, pl.next_power_of_2(per_group))
    query = jnp.pad(query.reshape(batch, groups, per_group, width), ((0, 0), (0, 0), (0, padded - per_group), (0, 0)))

    def whole(array: Array) -> pl.BlockSpec:
        return pl.BlockSpec(array.shape, lambda *_: (0,) * array.ndim)

    operands = [table, counts]
    for pool, pool_scale in ((key, key_scale), (value, value_scale)):
        operands.append(pool.reshape(-1, width))
        if pool_scale is not None:
            operands.append(pool_scale.reshape(-1))
    own = pl.BlockSpec((None, None, padded, width), lambda row, group, span: (row, group, 0, 0))
    sums = pl.BlockSpec((None, None, None, padded, width), lambda row, group, span: (row, span, group, 0, 0))
    single = pl.BlockSpec((None, None, None, padded), lambda row, group, span: (row, span, group, 0))
    shape = (batch, spans, groups, padded)
    top, mass, total = pl.pallas_call(
        functools.partial(
            _kernel,
            slots=slots,
            groups=groups,
            turns=turns,
            rounded=key_scale is not None,
            scale=scale,
            softcap=softcap,
        ),
        out_shape=[jax.ShapeDtypeStruct(part, jnp.float32) for part in (shape, shape, (*shape, width))],
        grid=(batch, groups, spans),
        in_specs=[own, *map(whole, operands)],
        out_specs=[single, single, sums],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_kept_pages",
    )(query, *operands)
    # Of all spans together.
    highest = jnp.max(top, axis=1)
    share = jnp.exp(top - highest[:, None])
    joined = [jnp.sum(mass * share, axis=1), jnp.sum(total * share[..., None], axis=1)]
    top, mass, total = (part[:, :, :per_group].reshape(batch, heads, *part.shape[3:]) for part in (highest, *joined))
    return top, mass, total


def _kernel(query_ref, table_ref, counts_ref, *refs, slots, groups, turns, rounded, scale, softcap):
    *pool_refs, top_ref, mass_ref, total_ref = refs
    key_ref, key_scale_ref, value_ref, value_scale_ref = (
        pool_refs if rounded else (pool_refs[0], None, pool_refs[1], None)
    )
    row, group, span = (pl.program_id(axis) for axis in range(3))
    query, count = query_ref[...], counts_ref[row]
    lanes = jnp.arange(SLOTS_AT_ONCE, dtype=jnp.int32)
    entries = jnp.arange(query.shape[1], dtype=jnp.int32)[None]

    def join(turn, running):
        top, mass, total = running
        slot = turn * SLOTS_AT_ONCE + lanes
        filled = slot < count
        pages = plgpu.load(table_ref.at[row, jnp.where(filled, slot // slots, 0)], mask=filled, other=0)
        at = (pages * slots + slot % slots) * groups + group
        key = plgpu.load(key_ref.at[at[:, None], entries], mask=filled[:, None], other=0).astype(query.dtype)
        scores = _dot(query, key.T) * scale
        if key_scale_ref is not None:
            scores = scores * plgpu.load(key_scale_ref.at[at], mask=filled, other=0)[None]
        if softcap is not None:
            scores = softcap * _tanh(scores / softcap)
        scores = jnp.where(filled[None], scores, HIDDEN)
        highest = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.where(filled[None], jnp.exp(scores - highest[:, None]), 0.0)
        rescale = jnp.exp(top - highest)
        mass = mass * rescale + jnp.sum(weights, axis=1)
        value = plgpu.load(value_ref.at[at[:, None], entries], mask=filled[:, None], other=0).astype(query.dtype)
        if value_scale_ref is not None:
            weights = weights * plgpu.load(value_scale_ref.at[at], mask=filled, other=0)[None]
        return highest, mass, total * rescale[:, None] + _dot(weights.astype(query.dtype), value)

    empty = jnp.zeros((len(query),), jnp.float32)
    start = (empty + HIDDEN, empty, jnp.zeros(query.shape, jnp.float32))
    last = jnp.minimum((span + 1) * turns, (count + SLOTS_AT_ONCE - 1) // SLOTS_AT_ONCE)
    top_ref[...], mass_ref[...], total_ref[...] = jax.lax.fori_loop(span * turns, last, join, start)


def _dot(left: Array, right: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if left.dtype == jnp.float32 else None
    return jnp.dot(left, right, precision=precision, preferred_element_type=jnp.float32)


def _tanh(x: Array) -> Array:
    # By exponentials of what is not positive: Triton has no hyperbolic tangent of its own.
    fade = jnp.exp(-2 * jnp.abs(x))
    return jnp.sign(x) * (1 - fade) / (1 + fade)
