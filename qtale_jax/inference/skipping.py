"""One layer that computes only what executes it: compaction into the smallest of a few static sizes.

In decode the rows of a batch that execute a layer are gathered, in prefill the tokens of each row; the layer runs on
them and its results go back to where they came from. How many there are is known only at run time, so `lax.switch`
chooses among programs for fixed sizes, 0 and all among them: nothing is compiled again, and a layer that nobody
executes is not run at all.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from qtale_jax.inference.paged_attention import Fresh, Kept, attend_pages
from qtale_jax.inference.pages import stored
from qtale_jax.models.compaction import Compaction, static_sizes
from qtale_jax.models.decoder import Block
from qtale_jax.models.rotary import rotary_tables

ROWS, TOKENS = 0, 1
"""Axes of (batch, length, ...) that are compacted: rows in decode, tokens in prefill."""

ROW_SHARES = (1 / 8, 1 / 2, 3 / 4, 1.0)
"""Sizes for the rows of a batch, as shares of it, besides 0.

Few, because a layer's weights are read as soon as one row executes it: of eight rows four take 0.79 of the time of all
on two CPU cores, two 0.73, one 0.55 (134 million parameters), and every size is a program to compile.
"""

TOKEN_SHARES = (1 / 8, 5 / 16, 9 / 16, 13 / 16, 1.0)
"""Sizes for the tokens of a row, as shares of its length, besides 0.

Those in the middle are a sixteenth above quarters: of 512 tokens that execute with a chance of one half, 9/16 holds all
but a few draws in a thousand. More sizes would waste less and take longer to compile.
"""


def sizes(total: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Ascending static sizes: 0 and the shares of `total`, rounded up."""
    return (0, *static_sizes(total, shares))


def run_compact(
    block: Block,
    hidden: Float[Array, "b t d"],
    positions: Int32[Array, "b t"],
    present: Bool[Array, "b t"],
    execute: Bool[Array, "b t"],
    kept: Kept,
    *,
    axis: int,
    sizes: tuple[int, ...],
    layer: int,
) -> tuple[Float[Array, "b t d"], Fresh]:
    """Runs one layer for the entries that execute it.

    Args:
        block: the layer.
        hidden: residual stream.
        positions: of the tokens.
        present: tokens that are not padding.
        execute: tokens that execute; present ones.
        kept: what the layer keeps of earlier tokens.
        axis: `ROWS` (t is 1) or `TOKENS`.
        sizes: numbers of rows, or of tokens in a row, that there are programs for; the last is all of them.
        layer: index of the layer: some architectures have a window, or other rotations, in some layers only.

    Returns:
        The residual stream afterwards, and keys and values of what the layer is to keep now. Along `TOKENS` they may
        stand in another order than the tokens; their positions ascend.
    """
    compaction = Compaction.of(execute, axis)
    dtype = kept.pool.dtype
    architecture = block.attention.architecture
    see = functools.partial(
        attend_pages,
        window=architecture.window(layer),
        scale=architecture.score_scale,
        softcap=architecture.attention_softcap,
        kernels=block.kernels,
    )

    def project(hidden: Array, positions: Array):
        tables = rotary_tables(architecture, positions, architecture.is_local(layer))
        query, key, value = block.attention.project(block.attention_norm(hidden), tables, (None,) * 3)
        return query, stored(key, dtype), stored(value, dtype)

    # Without eviction tokens that skip leave keys and values too, so these are computed for all.
    everything = None
    if block.routed and not block.eviction:
        everything = Fresh(*project(hidden, positions)[1:], positions, present)

    def run(size: int) -> tuple[Array, Fresh]:
        whole = size == execute.shape[axis]
        take: Callable[[Array], Array] = (lambda x: x) if whole else functools.partial(compaction.gather, size=size)
        here = take(hidden)
        at = take(positions)
        query, key, value = project(here, at)
        own = Fresh(key, value, at, take(execute))
        seen, pages = own, kept
        if everything is not None:
            seen = everything if axis == TOKENS else jax.tree.map(take, everything)
        if axis == ROWS and not whole:
            index = compaction.order[:size, 0]
            pages = Kept(kept.pool, kept.table[index], kept.counts[index])
        if axis == ROWS:
            # Rows that only fill up should not make the loop over pages longer.
            pages = Kept(pages.pool, pages.table, jnp.where(own.kept[:, 0], pages.counts, 0))
        attended = see(query, at, seen, pages).reshape(*here.shape[:2], -1)
        out = block.after_attention(here, attended)
        if whole:
            return jnp.where(execute[:, :, None], out, hidden), own
        return compaction.spread(out, hidden), _full(compaction, own, size)

    def skip() -> tuple[Array, Fresh]:
        shape = jax.eval_shape(lambda: run(execute.shape[axis])[1])
        return hidden, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shape)

    branches = [skip if size == 0 else functools.partial(run, size) for size in sizes]
    chosen = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), compaction.most)
    hidden, own = jax.lax.switch(chosen, branches)
    return hidden, own if everything is None else everything


def _full(compaction: Compaction, own: Fresh, size: int) -> Fresh:
    """Compact keys and values in the shape that all branches return."""
    if compaction.axis == ROWS:
        return jax.tree.map(lambda leaf: compaction.spread(leaf, jnp.zeros((), leaf.dtype)), own)
    missing = compaction.chosen.shape[TOKENS] - size
    return jax.tree.map(lambda leaf: jnp.pad(leaf, [(0, 0), (0, missing)] + [(0, 0)] * (leaf.ndim - 2)), own)
