"""Routers that know nothing: uniform probabilities that belong to a token, its position and the layer alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.artifact import load_model, save_model
from qtale_jax.models.cost import router_flops
from qtale_jax.models.policy import Dense, Thresholded, probability
from qtale_jax.models.router import hashed_logits
from qtale_jax.models.stacking import stack_layers

pytestmark = pytest.mark.slow

VOCABULARY, LENGTH, LAYERS = 128, 64, 12
COUNT = VOCABULARY * LENGTH


@pytest.fixture(scope="module")
def uniform() -> np.ndarray:
    """Execute probabilities (layers, vocabulary, length): every token at every position."""
    tokens = jnp.broadcast_to(jnp.arange(VOCABULARY, dtype=jnp.int32)[:, None], (VOCABULARY, LENGTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32)[None, :], (VOCABULARY, LENGTH))
    return np.stack([np.asarray(probability(hashed_logits(tokens, positions, layer))) for layer in range(LAYERS)])


@pytest.fixture(scope="module")
def model(make_spec, make_params):
    """Four layers, the last three routed at random, one always-on token."""
    spec = make_spec(
        routing={"method": "random", "router": "hashed", "always_on_layers": 1, "always_on_tokens": 1}, num_layers=4
    )
    return spec, make_params(spec)


def at(spec, theta: float) -> Thresholded:
    return Thresholded(jnp.full((len(spec.routed_layers),), theta, jnp.float32))


def test_probabilities_are_uniform_in_every_layer(uniform):
    """The Kolmogorov-Smirnov distance is over 1.95 / sqrt(n) once in a thousand times."""
    for layer in uniform:
        values = np.sort(layer.reshape(-1))
        ranks = np.arange(COUNT + 1) / COUNT
        distance = max((ranks[1:] - values).max(), (values - ranks[:-1]).max())
        assert distance < 1.95 / np.sqrt(COUNT)
    assert uniform.min() > 0 and uniform.max() < 1


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["layers", "tokens", "positions"])
def test_neighbours_decide_independently(uniform, axis):
    """Uncorrelated, and at theta = 1/2 every combination of two neighbours has a quarter."""
    first, second = (np.moveaxis(uniform, axis, 0)[part].reshape(-1) for part in (slice(1, None), slice(None, -1)))
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / np.sqrt(first.size)
    both = np.mean((first >= 0.5) & (second >= 0.5))
    assert abs(both - 0.25) < 4 * np.sqrt(0.25 * 0.75 / first.size)


def test_depth_of_a_token_is_binomial(uniform):
    """The number of executed layers varies as that of independent coins, not more or less."""
    depth = (uniform >= 0.4).sum(0)
    assert depth.mean() == pytest.approx(0.6 * LAYERS, rel=0.01)
    assert depth.var() == pytest.approx(0.6 * 0.4 * LAYERS, rel=0.06)


@given(st.floats(0.02, 0.98))
def test_theta_of_one_less_r_executes_the_share_r(uniform, share):
    found = np.mean(uniform >= np.float32(1 - share))
    assert abs(found - share) < 4.5 * np.sqrt(share * (1 - share) / uniform.size)


def test_a_layer_index_may_be_traced(uniform):
    tokens = jnp.arange(VOCABULARY, dtype=jnp.int32)[None]
    positions = jnp.zeros_like(tokens)
    found = jax.jit(lambda layer: probability(hashed_logits(tokens, positions, layer)))(jnp.int32(5))
    np.testing.assert_array_equal(found[0], uniform[5, :, 0])


def test_there_is_nothing_to_learn_store_or_pay_for(model, tmp_path):
    spec, params = model
    assert spec.routed_layers == (1, 2, 3) and spec.layers_with_router == ()
    assert not any("router" in layer for layer in params["layers"].values())
    assert router_flops(spec) == 0
    save_model(tmp_path / "model", spec, params)
    loaded = load_model(tmp_path / "model")
    assert loaded.spec == spec
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_theta_zero_is_the_dense_model_bit_for_bit(model, run_optimized, tokens):
    spec, params = model
    dense = run_optimized(spec.model_copy(update={"routing": None}), params, tokens)
    zero = run_optimized(spec, params, tokens, policy=at(spec, 0.0))
    assert zero.routing.execute.all()
    np.testing.assert_array_equal(zero.logits, dense.logits)
    np.testing.assert_array_equal(run_optimized(spec, params, tokens, policy=Dense()).logits, dense.logits)


def test_both_layouts_decide_by_the_same_layer(model, run, tokens):
    spec, params = model
    one = run(spec, params, tokens, policy=at(spec, 0.4))
    other = run(spec, stack_layers(spec, params), tokens, policy=at(spec, 0.4))
    np.testing.assert_array_equal(one.routing.execute, other.routing.execute)
    np.testing.assert_array_equal(one.routing.logits, other.routing.logits)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    expected = probability(hashed_logits(tokens, jnp.broadcast_to(jnp.arange(10)[None], tokens.shape), 2)) >= 0.4
    np.testing.assert_array_equal(one.routing.execute[:, 1:, 2], expected[:, 1:])


def test_decisions_do_not_depend_on_weights_or_on_what_else_is_there(model, make_params, run, tokens):
    spec, params = model
    policy = at(spec, 0.5)
    expected = np.asarray(run(spec, params, tokens, policy=policy).routing.execute)
    np.testing.assert_array_equal(run(spec, make_params(spec, seed=9), tokens, policy=policy).routing.execute, expected)
    alone = run(spec, params, tokens[1:2], policy=policy).routing.execute
    np.testing.assert_array_equal(alone[0], expected[1])
    # Two examples packed into a row, and padding behind them.
    packed = jnp.concatenate([tokens[0], tokens[1], jnp.zeros(5, jnp.int32)])[None]
    segments = jnp.asarray([[1] * 10 + [2] * 10 + [0] * 5], jnp.int32)
    found = np.asarray(run(spec, params, packed, segment_ids=segments, policy=policy).routing.execute)[0]
    np.testing.assert_array_equal(found[:10], expected[0])
    np.testing.assert_array_equal(found[10:20], expected[1])
    assert not found[20:].any()


def test_executed_share_of_a_model_is_one_less_theta(model, run):
    spec, params = model
    many = jax.random.randint(jax.random.key(1), (60, 32), 1, 40, jnp.int32)
    for theta in (0.2, 0.5, 0.8):
        found = np.asarray(run(spec, params, many, policy=at(spec, theta)).routing.execute)[:, 1:, 1:].mean()
        assert found == pytest.approx(1 - theta, abs=0.04)  # tokens repeat: 40 x 31 different ones per layer
