"""Every term of the objective against NumPy float64."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.training import objective


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def logistic(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def test_cross_entropy(rng):
    logits, targets = rng.normal(size=(2, 5, 7)) * 4, rng.integers(0, 7, (2, 5))
    expected = -np.take_along_axis(log_softmax(logits), targets[..., None], -1)[..., 0]
    found = objective.token_cross_entropy(jnp.asarray(logits, jnp.float32), jnp.asarray(targets, jnp.int32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_cross_entropy_of_huge_logits_is_finite():
    logits = jnp.array([[[1e4, -1e4]]], jnp.float32)
    assert float(objective.token_cross_entropy(logits, jnp.array([[1]], jnp.int32))[0, 0]) == 2e4


def test_weighted_mean_of_nothing_is_zero():
    nothing = jnp.zeros(3, jnp.float32)
    assert float(objective.weighted_mean(jnp.ones(3, jnp.float32), nothing, nothing.sum())) == 0


@pytest.mark.parametrize("counting", ["all", "routed"])
@pytest.mark.parametrize("form", ["token", "batch"])
def test_rate_loss(rng, counting, form):
    """D-LLM's form is a mean over tokens of |mean over layers - R|, over all layers in the reference."""
    gates = (rng.random((3, 6, 5)) < 0.4).astype(np.float64)
    counted, target, always_on = (rng.random((3, 6)) < 0.7).astype(np.float64), 0.5, 2
    share = gates.mean(-1) if counting == "routed" else (gates.sum(-1) + always_on) / 7
    distance = share - target
    mean = (distance * counted).sum() / counted.sum()
    expected = abs(mean) if form == "batch" else (np.abs(distance) * counted).sum() / counted.sum()
    found_share = objective.executed_share(jnp.asarray(gates, jnp.float32), always_on, counting)
    np.testing.assert_allclose(found_share, share, rtol=1e-6)
    weights = jnp.asarray(counted, jnp.float32)
    found = objective.rate_loss(found_share, weights, weights.sum(), target, form)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_counting_all_layers_aims_at_a_smaller_routed_share():
    """32 layers, 2 always on, R = 0.5: the loss is 0 at a routed share of (0.5 * 32 - 2) / 30 = 0.467."""
    gates = jnp.zeros((1, 1, 30), jnp.float32).at[0, 0, :14].set(1.0)
    assert float(objective.executed_share(gates, 2, "all")[0, 0]) == 0.5
    assert float(objective.executed_share(gates, 2, "routed")[0, 0]) == pytest.approx(0.467, abs=1e-3)


def test_batch_rate_lets_tokens_differ():
    share, ones = jnp.array([[0.0, 1.0]], jnp.float32), jnp.ones((1, 2), jnp.float32)
    assert float(objective.rate_loss(share, ones, ones.sum(), 0.5, "batch")) == 0
    assert float(objective.rate_loss(share, ones, ones.sum(), 0.5, "token")) == 0.5


