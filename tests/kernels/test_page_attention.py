"""The kernel, run by Pallas' interpreter, against the plain form in `inference.paged_attention`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference.paged_attention import Fresh, Kept, attend_pages
from qtale_jax.inference.pages import PAGE, Pool
from qtale_jax.models.cache import round_vectors

pytestmark = pytest.mark.slow

ROWS, HEADS, GROUPS, WIDTH, PAGES = 4, 8, 2, 16, 19
COUNTS = (0, 5, 8 * PAGE, PAGES * PAGE - 3)

attend = jax.jit(attend_pages, static_argnames=("scale", "softcap", "kernels"))


@pytest.fixture
def case(rng):
    """One query per row, its own key, and kept ones in shuffled pages."""

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    table = rng.permutation(ROWS * PAGES).reshape(ROWS, PAGES)
    shape = (ROWS * PAGES, PAGE)
    pool = Pool(normal(*shape, GROUPS, WIDTH), normal(*shape, GROUPS, WIDTH), jnp.zeros(shape, jnp.int32))
    at = jnp.full((ROWS, 1), 4 * PAGES * PAGE, jnp.int32)
    own = normal(ROWS, 1, GROUPS, WIDTH), normal(ROWS, 1, GROUPS, WIDTH)
    fresh = Fresh(*own, at, jnp.ones((ROWS, 1), bool))
    kept = Kept(pool, jnp.asarray(table, jnp.int32), jnp.asarray(COUNTS, jnp.int32))
    return normal(ROWS, 1, HEADS, WIDTH), at, fresh, kept


@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 2.0}], ids=["plain", "capped"])
def test_equals_the_plain_form(case, options):
    expected = attend(*case, **options)
    np.testing.assert_allclose(attend(*case, kernels="interpreted", **options), expected, rtol=0, atol=2e-6)


def test_int8_pages(case):
    query, at, fresh, kept = case
    key, value = (round_vectors(part) for part in (kept.pool.key, kept.pool.value))
    case = query, at, fresh, dataclasses.replace(kept, pool=dataclasses.replace(kept.pool, key=key, value=value))
    np.testing.assert_allclose(attend(*case, kernels="interpreted"), attend(*case), rtol=0, atol=2e-6)


def test_half_precision(case):
    case = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, case)
    found, expected = attend(*case, kernels="interpreted"), attend(*case)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=0.02)


def test_slots_that_are_not_filled_are_never_seen(case):
    query, at, fresh, kept = case
    filled = np.zeros((ROWS * PAGES, PAGE), bool)
    slot = np.arange(PAGES * PAGE).reshape(1, PAGES, PAGE)
    filled[np.asarray(kept.table)] = slot < np.asarray(COUNTS)[:, None, None]
    mask = jnp.asarray(~filled)[:, :, None, None]
    key, value = (jnp.where(mask, jnp.nan, leaf) for leaf in (kept.pool.key, kept.pool.value))
    spoiled = dataclasses.replace(kept, pool=dataclasses.replace(kept.pool, key=key, value=value))
    clean = attend(*case, kernels="interpreted")
    np.testing.assert_array_equal(attend(query, at, fresh, spoiled, kernels="interpreted"), clean)
    assert np.isfinite(clean).all()


def test_several_queries_take_the_plain_form(case):
    query, at, fresh = (jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=1), part) for part in case[:3])
    program = jax.jit(attend_pages, static_argnames="kernels").trace(query, at, fresh, case[3], kernels="interpreted")
    assert "pallas_call" not in str(program.jaxpr)
