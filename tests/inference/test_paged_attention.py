"""Attention over pages against attention over one array."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference.paged_attention import BLOCK, Fresh, Kept, attend_pages
from qtale_jax.inference.pages import PAGE, Pool
from qtale_jax.models.attention import attend

ROWS, HEADS, GROUPS, WIDTH, NEW = 3, 4, 2, 8, 5
COUNTS = (0, BLOCK + 7, 2 * BLOCK)
PAGES = 2 * BLOCK // PAGE

attend_jit = jax.jit(attend_pages, static_argnames="window")


@pytest.fixture
def case(rng):
    """Queries, their own keys, kept ones, and all keys of each row in one padded array with what is seen of them."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    pool = Pool(*(normal(ROWS * PAGES, PAGE, GROUPS, WIDTH) for _ in range(2)), jnp.zeros((ROWS * PAGES, PAGE), int))
    table = rng.permutation(ROWS * PAGES).reshape(ROWS, PAGES).astype(np.int32)
    # A layer has not kept every position: those of a row ascend with gaps.
    slots = np.sort(rng.permuted(np.tile(np.arange(4 * BLOCK), (ROWS, 1)), axis=1)[:, : 2 * BLOCK], axis=1)
    positions = np.zeros((ROWS * PAGES, PAGE), np.int32)
    positions[table] = slots.reshape(ROWS, PAGES, PAGE)
    pool = dataclasses.replace(pool, positions=jnp.asarray(positions))
    at = jnp.asarray(4 * BLOCK + 2 * np.tile(np.arange(NEW), (ROWS, 1)), jnp.int32)
    seen = jnp.asarray(rng.random((ROWS, NEW)) < 0.7) | (jnp.arange(NEW) == 0)[None]
    fresh = Fresh(normal(ROWS, NEW, GROUPS, WIDTH), normal(ROWS, NEW, GROUPS, WIDTH), at, seen)
    return normal(ROWS, NEW, HEADS, WIDTH), at, fresh, Kept(pool, jnp.asarray(table), jnp.asarray(COUNTS, jnp.int32))


def expected(query, at, fresh, kept, window):
    """The same by the reference, over all keys of each row side by side, and which queries see something."""

    def together(name):
        pages = getattr(kept.pool, name)[kept.table]
        pages = pages.reshape(ROWS, 2 * BLOCK, *pages.shape[3:])
        return jnp.concatenate([pages, getattr(fresh, name)], axis=1)

    positions = together("positions")
    filled = jnp.concatenate([jnp.arange(2 * BLOCK)[None] < kept.counts[:, None], fresh.kept], axis=1)
    causal = positions[:, None] <= at[:, :, None]
    if window is not None:
        causal &= at[:, :, None] - positions[:, None] < window
    filled = jnp.broadcast_to(filled[:, None], causal.shape)
    return attend(query, together("key"), together("value"), causal, filled), np.asarray(jnp.any(causal & filled, 2))


@pytest.mark.parametrize("window", [None, 2 * BLOCK, 6])
def test_pages_in_blocks_are_one_softmax(case, window):
    reference, sees = expected(*case, window)
    found = attend_jit(*case, window=window)
    assert sees.mean() > 0.8 and np.isfinite(found).all()
    np.testing.assert_allclose(found[sees], reference[sees], rtol=0, atol=2e-6)


def test_slots_that_are_not_filled_are_never_seen(case):
    query, at, fresh, kept = case
    slot = jnp.arange(2 * BLOCK).reshape(1, PAGES, PAGE)
    filled = np.zeros((ROWS * PAGES, PAGE), bool)
    filled[np.asarray(kept.table)] = slot < kept.counts[:, None, None]
    assert 0 < filled.mean() < 1

    def overwritten(number, where):
        mask = jnp.asarray(where)[:, :, None, None]
        key, value = (jnp.where(mask, number, leaf) for leaf in (kept.pool.key, kept.pool.value))
        return dataclasses.replace(kept, pool=dataclasses.replace(kept.pool, key=key, value=value))

    clean = attend_jit(query, at, fresh, kept)
    np.testing.assert_array_equal(attend_jit(query, at, fresh, overwritten(jnp.nan, ~filled)), clean)
    assert not np.allclose(attend_jit(query, at, fresh, overwritten(2.0, filled)), clean, atol=1e-2)


def test_half_precision_stays_half_precision(case):
    query, at, fresh, kept = jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, case)
    found = attend_jit(query, at, fresh, kept)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected(*case, None)[0], rtol=0, atol=0.03)
