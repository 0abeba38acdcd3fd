"""Route policies: what theta means, and that any policy takes the same forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qtale_jax.models.policy import (
    Dense,
    ExpertChoice,
    Fixed,
    Sampled,
    Thresholded,
    decide,
    gap,
    probability,
    straight_through,
)
from qtale_jax.models.stacking import stack_layers


def thresholds(spec, value: float) -> Thresholded:
    return Thresholded(jnp.full((len(spec.routed_layers),), value, jnp.float32))


@pytest.fixture(params=["unrolled", "stacked"])
def layout(request, routed):
    spec, params = routed
    return spec, params if request.param == "unrolled" else stack_layers(spec, params)


@pytest.mark.slow
@pytest.mark.parametrize("theta", [0.0, pytest.param(-1.0, marks=pytest.mark.exhaustive)])
def test_no_threshold_equals_the_dense_base_bit_for_bit(layout, routed, run_optimized, tokens, theta):
    spec, params = layout
    base = spec.model_copy(update={"routing": None})
    bare = {
        **routed[1],
        "layers": {i: {k: v for k, v in p.items() if k != "router"} for i, p in routed[1]["layers"].items()},
    }
    bare = bare if params is routed[1] else stack_layers(base, bare)
    found = run_optimized(spec, params, tokens, policy=thresholds(spec, theta))
    assert found.routing.execute.all()
    np.testing.assert_array_equal(found.logits, run_optimized(base, bare, tokens).logits)
    np.testing.assert_array_equal(found.logits, run_optimized(spec, params, tokens, policy=Dense()).logits)


def test_zero_threshold_equals_the_dense_base_in_bfloat16_too(make_spec, make_params, run_optimized, tokens):
    spec = make_spec(routing={"always_on_layers": 1}, dtype="bfloat16")
    params = make_params(spec)
    found = run_optimized(spec, params, tokens, policy=thresholds(spec, 0.0), compute_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(found.logits, run_optimized(spec, params, tokens, compute_dtype=jnp.bfloat16).logits)


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


def pairs(gaps) -> jax.Array:
    """Logits with these gaps."""
    gaps = jnp.asarray(gaps, jnp.float32)
    return jnp.stack([jnp.zeros_like(gaps), gaps], axis=-1)


@pytest.mark.parametrize(
    "theta", [0.05, 0.5, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in (0.3, 0.8, 0.99))]
)
def test_without_noise_a_shift_decides_as_a_threshold_does(theta):
    """log(R / (1 - R)) stands for theta = 1 - R; gaps where rounding could differ are left out."""
    shift = np.log((1 - theta) / theta)
    gaps = np.random.default_rng(2).normal(0, 3, (4, 500))
    gaps = gaps[:, (np.abs(gaps + shift) > 1e-4).all(0)]
    execute, gate = decide(Sampled(jax.random.key(1), 1.0, jnp.float32(shift), jnp.float32(0)), pairs(gaps), 0, 0)
    expected, _ = decide(Thresholded(jnp.array([theta], jnp.float32)), pairs(gaps), 0, 0)
    np.testing.assert_array_equal(execute, expected)
    np.testing.assert_array_equal(gate, execute.astype(jnp.float32))
    assert 0.05 < float(execute.mean()) < 1


@given(st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=5), st.floats(0, 2, width=32))
def test_a_larger_shift_never_executes_less(shifts, noise):
    logits = pairs(np.random.default_rng(0).normal(0, 2, (2, 300)))
    masks = [
        np.asarray(decide(Sampled(jax.random.key(4), 1.0, shift, noise), logits, 0, 0)[0]) for shift in sorted(shifts)
    ]
    for lower, higher in zip(masks, masks[1:], strict=False):
        assert (higher >= lower).all()


def test_shift_moves_the_executed_share_of_an_undecided_router():
    """Gaps of 0: the share of executed draws is the logistic function of the shift."""
    for share in (0.1, 0.5, 0.9):
        policy = Sampled(jax.random.key(6), 1.0, jnp.float32(np.log(share / (1 - share))))
        found = float(decide(policy, pairs(np.zeros((20, 1000))), 0, 0)[0].mean())
        assert abs(found - share) < 4 * np.sqrt(share * (1 - share) / 20_000)


def test_less_noise_flips_fewer_decisions():
    gaps = np.random.default_rng(0).normal(0, 2, (4, 1000))
    flips = [
        float((decide(Sampled(jax.random.key(4), 1.0, 0.0, noise), pairs(gaps), 0, 0)[0] != (gaps >= 0)).mean())
        for noise in (0.0, 0.3, 1.0)
    ]
    assert flips[0] == 0 and flips[0] < flips[1] < flips[2]


@given(
    gaps=arrays.arrays(np.float32, (3, 8), elements=st.floats(-9, 9, width=32)),
    eligible=arrays.arrays(np.bool_, (3, 8)),
    share=st.floats(0, 1, width=32),
)
def test_an_expert_choice_takes_its_share_of_the_eligible_tokens_whose_gap_is_largest(gaps, eligible, share):
    execute, gate = decide(ExpertChoice(jnp.float32(share)), pairs(gaps), 0, 0, jnp.asarray(eligible))
    execute = np.asarray(execute)
    np.testing.assert_array_equal(gate, execute.astype(np.float32))
    assert not (execute & ~eligible).any()
    for chosen, among, values in zip(execute, eligible, gaps, strict=True):
        assert chosen.sum() == np.round(np.float32(share) * np.float32(among.sum()))
        passed_over = among & ~chosen
        if chosen.any() and passed_over.any():
            assert values[chosen].min() >= values[passed_over].max()


def test_of_equal_gaps_an_expert_choice_takes_the_first():
    execute, _ = decide(ExpertChoice(0.5), pairs([[1, 1, 1, 1], [0, 2, 0, 0]]), 0, 0)
    np.testing.assert_array_equal(execute, [[True, True, False, False], [True, True, False, False]])


def test_expert_choice_has_the_gradient_of_the_execute_probability():
    gaps = jnp.array([[0.0, 2.0, -1.0]], jnp.float32)
    slope = jax.grad(lambda x: decide(ExpertChoice(1 / 3), pairs(x), 0, 0)[1].sum())(gaps)
    p = jax.nn.sigmoid(gaps)
    np.testing.assert_allclose(slope, p * (1 - p), rtol=1e-5)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_expert_choice_in_a_model_leaves_padding_and_first_tokens_aside(layout, run, tokens, share):
    spec, params = layout
    lengths = np.array([10, 6, 1])
    found = run(spec, params, tokens, lengths=jnp.asarray(lengths, jnp.int32), policy=ExpertChoice(jnp.float32(share)))
    execute = np.asarray(found.routing.execute)
    counts = execute[:, :, 1:].sum(1)  # of the routed layers: the always-on token and the chosen ones
    np.testing.assert_array_equal(counts, np.repeat(1 + np.round(share * (lengths - 1))[:, None], 2, axis=1))
    assert execute[:, 0].all()
    assert not any(execute[row, length:].any() for row, length in enumerate(lengths))
    present = np.arange(10) < lengths[:, None]
    np.testing.assert_array_equal(np.asarray(found.gates)[present], execute[..., 1:][present].astype(np.float32))


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
    sampled = run(spec, params, tokens, policy=Sampled(jax.random.key(3), eviction_gradient=eviction_gradient))
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


@pytest.mark.parametrize("value", ["sampled", "expert", "thresholded", "fixed"])
def test_first_layers_and_tokens_are_always_on(make_spec, make_params, run, tokens, value):
    spec = make_spec(routing={"always_on_layers": 1, "always_on_tokens": 3})
    params = make_params(spec)
    policy = {
        "sampled": Sampled(jax.random.key(0)),
        "expert": ExpertChoice(0.0),
        "thresholded": thresholds(spec, 1.1),
        "fixed": Fixed(jnp.zeros((*tokens.shape, 3), jnp.bool_)),
    }[value]
    execute = np.asarray(run(spec, params, tokens, policy=policy).routing.execute)
    assert execute[:, :, :1].all()
    assert execute[:, :3].all()
    assert not execute[:, 3:, 1:].all()
    if value != "sampled":
        assert not execute[:, 3:, 1:].any()
