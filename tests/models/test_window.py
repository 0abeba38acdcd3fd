"""Sliding-window attention: a query sees the keys of the last `sliding_window` positions, its own included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.inference.generation import advance, empty_caches
from qtale_jax.models.attention import in_window
from qtale_jax.models.forward import context_of, unembed
from qtale_jax.models.policy import Sampled, Thresholded

WIDTH = 12


@pytest.fixture(scope="module")
def windowed(make_spec):
    """The dense specification with a window."""
    return lambda window, **fields: make_spec(sliding_window=window, **fields)


@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 6)), min_size=1, max_size=4),
    window=st.integers(1, WIDTH + 1),
)
def test_a_query_sees_the_keys_of_its_example_less_than_a_window_back(windowed, runs, window):
    ids = [number for number, (segment, count) in enumerate(runs, 1) for _ in range(count)][:WIDTH]
    ids = [0 if runs[number - 1][0] == 0 else number for number in ids]
    ids += [0] * (WIDTH - len(ids))
    tokens = jnp.ones((1, WIDTH), jnp.int32)
    context, _ = context_of(windowed(window), tokens, jnp.asarray([ids], jnp.int32))
    expected = [[ids[q] == ids[k] != 0 and 0 <= q - k < window for k in range(WIDTH)] for q in range(WIDTH)]
    np.testing.assert_array_equal(context.causal[0], expected)


def test_without_a_window_nothing_is_computed(make_spec):
    causal = jnp.ones((1, 2, 2), jnp.bool_)
    at = jnp.zeros((1, 2), jnp.int32)
    assert in_window(make_spec().architecture, causal, at, at) is causal


def test_only_tokens_inside_the_window_reach_a_logit(windowed, make_params, run, tokens):
    """One layer of window 4: token 9 depends on tokens 6 to 9 and on no other."""
    spec = windowed(4, num_layers=1)
    params = make_params(spec)
    plain = run(spec, params, tokens).logits
    for position in range(10):
        changed = run(spec, params, tokens.at[:, position].set((tokens[:, position] + 1) % 40)).logits
        moved = np.abs(changed - plain).max(axis=-1) > 0
        inside = (np.arange(10) >= position) & (np.arange(10) < position + 4)
        np.testing.assert_array_equal(moved, np.broadcast_to(inside, moved.shape))


def test_a_window_of_the_whole_row_changes_nothing(windowed, make_spec, make_params, run, tokens):
    params = make_params(make_spec())
    expected = run(make_spec(), params, tokens).logits
    np.testing.assert_allclose(run(windowed(10), params, tokens).logits, expected, atol=1e-6)
    assert np.abs(run(windowed(9), params, tokens).logits - expected).max() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("eviction", [True, False])
def test_packing_changes_nothing(windowed, make_params, run, tokens, eviction):
    spec = windowed(3, routing={"always_on_layers": 1, "eviction": eviction})
    params, policy = make_params(spec), Thresholded(jnp.full((2,), 0.5, jnp.float32))
    lengths = (6, 4)
    packed = jnp.concatenate([tokens[row, :length] for row, length in enumerate(lengths)] + [jnp.zeros(3, jnp.int32)])
    segments = jnp.array([[1] * 6 + [2] * 4 + [0] * 3], jnp.int32)
    out = run(spec, params, packed[None], segment_ids=segments, policy=policy)
    for start, (row, length) in zip((0, 6), enumerate(lengths), strict=True):
        alone = run(spec, params, tokens[row : row + 1, :length], policy=policy)
        np.testing.assert_allclose(out.logits[0, start : start + length], alone.logits[0], atol=1e-5)


@pytest.mark.slow
def test_the_gates_of_training_have_the_value_of_the_mask(windowed, make_params, run, tokens):
    """Keys that are evicted get a gradient only inside the window; the value is that of the decisions taken."""
    spec = windowed(3, routing={"always_on_layers": 1})
    params = make_params(spec)
    policy = Sampled(jax.random.key(0))
    changed = tokens.at[:, 0].set((tokens[:, 0] + 1) % 40)
    first, second = (run(spec, params, ids, policy=policy) for ids in (tokens, changed))
    # Three layers of window 3 reach 6 tokens back.
    np.testing.assert_array_equal(first.logits[:, 7:], second.logits[:, 7:])
    assert not np.array_equal(first.logits[:, :3], second.logits[:, :3])


@pytest.mark.slow
@pytest.mark.parametrize("eviction", [True, False])
@pytest.mark.parametrize("theta", [0.6, pytest.param(0.0, marks=pytest.mark.exhaustive)])
def test_cached_decoding_equals_the_whole_pass(windowed, make_params, run, tokens, eviction, theta):
    """Prefill of four tokens in rows of two lengths, then one token at a time."""
    routing = {"always_on_layers": 1, "always_on_tokens": 1, "eviction": eviction}
    spec = windowed(3, routing=routing)
    params, policy = make_params(spec), Thresholded(jnp.full((2,), theta, jnp.float32))
    hidden_of = jax.jit(advance, static_argnums=(0, 7))
    caches = empty_caches(spec, 2, 10, jnp.dtype(jnp.float32))
    starts = jnp.array([4, 2], jnp.int32)
    at = jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32)[None], (2, 4))
    dtype = jnp.dtype(jnp.float32)
    hidden, execute, caches = hidden_of(spec, params, tokens[:2, :4], at, at < starts[:, None], caches, policy, dtype)
    decided = [[execute[row, t] for t in range(int(starts[row]))] for row in range(2)]
    for step in range(4):
        at = (starts + step)[:, None]
        token = jnp.take_along_axis(tokens[:2], at, axis=1)
        hidden, execute, caches = hidden_of(spec, params, token, at, at >= 0, caches, policy, dtype)
        for row in range(2):
            decided[row].append(execute[row, 0])
    found = unembed(spec, params, hidden)[:, 0]
    for row, length in enumerate((8, 6)):
        whole = run(spec, params, tokens[row : row + 1, :length], policy=policy)
        np.testing.assert_allclose(found[row], whole.logits[0, -1], atol=1e-5)
        np.testing.assert_array_equal(np.stack(decided[row]), whole.routing.execute[0])
    assert all(np.all(row) for row in decided) == (theta == 0)
