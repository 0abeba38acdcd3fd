"""The KV cache of skipping execution: pages of one pool that all layers and rows share.

A layer keeps the keys and values of the tokens that executed it, and of no others, in the order of their positions. The
tokens of a layer and row stand in pages of `PAGE` slots, which it takes from the pool when it needs one more: memory
follows what is kept, however unevenly layers and rows keep it, and one array shape serves all of that. The pool itself
grows in steps between compiled calls (PagedAttention, Kwon et al., 2023, where a sequence takes pages; here each layer
of a sequence does).
"""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Int32

from qtale_jax.models.cache import RoundedVectors, round_vectors
from qtale_jax.models.specification import Architecture

PAGE = 16
"""Slots of a page: half a page per layer and row is what rounding up wastes on average."""

Stored = Float[Array, "*n d"] | RoundedVectors
"""Keys or values in the form in which they are kept."""


def stored(x: Float[Array, "*n d"], dtype: jnp.dtype) -> Stored:
    """Vectors in the form in which a cache of `dtype` (floating point, or int8) keeps them."""
    return round_vectors(x) if dtype == jnp.int8 else x.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pool:
    """The pages: n of them, p slots each, k KV heads of width d. What stands in a slot of nobody's is never seen.

    Attributes:
        key: rotated keys.
        value: values.
        positions: of the tokens in their sequences; only a sliding window asks for them.
    """

    key: Stored
    value: Stored
    positions: Int32[Array, "n p"]

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return self.positions.shape[0]

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the stored keys and values."""
        return self.key.values.dtype if isinstance(self.key, RoundedVectors) else self.key.dtype


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PagedCache:
    """A pool and who has which of its pages: l layers, b rows, at most q pages each.

    Attributes:
        pool: the pages.
        order: page ids, those in use first.
        used: how many are in use.
        table: page ids of each layer and row, in the order of the tokens; those beyond `counts` mean nothing.
        counts: tokens that each layer and row keeps.
    """

    pool: Pool
    order: Int32[Array, " n"]
    used: Int32[Array, ""]
    table: Int32[Array, "l b q"]
    counts: Int32[Array, "l b"]

    def rows(self, rows: Int32[Array, " r"]) -> "PagedCache":
        """The same pool, with the tables of some rows only."""
        return dataclasses.replace(self, table=self.table[:, rows], counts=self.counts[:, rows])

    def with_rows(self, rows: Int32[Array, " r"], part: "PagedCache") -> "PagedCache":
        """Puts back what `rows` gave, after it was changed."""
        table, counts = self.table.at[:, rows].set(part.table), self.counts.at[:, rows].set(part.counts)
        return dataclasses.replace(part, table=table, counts=counts)

    def needed(self, new: int, active: Bool[Array, " b"]) -> Int32[Array, ""]:
        """Pages that are missing at most if every layer of every active row keeps `new` more tokens."""
        page = self.pool.positions.shape[1]
        more = pages_of(self.counts + new, page) - pages_of(self.counts, page)
        return jnp.sum(jnp.where(active[None, :], more, 0))

    def released(self, rows: Bool[Array, " b"]) -> "PagedCache":
        """Gives back what some rows have; what stands in their pages is nobody's until it is written over."""
        counts = jnp.where(rows[None, :], 0, self.counts)
        index = jnp.arange(self.table.shape[2], dtype=jnp.int32)[None, None, :]
        has = index < pages_of(counts, self.pool.positions.shape[1])[:, :, None]
        taken = jnp.where(has, self.table, self.pool.pages).reshape(-1)
        in_use = jnp.zeros((self.pool.pages,), jnp.bool_).at[taken].set(True, mode="drop")
        order = jnp.argsort(~in_use, stable=True).astype(jnp.int32)
        used = jnp.sum(in_use, dtype=jnp.int32)
        return dataclasses.replace(self, order=order, used=used, counts=counts)

    def append(
        self, key: Stored, value: Stored, positions: Int32[Array, "l b t"], kept: Bool[Array, "l b t"]
    ) -> "PagedCache":
        """Adds the `kept` ones of t tokens to each layer and row, taking pages for them; the pool has to have enough.

        Args:
            key: (l, b, t, k, d), stored form.
            value: likewise.
            positions: of the tokens.
            kept: which of them a layer keeps.
        """
        page = self.pool.positions.shape[1]
        rank = jnp.cumsum(kept, axis=2, dtype=jnp.int32) - 1
        counts = self.counts + jnp.sum(kept, axis=2, dtype=jnp.int32)
        before, after = pages_of(self.counts, page), pages_of(counts, page)
        taken = jnp.cumsum((after - before).reshape(-1), dtype=jnp.int32)
        first = self.used + taken.reshape(before.shape) - (after - before)
        index = jnp.arange(self.table.shape[2], dtype=jnp.int32)[None, None, :]
        fresh = jnp.take(self.order, first[:, :, None] + index - before[:, :, None], mode="clip")
        is_new = (index >= before[:, :, None]) & (index < after[:, :, None])
        table = jnp.where(is_new, fresh, self.table)
        slot = jnp.maximum(self.counts[:, :, None] + rank, 0)
        pages = jnp.take_along_axis(table, slot // page, axis=2, mode="clip")
        # What is not kept is written beyond the end, that is, nowhere.
        at = (jnp.where(kept, pages, self.pool.pages).reshape(-1), (slot % page).reshape(-1))

        def write(old: Array, new: Array) -> Array:
            return old.at[at].set(new.reshape(-1, *new.shape[3:]), mode="drop")

        pool = jax.tree.map(write, self.pool, Pool(key, value, positions))
        return PagedCache(pool, self.order, self.used + taken[-1], table, counts)


def pages_of(tokens: Int[Array, "*n"], page: int) -> Int[Array, "*n"]:
    """Pages that so many tokens fill or begin."""
    return (tokens + page - 1) // page


def empty_pages(
    architecture: Architecture, rows: int, slots: int, pages: int, dtype: jnp.dtype, page: int = PAGE
) -> PagedCache:
    """A cache that keeps nothing.

    Args:
        architecture: says what a token's keys and values are.
        rows: rows.
        slots: most tokens that a layer of a row can keep.
        pages: size of the pool.
        dtype: of keys and values: a floating-point type, or int8 (one float32 scale per token and KV head).
        page: slots of a page.

    Raises:
        ValueError: another type.
    """
    dtype = jnp.dtype(dtype)
    if dtype != jnp.int8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"a cache holds floating point or int8, found {dtype}")
    shape = (pages, page, architecture.num_kv_heads, architecture.head_dim)

    def zeros() -> Stored:
        values = jnp.zeros(shape, dtype)
        return RoundedVectors(values, jnp.ones(shape[:-1], jnp.float32)) if dtype == jnp.int8 else values

    layers = architecture.num_layers
    return PagedCache(
        Pool(zeros(), zeros(), jnp.zeros(shape[:2], jnp.int32)),
        jnp.arange(pages, dtype=jnp.int32),
        jnp.int32(0),
        jnp.zeros((layers, rows, -(-slots // page)), jnp.int32),
        jnp.zeros((layers, rows), jnp.int32),
    )


def resized(cache: PagedCache, pages: int) -> PagedCache:
    """The cache with another number of pages; what it keeps stays.

    Pages that are taken away have to be unused, and the last ones: pages of a cache from which nothing was released are
    used in order.
    """
    old = cache.pool.pages
    if pages <= old:
        pool = jax.tree.map(lambda leaf: leaf[:pages], cache.pool)
        return dataclasses.replace(cache, pool=pool, order=cache.order[:pages])
    pool = jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, pages - old)] + [(0, 0)] * (leaf.ndim - 1)), cache.pool)
    order = jnp.concatenate([cache.order, jnp.arange(old, pages, dtype=jnp.int32)])
    return dataclasses.replace(cache, pool=pool, order=order)


def page_bytes(architecture: Architecture, dtype: jnp.dtype, page: int = PAGE) -> int:
    """Bytes of one page: keys, values, scales if they are int8, positions."""
    dtype = jnp.dtype(dtype)
    per_head = architecture.head_dim * dtype.itemsize + (4 if dtype == jnp.int8 else 0)
    return page * (2 * architecture.num_kv_heads * per_head + 4)
