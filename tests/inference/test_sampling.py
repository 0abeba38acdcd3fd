import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from qtale_jax.inference.sampling import nucleus, sample

sample_jit, nucleus_jit = jax.jit(sample), jax.jit(nucleus)


def keys(seed: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def test_the_nucleus_is_the_smallest_set_that_reaches_the_mass():
    probabilities = jnp.array([[0.1, 0.5, 0.15, 0.25]], jnp.float32)
    kept = {
        p: set(np.flatnonzero(np.isfinite(nucleus(jnp.log(probabilities), jnp.float32(p))[0])))
        for p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 1.0)
    }
    assert kept[0.01] == kept[0.49] == {1}
    assert kept[0.51] == kept[0.74] == {1, 3}
    assert kept[0.76] == kept[0.89] == {1, 2, 3}
    assert kept[0.91] == kept[1.0] == {0, 1, 2, 3}


LOGITS = hypothesis_numpy.arrays(np.float32, (2, 7), elements=st.floats(-8, 8, width=16), unique=True)


@given(LOGITS, st.floats(0.0625, 1.0, width=32))
def test_the_nucleus_reaches_its_mass_and_not_without_its_least_likely_token(logits, top_p):
    kept = np.isfinite(nucleus_jit(jnp.asarray(logits), jnp.float32(top_p)))
    probability = np.asarray(jax.nn.softmax(jnp.asarray(logits)), np.float64)
    for row in range(2):
        inside = probability[row][kept[row]]
        assert inside.sum() >= top_p - 1e-5
        assert inside.sum() - inside.min() < top_p + 1e-5
        assert inside.min() >= probability[row][~kept[row]].max(initial=0.0)


def test_kept_logits_are_untouched():
    logits = jnp.array([[1.0, -2.0, 0.5]], jnp.float32)
    np.testing.assert_array_equal(nucleus(logits, jnp.float32(1.0)), logits)


def test_zero_temperature_is_greedy():
    logits = jnp.array([[0.0, 3.0, 2.9], [5.0, -1.0, 5.0]], jnp.float32)
    chosen = sample_jit(logits, keys(0, 2), jnp.float32(0.0), jnp.float32(0.3))
    assert chosen.dtype == jnp.int32 and chosen.tolist() == [1, 0]


def test_sampling_depends_on_the_key_only():
    logits = jnp.zeros((64, 29), jnp.float32)
    draws = [sample_jit(logits, keys(seed, 64), jnp.float32(1.0), jnp.float32(1.0)).tolist() for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (2.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_frequencies_follow_temperature_and_nucleus(temperature, top_p):
    count = 8192
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(probabilities, jnp.float32))[None], (count, 4))
    drawn = np.asarray(sample_jit(logits, keys(3, count), jnp.float32(temperature), jnp.float32(top_p)))
    expected = probabilities ** (1 / temperature)
    if top_p == 0.7:
        expected[2:] = 0.0
    expected /= expected.sum()
    error = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(np.bincount(drawn, minlength=4) / count - expected) <= 4 * error)
