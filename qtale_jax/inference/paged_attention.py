"""Attention of some tokens to each other and to the pages that their layer keeps, with the work that those need.

The pages are read block by block in a loop that ends with the last one in use, and a running softmax joins the blocks
(Milakov & Gimelshein, 2018; Rabe & Staats, 2021): nothing is computed for slots that have not been filled, and neither
the pool's size nor the longest sequence is part of the program.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from qtale_jax.inference.pages import Pool, Stored
from qtale_jax.kernels.choice import runs_gpu_kernels
from qtale_jax.kernels.gpu import page_attention as gpu_attention
from qtale_jax.kernels.tpu import page_attention as tpu_attention
from qtale_jax.models.attention import HIDDEN, attention_scores
from qtale_jax.models.cache import RoundedVectors
from qtale_jax.models.specification import Kernels

BLOCK = 128
"""Slots that one turn of the loop reads: enough that the turn costs little beside them, few enough for the cache."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What one layer keeps for b rows: their pages in the pool, and how many tokens stand in them."""

    pool: Pool
    table: Int32[Array, "b q"]
    counts: Int32[Array, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fresh:
    """Keys and values of the call itself, which no page holds yet; `kept` says which of them can be seen."""

    key: Stored
    value: Stored
    positions: Int32[Array, "b s"]
    kept: Bool[Array, "b s"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Running:
    """Softmax over the keys so far: their largest score, the sum of weights, the weighted sum of values; float32."""

    top: Float[Array, "b k g c"]
    mass: Float[Array, "b k g c"]
    total: Float[Array, "b k g c d"]

    def joined(self, scores: Float[Array, "b k g c s"], value: Float[Array, "b s k d"]) -> "_Running":
        """With more keys; scores of those that are not seen are `HIDDEN`."""
        top = jnp.maximum(self.top, jnp.max(scores, axis=-1))
        weights, rescale = jnp.exp(scores - top[..., None]), jnp.exp(self.top - top)
        part = jnp.einsum("bkgcs,bskd->bkgcd", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return _Running(top, self.mass * rescale + jnp.sum(weights, axis=-1), self.total * rescale[..., None] + part)

    def merged(self, other: "_Running") -> "_Running":
        """Over the keys of both."""
        top = jnp.maximum(self.top, other.top)
        ours, theirs = jnp.exp(self.top - top), jnp.exp(other.top - top)
        total = self.total * ours[..., None] + other.total * theirs[..., None]
        return _Running(top, self.mass * ours + other.mass * theirs, total)


def attend_pages(
    query: Float[Array, "b c n d"],
    positions: Int32[Array, "b c"],
    fresh: Fresh,
    kept: Kept,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    kernels: Kernels = "auto",
) -> Float[Array, "b c n d"]:
    """Softmax attention of queries to the fresh keys that are not later, and to all kept ones, which are earlier.

    Args:
        query: rotated queries.
        positions: of the queries.
        fresh: keys and values of this call.
        kept: keys and values of earlier calls.
        window: a query sees the keys of this many positions, its own and those before it; None: all.
        scale: what scores are multiplied by; None: d ** -0.5.
        softcap: what they are capped at; None: nothing.
        kernels: see `ModelSpecification`; the kernel is for one query per row that sees all kept keys.

    Returns:
        In the type of `query`; scores, softmax and sums are float32. A query that sees nothing gives some finite row.
    """
    batch, length, heads, width = query.shape
    dtype, groups = query.dtype, fresh.key.astype(query.dtype).shape[2]
    grouped = query.reshape(batch, length, groups, heads // groups, width)

    def scores(key: Float[Array, "b s k d"], visible: Bool[Array, "b _ s"]) -> Float[Array, "b k g c s"]:
        return jnp.where(visible[:, None, None], attention_scores(grouped, key, scale, softcap), HIDDEN)

    def inside(visible: Bool[Array, "b _ s"], keys: Int32[Array, "b s"]) -> Bool[Array, "b _ s"]:
        return visible if window is None else visible & (positions[:, :, None] - keys[:, None, :] < window)

    seen = fresh.kept[:, None, :] & (fresh.positions[:, None, :] <= positions[:, :, None])
    seen = inside(seen, fresh.positions)
    shape = (batch, groups, heads // groups, length)
    empty = _Running(
        jnp.full(shape, HIDDEN, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros((*shape, width), jnp.float32)
    )
    start = empty.joined(scores(fresh.key.astype(dtype), seen), fresh.value.astype(dtype))

    page = kept.pool.positions.shape[1]
    at_once = max(1, min(BLOCK // page, kept.table.shape[1]))
    table = jnp.pad(kept.table, ((0, 0), (0, -kept.table.shape[1] % at_once)))

    def block(turn, running):
        pages = jax.lax.dynamic_slice_in_dim(table, turn * at_once, at_once, axis=1)
        part = jax.tree.map(lambda leaf: leaf[pages].reshape(batch, at_once * page, *leaf.shape[2:]), kept.pool)
        slot = turn * at_once * page + jnp.arange(at_once * page, dtype=jnp.int32)
        filled = slot[None, :] < kept.counts[:, None]
        visible = inside(filled[:, None, :], part.positions)
        # A weight of 0 does not silence what another sequence may have left in the slot if that is not a number.
        value = jnp.where(filled[:, :, None, None], part.value.astype(dtype), jnp.zeros((), dtype))
        return running.joined(scores(part.key.astype(dtype), visible), value)

    def by_blocks(start: _Running) -> _Running:
        turns = (jnp.max(kept.counts) + at_once * page - 1) // (at_once * page)
        return jax.lax.fori_loop(0, turns, block, start)

    def by_kernel(kernel: Callable[..., tuple[Array, Array, Array]], start: _Running) -> _Running:
        scaled = width**-0.5 if scale is None else scale
        return start.merged(_kept_by_kernel(kernel, query, kept, groups, scaled, softcap))

    forms, plain = {}, by_blocks
    if length == 1 and window is None:
        if kernels == "pallas":
            forms["tpu"] = functools.partial(by_kernel, tpu_attention.attend_kept)
        if runs_gpu_kernels(kernels) and gpu_attention.fits(width, page):
            forms["cuda"] = functools.partial(by_kernel, gpu_attention.attend_kept)
        if kernels == "interpreted":
            plain = functools.partial(by_kernel, functools.partial(tpu_attention.attend_kept, interpret=True))
    found = jax.lax.platform_dependent(start, default=plain, **forms) if forms else plain(start)
    out = found.total / found.mass[..., None]
    return jnp.moveaxis(out, 3, 1).reshape(batch, length, heads, width).astype(dtype)


def _kept_by_kernel(
    kernel: Callable[..., tuple[Array, Array, Array]],
    query: Float[Array, "b 1 n d"],
    kept: Kept,
    groups: int,
    scale: float,
    softcap: float | None,
) -> _Running:
    (key, key_scale), (value, value_scale) = _parts(kept.pool.key), _parts(kept.pool.value)
    top, mass, total = kernel(
        query[:, 0],
        key,
        value,
        kept.table,
        kept.counts,
        scale=scale,
        softcap=softcap,
        key_scale=key_scale,
        value_scale=value_scale,
    )
    by_group = (query.shape[0], groups, query.shape[2] // groups, 1)
    return _Running(top.reshape(by_group), mass.reshape(by_group), total.reshape(*by_group, -1))


def _parts(vectors: Stored) -> tuple[Array, Array | None]:
    """Numbers and, of rounded vectors, their scales."""
    return (vectors.values, vectors.scales) if isinstance(vectors, RoundedVectors) else (vectors, None)
