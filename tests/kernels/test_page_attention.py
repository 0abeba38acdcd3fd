"""The kernels against attention in float64, by Pallas' interpreter and compiled on a GPU; then in their place."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference.paged_attention import Fresh, Kept, attend_pages
from qtale_jax.inference.pages import PAGE, Pool
from qtale_jax.kernels.gpu import page_attention as gpu
from qtale_jax.kernels.tpu import page_attention as tpu
from qtale_jax.models.attention import HIDDEN
from qtale_jax.models.cache import RoundedVectors, round_vectors

pytestmark = pytest.mark.slow

ROWS, HEADS, GROUPS, WIDTH, PAGES = 4, 8, 2, 16, 39
COUNTS = (0, 5, 16 * PAGE, PAGES * PAGE - 3)

FORMS = {
    "tpu": functools.partial(tpu.attend_kept, interpret=True),
    "gpu": functools.partial(gpu.attend_kept, interpret=True),
    "gpu, compiled": gpu.attend_kept,
}

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


@pytest.fixture(params=FORMS)
def form(request):
    """A kernel as a function of queries and what is kept."""
    if "compiled" in request.param and jax.default_backend() != "gpu":
        pytest.skip("no GPU here")

    def run(query, kept: Kept, **options):
        key, value = kept.pool.key, kept.pool.value
        if isinstance(key, RoundedVectors):
            options |= {"key_scale": key.scales, "value_scale": value.scales}
            key, value = key.values, value.values
        kernel = functools.partial(FORMS[request.param], **{"scale": WIDTH**-0.5} | options)
        return jax.jit(kernel)(query[:, 0], key, value, kept.table, kept.counts)

    return run


def exact(query, kept: Kept, scale=WIDTH**-0.5, softcap=None):
    """Largest score, sum of weights and weighted sum of values, row by row and head by head in float64."""
    pool = {name: np.asarray(getattr(kept.pool, name).astype(jnp.float32), np.float64) for name in ("key", "value")}
    top, mass = np.full((ROWS, HEADS), HIDDEN, np.float64), np.zeros((ROWS, HEADS))
    total = np.zeros((ROWS, HEADS, WIDTH))
    for row, count in enumerate(np.asarray(kept.counts)):
        key, value = (pool[name][np.asarray(kept.table)[row]].reshape(-1, GROUPS, WIDTH)[:count] for name in pool)
        for head in range(HEADS if count else 0):
            group = head // (HEADS // GROUPS)
            scores = key[:, group] @ np.asarray(query.astype(jnp.float32), np.float64)[row, 0, head] * scale
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            weights = np.exp(scores - scores.max())
            top[row, head], mass[row, head] = scores.max(), weights.sum()
            total[row, head] = weights @ value[:, group]
    return top, mass, total


def close(found, expected, tolerance):
    for part, reference in zip(found, expected, strict=True):
        assert part.dtype == jnp.float32 and part.shape == reference.shape
        np.testing.assert_allclose(part, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 2.0}], ids=["plain", "capped"])
def test_is_attention(form, case, options):
    query, _, _, kept = case
    close(form(query, kept, **options), exact(query, kept, **options), 2e-5)


def test_int8_pages(form, case):
    query, _, _, kept = case
    key, value = (round_vectors(part) for part in (kept.pool.key, kept.pool.value))
    kept = dataclasses.replace(kept, pool=dataclasses.replace(kept.pool, key=key, value=value))
    close(form(query, kept), exact(query, kept), 2e-5)


def test_half_precision(form, case):
    case = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.dtype == jnp.float32 else leaf, case)
    top, mass, total = form(case[0], case[3])
    expected = exact(case[0], case[3])
    close((top, mass), expected[:2], 1e-4)  # what is rounded is the weights that meet the values
    np.testing.assert_allclose(total, expected[2], rtol=0.02, atol=0.02 * np.abs(expected[2]).max())


def test_slots_that_are_not_filled_are_never_seen(form, case):
    query, _, _, kept = case
    filled = np.zeros((ROWS * PAGES, PAGE), bool)
    slot = np.arange(PAGES * PAGE).reshape(1, PAGES, PAGE)
    filled[np.asarray(kept.table)] = slot < np.asarray(COUNTS)[:, None, None]
    mask = jnp.asarray(~filled)[:, :, None, None]
    key, value = (jnp.where(mask, jnp.nan, leaf) for leaf in (kept.pool.key, kept.pool.value))
    spoiled = dataclasses.replace(kept, pool=dataclasses.replace(kept.pool, key=key, value=value))
    for found, clean in zip(form(query, spoiled), form(query, kept), strict=True):
        np.testing.assert_array_equal(found, clean)
        assert np.isfinite(clean).all()


@pytest.mark.parametrize("options", [{}, {"scale": 0.4, "softcap": 2.0}], ids=["plain", "capped"])
def test_in_the_place_of_the_plain_form(case, options):
    kernels = "pallas" if jax.default_backend() == "gpu" else "interpreted"
    with jax.default_matmul_precision("highest"):  # the plain form on a GPU would take TF32
        found, expected = attend(*case, kernels=kernels, **options), attend(*case, kernels="xla", **options)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_several_queries_take_the_plain_form(case):
    query, at, fresh = (jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=1), part) for part in case[:3])
    program = jax.jit(attend_pages, static_argnames="kernels").trace(query, at, fresh, case[3], kernels="interpreted")
    assert "pallas_call" not in str(program.jaxpr)


@pytest.mark.parametrize(
    ("width", "slots", "expected"), [(64, 16, True), (96, 16, False), (8, 16, False), (64, 24, False)]
)
def test_gpus_take_powers_of_two(width, slots, expected):
    assert gpu.fits(width, slots) == expected
