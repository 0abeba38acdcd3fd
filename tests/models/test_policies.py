"""Route policies: what theta means, and that any policy takes the same forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.models.policy import Dense, Fixed, Sampled, Thresholded, decide, gap, probability, straight_through
from qtale_jax.models.stacking import stack_layers


def thresholds(spec, value: float) -> Thresholded:
    return Thresholded(jnp.full((len(spec.routed_layers),), value, jnp.float32))


@pytest.fixture(params=["unrolled", "stacked"])
def layout(request, routed):
    spec, params = routed
    return spec, params if request.param == "unrolled" else stack_layers(spec, params)


@pytest.mark.parametrize("theta", [0.0, -1.0])
def test_no_threshold_equals_the_dense_base_bit_for_bit(layout, routed, run, tokens, theta):
    spec, params = layout
    base = spec.model_copy(update={"routing": None})
    bare = {
        **routed[1],
        "layers": {i: {k: v for k, v in p.items() if k != "router"} for i, p in routed[1]["layers"].items()},
    }
    bare = bare if params is routed[1] else stack_layers(base, bare)
    found = run(spec, params, tokens, policy=thresholds(spec, theta))
    assert found.routing.execute.all()
    np.testing.assert_array_equal(found.logits, run(base, bare, tokens).logits)
    np.testing.assert_array_equal(found.logits, run(spec, params, tokens, policy=Dense()).logits)


def test_zero_threshold_equals_the_dense_base_in_bfloat16_too(make_spec, make_params, run, tokens):
    spec = make_spec(routing={"always_on_layers": 1}, dtype="bfloat16")
    params = make_params(spec)
    found = run(spec, params, tokens, policy=thresholds(spec, 0.0), compute_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found.logits, run(spec, params, tokens, compute_dtype=jnp.bfloat16).logits)


def test_tie_executes():
    tie = jnp.zeros((1, 3, 2), jnp.float32)
    execute, gate = decide(Thresholded(jnp.array([0.5], jnp.float32)), tie, 0, 2)
    assert execute.all() and gate is None
    just_above = Thresholded(jnp.array([np.nextafter(np.float32(0.5), np.float32(1))], jnp.float32))
    assert not decide(just_above, tie, 0, 2)[0].any()


def test_threshold_belongs_to_its_layer(routed, run, tokens):
    spec, params = routed
    policy = Thresholded(jnp.array([2.0, 0.0], jnp.float32))
    execute = run(spec, params, tokens, policy=policy).routing.execute
    shares = np.asarray(execute[:, 1:]).mean((0, 1))  # without the always-on token
    np.testing.assert_array_equal(shares, [1.0, 0.0, 1.0])


def test_lower_threshold_never_executes_less_for_the_same_input():
    logits = jax.random.normal(jax.random.key(0), (4, 64, 2), jnp.float32) * 2
    masks = [
        np.asarray(decide(Thresholded(jnp.array([theta], jnp.float32)), logits, 0, 0)[0])
        for theta in (1.0, 0.9, 0.6, 0.5, 0.3, 0.1, 0.0)
    ]
    for higher, lower in zip(masks, masks[1:], strict=False):
        assert (lower >= higher).all()
    assert masks[-1].all() and not masks[0].all()


def test_first_routed_layer_of_a_model_is_monotone_in_theta(routed, run, tokens):
    """Its input does not depend on theta, as the layer before it is always on."""
    spec, params = routed
    shares = [
        float(run(spec, params, tokens, policy=thresholds(spec, theta)).routing.execute[..., 1].mean())
        for theta in (0.8, 0.6, 0.5, 0.4, 0.2)
    ]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_sampling_follows_the_execute_probability():
    """The share of executed draws is softmax(logits)[execute]: hard Gumbel-softmax."""
    logits = jnp.broadcast_to(jnp.array([0.3, 1.1], jnp.float32), (50, 400, 2))
    execute, gate = decide(Sampled(jax.random.key(5)), logits, 0, 0)
    expected = np.exp(1.1) / (np.exp(0.3) + np.exp(1.1))
    assert abs(float(execute.mean()) - expected) < 4 * np.sqrt(expected * (1 - expected) / execute.size)
    np.testing.assert_array_equal(gate, execute.astype(jnp.float32))


def test_layers_draw_their_own_noise():
    logits = jnp.zeros((1, 200, 2), jnp.float32)
    policy = Sampled(jax.random.key(5))
    first, second, again = (np.asarray(decide(policy, logits, r, 0)[0]) for r in (0, 1, 0))
    np.testing.assert_array_equal(first, again)
    assert 0.3 < (first != second).mean() < 0.7


def test_gate_has_the_value_of_the_decision_and_the_gradient_of_the_soft_one():
    soft = jnp.array([0.1, 0.6, 0.999], jnp.float32)
    hard = jnp.array([False, True, True])
    np.testing.assert_array_equal(straight_through(hard, soft), [0.0, 1.0, 1.0])
    slope = jax.grad(lambda x: straight_through(hard, jax.nn.sigmoid(x)).sum())(jnp.zeros(3, jnp.float32))
    np.testing.assert_allclose(slope, [0.25] * 3)


def test_probability_is_the_softmax_in_float32():
    logits = jax.random.normal(jax.random.key(0), (5, 2), jnp.float32) * 3
    np.testing.assert_allclose(probability(logits), jax.nn.softmax(logits, axis=-1)[:, 1], rtol=1e-6)
    np.testing.assert_array_equal(gap(logits), logits[:, 1] - logits[:, 0])
    assert probability(logits.astype(jnp.bfloat16)).dtype == jnp.float32


@pytest.mark.parametrize("eviction_gradient", [True, False])
def test_fixed_masks_reproduce_what_was_sampled(layout, run, tokens, eviction_gradient):
    spec, params = layout
    sampled = run(spec, params, tokens, policy=Sampled(jax.random.key(3), 1.0, eviction_gradient))
    share = float(sampled.routing.execute[..., 1:].mean())
    assert 0.2 < share < 0.9
    fixed = run(spec, params, tokens, policy=Fixed(sampled.routing.execute))
    np.testing.assert_array_equal(fixed.routing.execute, sampled.routing.execute)
    np.testing.assert_allclose(fixed.logits, sampled.logits, atol=1e-5)
    np.testing.assert_array_equal(sampled.gates, sampled.routing.execute[..., 1:].astype(jnp.float32))
    assert fixed.gates is None


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["dense", "sampled", "thresholded", "fixed"])
def test_stacked_and_unrolled_layers_agree(make_spec, make_params, run, tokens, policy):
    spec = make_spec(routing={"always_on_layers": 1}, lora={"rank": 2})
    params = make_params(spec)
    mask = jax.random.bernoulli(jax.random.key(1), 0.5, (*tokens.shape, 3))
    value = {
        "dense": Dense(),
        "sampled": Sampled(jax.random.key(2)),
        "thresholded": thresholds(spec, 0.5),
        "fixed": Fixed(mask),
    }[policy]
    one, other = run(spec, params, tokens, policy=value), run(spec, stack_layers(spec, params), tokens, policy=value)
    np.testing.assert_array_equal(one.routing.execute, other.routing.execute)
    np.testing.assert_allclose(one.logits, other.logits, atol=1e-5)
    np.testing.assert_allclose(one.routing.logits, other.routing.logits, atol=1e-5)


@pytest.mark.parametrize("value", ["sampled", "thresholded", "fixed"])
def test_first_layers_and_tokens_are_always_on(make_spec, make_params, run, tokens, value):
    spec = make_spec(routing={"always_on_layers": 1, "always_on_tokens": 3})
    params = make_params(spec)
    policy = {
        "sampled": Sampled(jax.random.key(0)),
        "thresholded": thresholds(spec, 1.1),
        "fixed": Fixed(jnp.zeros((*tokens.shape, 3), jnp.bool_)),
    }[value]
    execute = np.asarray(run(spec, params, tokens, policy=policy).routing.execute)
    assert execute[:, :, :1].all()
    assert execute[:, :3].all()
    assert not execute[:, 3:, 1:].all()
    if value != "sampled":
        assert not execute[:, 3:, 1:].any()