def test_entropy_penalties(rng):
    gaps = rng.normal(size=50) * 5
    p = logistic(gaps)
    log_cosh = -(np.log(p) + np.log(1 - p)) / 2 - np.log(2)
    entropy = 1 + (p * np.log(p) + (1 - p) * np.log(1 - p)) / np.log(2)
    values = jnp.asarray(gaps, jnp.float32)
    np.testing.assert_allclose(objective.entropy_penalty(values, "log_cosh"), log_cosh, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        objective.entropy_penalty(values, "log_cosh"), np.log(np.cosh(gaps / 2)), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(objective.entropy_penalty(values, "entropy"), entropy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["log_cosh", "entropy"])
def test_entropy_penalty_is_zero_when_undecided_and_even(form):
    gaps = jnp.array([0.0, 3.0, -3.0, 200.0], jnp.float32)
    found = np.asarray(objective.entropy_penalty(gaps, form))
    assert found[0] == pytest.approx(0, abs=1e-6)
    assert found[1] == pytest.approx(found[2], rel=1e-5)
    assert found[3] == pytest.approx(100 - np.log(2) if form == "log_cosh" else 1.0, rel=1e-5)


def test_only_log_cosh_pulls_a_saturated_router_back():
    def slope(form: Literal["log_cosh", "entropy"]) -> float:
        return float(jax.grad(lambda g: objective.entropy_penalty(g, form))(jnp.float32(30.0)))

    assert slope("log_cosh") == pytest.approx(0.5)
    assert slope("entropy") == pytest.approx(0.0, abs=1e-6)


def test_choice_loss_is_the_cross_entropy_of_the_probability_with_the_choice(rng):
    gaps, chosen = rng.normal(size=(3, 7)) * 4, rng.random((3, 7)) < 0.5
    p = logistic(gaps)
    expected = -np.where(chosen, np.log(p), np.log(1 - p))
    found = objective.choice_loss(jnp.asarray(gaps, jnp.float32), jnp.asarray(chosen))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    far = objective.choice_loss(jnp.array([300.0, -300.0], jnp.float32), jnp.array([False, False]))
    np.testing.assert_allclose(far, [300.0, 0.0])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_from_the_teacher(rng, temperature):
    student, teacher = rng.normal(size=(2, 4, 9)), rng.normal(size=(2, 4, 9)) * 2
    log_t, log_s = log_softmax(teacher / temperature), log_softmax(student / temperature)
    expected = (np.exp(log_t) * (log_t - log_s)).sum(-1) * temperature**2
    found = objective.distillation_loss(
        jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), temperature
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_hidden_distance_ignores_the_scale_of_a_residual_stream(rng):
    student, teacher = rng.normal(size=(2, 3, 16)), rng.normal(size=(2, 3, 16))
    one, other = (x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (student, teacher))
    found = objective.hidden_distance(jnp.asarray(student * 7, jnp.float32), jnp.asarray(teacher, jnp.float32))
    np.testing.assert_allclose(found, ((one - other) ** 2).mean(-1), rtol=1e-4)
    same = objective.hidden_distance(jnp.asarray(teacher / 9, jnp.float32), jnp.asarray(teacher, jnp.float32))
    np.testing.assert_allclose(same, 0.0, atol=1e-6)


def test_routing_statistics(rng):
    """The flip rate is the share of counted decisions that noise turned against gap >= 0."""
    logits = rng.normal(size=(2, 6, 3, 2))
    execute = rng.random((2, 6, 3)) < 0.5
    counted = (rng.random((2, 6)) < 0.6).astype(np.float64)
    gaps, mask = logits[..., 1] - logits[..., 0], np.broadcast_to(counted[..., None] > 0, execute.shape)
    p = logistic(gaps[mask])
    found = objective.routing_statistics(
        jnp.asarray(logits, jnp.float32), jnp.asarray(execute), jnp.asarray(counted, jnp.float32)
    )
    np.testing.assert_allclose(found["flip_rate"], (execute != (gaps >= 0))[mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(found["logit_gap_mean"], np.abs(gaps[mask]).mean(), rtol=1e-5)
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean(), rtol=1e-5)
    shares = (execute * counted[..., None]).sum((0, 1)) / counted.sum()
    np.testing.assert_allclose(found["executed_per_layer"], shares, rtol=1e-5)
    for quantile in (10, 50, 90):
        expected = np.quantile(np.abs(gaps[mask]), quantile / 100)
        np.testing.assert_allclose(found[f"logit_gap_q{quantile}"], expected, rtol=1e-4)


def test_squared_rate_loss_is_a_price_per_layer_and_adds_up_over_equal_microbatches():
    share = jnp.asarray([[0.9, 0.5], [0.7, 0.7]], jnp.float32)
    ones, total = jnp.ones((2, 2), jnp.float32), jnp.float32(4)

    def loss(share, counted=ones):
        return objective.rate_loss(share, counted, total, 0.5, "squared")

    assert float(loss(share)) == pytest.approx(0.2**2)
    np.testing.assert_allclose(jax.grad(loss)(share), np.full((2, 2), 2 * 0.2 / 4), rtol=1e-6)
    parts = [float(loss(share[row : row + 1], ones[:1])) for row in (0, 1)]
    assert sum(parts) == pytest.approx(0.2**2)  # both rows are 0.2 off on average
