"""The paged cache against lists: every layer and row keeps its own tokens, in order, in pages of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_jax.inference.growth import Growth, alive
from qtale_jax.inference.pages import empty_pages, page_bytes, resized, stored
from qtale_jax.models.cache import RoundedVectors, cache_bytes
from qtale_jax.models.specification import Architecture

PAGE, ROWS, LAYERS, TOKENS, SLOTS = 4, 2, 3, 3, 12
ARCHITECTURE = Architecture(
    vocab_size=29,
    hidden_size=16,
    intermediate_size=24,
    num_layers=LAYERS,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=64,
)
MOST = LAYERS * ROWS * SLOTS // PAGE

released = jax.jit(lambda cache, rows: cache.released(rows))
append = jax.jit(lambda cache, key, positions, kept: cache.append(key, key, positions, kept))


def written(draw: np.random.Generator, kept: np.ndarray, start: int, dtype):
    """Random keys, and the positions of the tokens."""
    key = draw.normal(size=(*kept.shape, 2, 4)).astype(np.float32)
    positions = np.broadcast_to(start + np.arange(TOKENS, dtype=np.int32), kept.shape)
    return key, stored(jnp.asarray(key), jnp.dtype(dtype)), jnp.asarray(positions)


def tokens_of(cache, layer: int, row: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys and positions that a layer keeps of a row, in order."""
    count = int(cache.counts[layer, row])
    pages = np.asarray(cache.table[layer, row])[: -(-count // PAGE)]
    key = np.asarray(cache.pool.key)[pages].reshape(-1, 2, 4)[:count]
    return key, np.asarray(cache.pool.positions)[pages].reshape(-1)[:count]


@given(
    masks=st.lists(st.lists(st.booleans(), min_size=18, max_size=18), min_size=1, max_size=4), seed=st.integers(0, 9)
)
@settings(max_examples=15)
def test_a_layer_keeps_what_it_was_given_and_nothing_else(masks, seed):
    draw = np.random.default_rng(seed)
    cache = empty_pages(ARCHITECTURE, ROWS, SLOTS, MOST, jnp.float32, PAGE)
    expected = {(layer, row): ([], []) for layer in range(LAYERS) for row in range(ROWS)}
    for call, mask in enumerate(masks):
        kept = np.array(mask).reshape(LAYERS, ROWS, TOKENS)
        key, form, positions = written(draw, kept, call * TOKENS, jnp.float32)
        cache = append(cache, form, positions, jnp.asarray(kept))
        for (layer, row), (keys, at) in expected.items():
            keys.extend(key[layer, row][kept[layer, row]])
            at.extend(np.asarray(positions)[layer, row][kept[layer, row]])
    pages, cache = [], jax.device_get(cache)
    for (layer, row), (keys, at) in expected.items():
        found, positions = tokens_of(cache, layer, row)
        np.testing.assert_array_equal(found, np.reshape(keys, (-1, 2, 4)))
        assert positions.tolist() == at
        pages += np.asarray(cache.table[layer, row])[: -(-len(at) // PAGE)].tolist()
    assert len(set(pages)) == len(pages) == int(cache.used)


@given(
    calls=st.lists(
        st.tuples(
            st.lists(st.booleans(), min_size=18, max_size=18), st.lists(st.booleans(), min_size=ROWS, max_size=ROWS)
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=15)
def test_pages_come_back_and_go_to_others(calls):
    draw, cache = np.random.default_rng(0), empty_pages(ARCHITECTURE, ROWS, SLOTS, MOST, jnp.float32, PAGE)
    expected = {(layer, row): [] for layer in range(LAYERS) for row in range(ROWS)}
    for mask, leaving in calls:
        kept = np.array(mask).reshape(LAYERS, ROWS, TOKENS)
        # Nobody has room for more than four calls.
        kept &= np.array([[[len(expected[layer, row]) <= SLOTS - TOKENS] for row in range(ROWS)] for layer in range(3)])
        key, form, positions = written(draw, kept, 0, jnp.float32)
        cache = append(cache, form, positions, jnp.asarray(kept))
        cache = released(cache, jnp.asarray(leaving))
        for (layer, row), keys in expected.items():
            keys.extend(key[layer, row][kept[layer, row]])
            if leaving[row]:
                keys.clear()
        pages = []
        for (layer, row), keys in expected.items():
            np.testing.assert_array_equal(tokens_of(cache, layer, row)[0], np.reshape(keys, (-1, 2, 4)))
            pages += np.asarray(cache.table[layer, row])[: -(-len(keys) // PAGE)].tolist()
        order = np.asarray(cache.order).tolist()
        assert len(set(pages)) == len(pages) == int(cache.used) and set(order[: len(pages)]) == set(pages)
        assert sorted(order) == list(range(MOST))


def test_what_may_be_needed_is_never_too_little_and_exact_where_all_is_kept():
    cache = empty_pages(ARCHITECTURE, ROWS, SLOTS, MOST, jnp.float32, PAGE)
    growth = Growth(LAYERS, ROWS, SLOTS, 1, PAGE)
    active = np.array([True, False])
    kept = jnp.broadcast_to(jnp.asarray(active)[None, :, None], (LAYERS, ROWS, TOKENS))
    for call in range(4):
        needed = int(cache.needed(TOKENS, jnp.asarray(active)))
        assert needed == growth.missing(np.asarray(cache.counts), TOKENS * alive(~active))
        _, form, positions = written(np.random.default_rng(call), kept, call * TOKENS, jnp.float32)
        after = append(cache, form, positions, kept)
        assert int(after.used) == int(cache.used) + needed
        cache = after


def test_another_size_of_the_pool_changes_nothing_that_is_kept():
    kept = np.random.default_rng(1).random((LAYERS, ROWS, TOKENS)) < 0.6
    cache = empty_pages(ARCHITECTURE, ROWS, SLOTS, 6, jnp.float32, PAGE)
    _, form, positions = written(np.random.default_rng(2), kept, 0, jnp.float32)
    cache = append(cache, form, positions, jnp.asarray(kept))
    assert kept.any() and int(cache.used) <= 6
    for pages in (int(cache.used), MOST):
        other = jax.device_get(resized(cache, pages))
        assert other.pool.pages == len(other.order) == pages and len(set(other.order.tolist())) == pages
        for layer in range(LAYERS):
            for row in range(ROWS):
                assert kept[layer, row].sum() == cache.counts[layer, row]
                for one, two in zip(tokens_of(cache, layer, row), tokens_of(other, layer, row), strict=True):
                    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_a_page_has_the_bytes_that_it_says(dtype):
    caches = [
        jax.eval_shape(lambda pages=pages: empty_pages(ARCHITECTURE, ROWS, SLOTS, pages, dtype, PAGE))
        for pages in (8, 9)
    ]
    more = cache_bytes(caches[1].pool) - cache_bytes(caches[0].pool)
    assert more == page_bytes(ARCHITECTURE, dtype, PAGE)
    assert isinstance(caches[0].pool.key, RoundedVectors) == (dtype == jnp.int8)
    assert caches[0].pool.dtype == dtype


def test_a_cache_of_another_type_is_refused():
    with pytest.raises(ValueError, match="floating point or int8, found int4"):
        empty_pages(ARCHITECTURE, ROWS, SLOTS, 4, jnp.dtype(jnp.int4))


@given(pages=st.integers(1, 600), steps=st.integers(1, 20))
def test_the_pool_has_few_sizes_and_little_to_spare(pages, steps):
    growth = Growth(layers=12, rows=1, slots=800, bytes_per_page=2**20, page=16)
    assert growth.most == 600
    size = growth.size(pages, steps)
    assert pages <= size <= 600 and size - pages <= -(-600 // steps)
    assert len({growth.size(n, steps) for n in range(1, 601)}) <= steps
    small = Growth(layers=12, rows=1, slots=800, bytes_per_page=1, page=16)
    assert small.size(pages, steps) == 600
