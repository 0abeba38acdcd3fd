"""Attention of one query per row to the pages that its layer keeps, for TPUs: only pages in use travel from memory.

The plain form, `inference.paged_attention`, gathers the pages of a block into a new array before it reads them. Here
the page table is known before the kernel starts, and the pipeline fetches each page straight from the pool; turns
beyond a row's last page fetch nothing and compute nothing.

A page's keys of all KV heads are one matrix (slots x heads, d). Every query head is multiplied with all of it, and what
belongs to other heads is masked: the matrix unit has nothing else to do, and nothing has to be transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int32

from qtale_jax.models.attention import HIDDEN

PAGES_AT_ONCE = 8
"""Pages of a turn: 128 slots of 16."""


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
    pages, slots, groups, _ = key.shape
    at_once = min(PAGES_AT_ONCE, table.shape[1])
    turns = pl.cdiv(table.shape[1], at_once)
    table = jnp.pad(table, ((0, 0), (0, -table.shape[1] % at_once)))
    columns = slots * groups

    def page(index: int, row, turn, table, counts):
        # The last page in use again where there are no more: a block that stays is not fetched.
        last = jnp.maximum(_div(counts[row] + slots - 1, slots) - 1, 0)
        return table[row, jnp.minimum(turn * at_once + index, last)]

    def page_specs(shape: tuple[int, ...]) -> list[pl.BlockSpec]:
        def spec(index: int) -> pl.BlockSpec:
            return pl.BlockSpec((1, *shape), lambda *at: (page(index, *at), 0, 0))

        return [spec(index) for index in range(at_once)]

    operands, specs = [], []
    for pool, pool_scale in ((key, key_scale), (value, value_scale)):
        operands += [pool.reshape(pages, columns, width)] * at_once
        specs += page_specs((columns, width))
        if pool_scale is not None:
            operands += [pool_scale.reshape(pages, 1, columns)] * at_once
            specs += page_specs((1, columns))
    own = pl.BlockSpec((1, heads, width), lambda row, turn, *_: (row, 0, 0))
    single = pl.BlockSpec((1, heads, 1), lambda row, turn, *_: (row, 0, 0))
    kernel = functools.partial(
        _kernel,
        slots=slots,
        groups=groups,
        at_once=at_once,
        rounded=key_scale is not None,
        scale=scale,
        softcap=softcap,
    )
    top, mass, total = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((batch, heads, size), jnp.float32) for size in (1, 1, width)],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2, grid=(batch, turns), in_specs=[own, *specs], out_specs=[single, single, own]
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="attend_kept_pages",
    )(table, counts, query, *operands)
    return top[..., 0], mass[..., 0], total


def _kernel(table_ref, counts_ref, query_ref, *refs, slots, groups, at_once, rounded, scale, softcap):
    del table_ref
    top_ref, mass_ref, total_ref = refs[-3:]
    parts = [refs[start : start + at_once] for start in range(0, len(refs) - 3, at_once)]
    keys, key_scales, values, value_scales = parts if rounded else (parts[0], None, parts[1], None)
    row, turn = pl.program_id(0), pl.program_id(1)

    @pl.when(turn == 0)
    def _():
        top_ref[...] = jnp.full_like(top_ref, HIDDEN)
        mass_ref[...] = jnp.zeros_like(mass_ref)
        total_ref[...] = jnp.zeros_like(total_ref)

    query = query_ref[0]
    heads = query.shape[0]
    column = jax.lax.broadcasted_iota(jnp.int32, (heads, slots * groups), 1)
    head = jax.lax.broadcasted_iota(jnp.int32, (heads, slots * groups), 0)
    own_head = jax.lax.rem(column, jnp.int32(groups)) == _div(head, heads // groups)
    for index in range(at_once):
        first = (turn * at_once + index) * slots

        @pl.when(first < counts_ref[row])
        def _(index=index, first=first):
            filled = first + _div(column, groups) < counts_ref[row]
            scores = _dot(query, _wide(keys[index][0], query.dtype), 1) * scale
            if key_scales is not None:
                scores = scores * key_scales[index][0]
            if softcap is not None:
                scores = softcap * jnp.tanh(scores / softcap)
            scores = jnp.where(own_head & filled, scores, HIDDEN)
            top = jnp.maximum(top_ref[0], jnp.max(scores, axis=1, keepdims=True))
            # Where nothing is seen the weights would be exp(0).
            weights = jnp.where(own_head & filled, jnp.exp(scores - top), 0.0)
            rescale = jnp.exp(top_ref[0] - top)
            mass_ref[0] = mass_ref[0] * rescale + jnp.sum(weights, axis=1, keepdims=True)
            value = _wide(values[index][0], query.dtype)
            if value_scales is not None:
                weights = weights * jnp.where(filled, value_scales[index][0], 0.0)
            # A weight of 0 does not silence what another sequence may have left in a slot if that is not a number.
            slot = _div(jax.lax.broadcasted_iota(jnp.int32, value.shape, 0), groups)
            value = jnp.where(first + slot < counts_ref[row], value, jnp.zeros((), value.dtype))
            total_ref[0] = total_ref[0] * rescale + _dot(weights.astype(query.dtype), value, 0)
            top_ref[0] = top


def _div(x: Array, by: int) -> Array:
    """Quotients of what is not negative: `//` looks at signs, and how it does so depends on the TPU that is here."""
    return jax.lax.div(x, jnp.int32(by))


def _dot(left: Array, right: Array, axis: int) -> Array:
    return jax.lax.dot_general(left, right, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32)


def _wide(x: Array, dtype: jnp.dtype) -> Array:
    return x.astype(jnp.float32).astype(dtype) if x.dtype == jnp.int8 else x.astype(dtype)
