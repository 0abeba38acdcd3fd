"""The cache of one layer: what goes in comes out, in int8 to half a step, at the bytes that were promised."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from qtale_jax.models.cache import RoundedVectors, cache_bytes, empty_cache, round_vectors

pytestmark = pytest.mark.slow

FORMS = [jnp.float32, jnp.bfloat16, jnp.int8]

round_jit = jax.jit(round_vectors)
insert = jax.jit(lambda cache, *arguments: cache.insert(*arguments))

SIZES = st.integers(-30, 30).map(lambda power: 2.0**power)
VECTORS = hypothesis_numpy.arrays(np.float32, (3, 2, 6), elements=st.floats(-1, 1, width=32))


@given(VECTORS, SIZES)
def test_no_element_moves_by_more_than_half_a_step(vectors, size):
    x = vectors * np.float32(size)
    rounded = round_jit(x)
    largest = np.abs(x).max(axis=-1)
    usual = largest > 1e-30
    np.testing.assert_allclose(np.asarray(rounded.scales)[usual], largest[usual] / 127, rtol=1e-6)
    assert rounded.values.dtype == jnp.int8 and np.abs(np.asarray(rounded.values, np.int32)).max() <= 127
    step = np.asarray(rounded.scales, np.float64)[..., None]
    error = np.abs(np.asarray(rounded.astype(jnp.float32), np.float64) - x)
    # What float32 adds to x / scale and values * scale is a few units in the last place of at most 127 steps.
    assert np.all(error <= step * (0.5 + 127 * 2**-22))


@given(VECTORS, SIZES)
def test_rounding_what_is_rounded_changes_nothing(vectors, size):
    once = round_jit(vectors * np.float32(size))
    again = round_jit(once.astype(jnp.float32))
    np.testing.assert_array_equal(again.values, once.values)


def test_vectors_are_rounded_one_by_one():
    """A head or a token with large keys costs its neighbours nothing."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8), jnp.float32)
    together = round_jit(x.at[:, 2, 1].multiply(1e6))
    expected = round_jit(x)
    others = np.ones((2, 5, 3), bool)
    others[:, 2, 1] = False
    np.testing.assert_array_equal(np.asarray(together.values)[others], np.asarray(expected.values)[others])
    np.testing.assert_array_equal(np.asarray(together.scales)[others], np.asarray(expected.scales)[others])


@pytest.mark.parametrize("small", [0.0, 1e-40, -1e-37])
def test_a_vector_of_zeros_or_nearly_has_scale_one(small):
    rounded = round_jit(jnp.full((2, 4), small, jnp.float32))
    np.testing.assert_array_equal(rounded.scales, [1.0, 1.0])
    np.testing.assert_array_equal(rounded.astype(jnp.float32), np.zeros((2, 4)))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(bad):
    x = jnp.ones((2, 4), jnp.float32).at[0, 1].set(bad)
    found = np.asarray(round_jit(x).astype(jnp.float32))
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], np.ones(4))


@pytest.mark.parametrize("dtype", FORMS)
def test_tokens_are_written_at_their_slots_and_nowhere_else(dtype):
    keys = jax.random.split(jax.random.key(1), 2)
    key, value = (jax.random.normal(k, (2, 3, 2, 4), jnp.float32) for k in keys)
    slots = jnp.asarray([[5, 0, 2], [1, 3, 4]], jnp.int32)
    execute = jnp.asarray([[True, False, True], [True, True, False]])
    empty = empty_cache(2, 7, 2, 4, dtype)
    cache = insert(empty, slots, key, value, execute)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), cache) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), empty
    )
    for stored, written in ((cache.key, key), (cache.value, value)):
        expected = np.zeros((2, 7, 2, 4), np.float32)
        kept = round_vectors(written) if dtype == jnp.int8 else written.astype(dtype)
        for row in range(2):
            expected[row, slots[row]] = kept.astype(jnp.float32)[row]
        np.testing.assert_array_equal(stored.astype(jnp.float32), expected)
        assert stored.astype(jnp.bfloat16).dtype == jnp.bfloat16
    assert np.argwhere(cache.kept).tolist() == [[0, 2], [0, 5], [1, 1], [1, 3]]
    assert not empty.kept.any()


@pytest.mark.parametrize("dtype", FORMS)
def test_a_slot_that_is_written_again_holds_the_later_token(dtype):
    first, second = (jax.random.normal(jax.random.key(seed), (1, 1, 2, 4), jnp.float32) for seed in (2, 3))
    at, yes = jnp.asarray([[1]], jnp.int32), jnp.ones((1, 1), jnp.bool_)
    empty = empty_cache(1, 3, 2, 4, dtype)
    twice = insert(insert(empty, at, first, first, yes), at, second * 0.01, second, yes)
    jax.tree.map(np.testing.assert_array_equal, twice, insert(empty, at, second * 0.01, second, yes))


def test_bytes_are_those_of_the_arrays():
    batch, slots, heads, width = 3, 10, 2, 64

    def bytes_of(dtype) -> int:
        caches = {layer: empty_cache(batch, slots, heads, width, dtype) for layer in range(2)}
        found = cache_bytes(caches)
        assert found == sum(leaf.nbytes for leaf in jax.tree.leaves(caches))
        assert found == cache_bytes(jax.eval_shape(lambda: caches))
        return found - 2 * batch * slots  # `kept`, a byte per slot and layer

    assert bytes_of(jnp.float32) == 2 * 2 * batch * slots * heads * width * 4
    assert Fraction(bytes_of(jnp.int8), bytes_of(jnp.bfloat16)) == Fraction(64 + 4, 64 * 2)
    assert Fraction(bytes_of(jnp.int8), bytes_of(jnp.float32)) == Fraction(64 + 4, 64 * 4)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, jnp.bool_])
def test_other_types_are_refused(dtype):
    with pytest.raises(ValueError, match=f"floating point or int8, found {jnp.dtype(dtype)}"):
        empty_cache(1, 2, 3, 4, dtype)


def test_only_int8_is_rounded():
    assert isinstance(empty_cache(1, 2, 3, 4, jnp.int8).key, RoundedVectors)
    for dtype in (jnp.float32, jnp.bfloat16):
        assert empty_cache(1, 2, 3, 4, dtype).value.dtype == dtype
