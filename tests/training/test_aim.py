"""What a step aims at: shares in turn, the shift that goes with them, and schedules of weights and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.config.schema import RoutingConfig
from qtale_jax.models.policy import ExpertChoice, Sampled
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.training.aim import CLOSED, Aim, aim_of, annealed, rising, routed_share, target_of, training_policy

STEPS = 100
KEY = jax.random.key(3)


def specification(layers: int = 12, always_on: int = 2) -> ModelSpecification:
    architecture = Architecture(
        vocab_size=8,
        hidden_size=4,
        intermediate_size=4,
        num_layers=layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        max_length=8,
    )
    return ModelSpecification(
        architecture=architecture, routing=RoutingSpecification(method="qtale", always_on_layers=always_on)
    )


def aim(step: int, **routing) -> Aim:
    config = RoutingConfig.model_validate(routing)
    found = jax.jit(lambda number: jax.tree.map(jnp.float32, vars(aim_of(config, SPEC, number, STEPS, KEY))))
    return Aim(**{name: float(value) for name, value in found(jnp.int32(step)).items()})


SPEC = specification()


def test_rate_weight_rises_as_a_quarter_sine():
    found = [5.0 * float(rising(jnp.float32(x))) for x in (0, 1 / 3, 1)]
    np.testing.assert_allclose(found, [0.0, 2.5, 5.0], rtol=1e-5)
    sine = [aim(step, rate_weight=5.0).rate_weight for step in (0, 50, STEPS)]
    np.testing.assert_allclose(sine, [0.0, 5 * np.sqrt(0.5), 5.0], rtol=1e-5)
    assert aim(0, rate_weight=5.0, rate_schedule="constant").rate_weight == 5.0


def test_annealing_is_one_then_a_line_then_nothing():
    found = [float(annealed(jnp.float32(progress))) for progress in (0, 0.1, 0.2, 0.35, 0.5, 0.8, 0.9, 1)]
    np.testing.assert_allclose(found, [1, 1, 1, 0.75, 0.5, 0, 0, 0], atol=1e-6)


def test_only_what_is_asked_to_is_annealed():
    steps = (0, 50, 90)
    schedules = {"entropy_schedule": "anneal", "noise_schedule": "anneal", "entropy_weight": 0.4}
    np.testing.assert_allclose([aim(s, **schedules).entropy_weight for s in steps], [0.4, 0.2, 0.0], atol=1e-6)
    np.testing.assert_allclose([aim(s, **schedules).noise for s in steps], [1.0, 0.5, 0.0], atol=1e-6)
    assert [aim(s, entropy_weight=0.4).entropy_weight for s in steps] == [pytest.approx(0.4)] * 3
    assert [aim(s).noise for s in steps] == [1.0] * 3
    assert aim(0, method="dllm").entropy_weight == 0.0


def test_without_a_range_every_step_aims_at_the_target_and_nothing_is_shifted():
    for step in (0, 1, 2, 77):
        found = aim(step, target=0.6)
        assert found.target == pytest.approx(0.6) and found.shift == 0.0
        assert found.routed_share == pytest.approx((0.6 * 12 - 2) / 10)


def test_the_sandwich_has_both_ends_and_something_between():
    config = RoutingConfig(target_range=(0.35, 0.9))
    found = np.asarray(jax.vmap(lambda s: target_of(config, s, jax.random.fold_in(KEY, s)))(jnp.arange(300)))
    np.testing.assert_allclose(found[0::3], 0.9, rtol=1e-6)
    np.testing.assert_allclose(found[1::3], 0.35, rtol=1e-6)
    drawn = np.sort(found[2::3])
    assert len(set(drawn.tolist())) == 100 and drawn[0] >= 0.35 and drawn[-1] <= 0.9
    assert np.abs(drawn - np.linspace(0.35, 0.9, 100)).max() < 0.1  # evenly over the range


def test_an_aim_depends_on_the_step_and_the_run_alone():
    again = [aim(5, target_range=(0.3, 0.9)) for _ in range(2)]
    assert again[0] == again[1]
    assert aim(5, target_range=(0.3, 0.9)).target != aim(8, target_range=(0.3, 0.9)).target


@given(
    low=st.floats(0, 1, width=32),
    high=st.floats(0, 1, width=32),
    step=st.integers(0, 1000),
    always_on=st.integers(0, 3),
)
def test_targets_stay_in_their_range_and_shifts_are_finite(low, high, step, always_on):
    low, high = sorted((low, high))
    config, spec = RoutingConfig(target_range=(low, high)), specification(4, always_on)
    found = aim_of(config, spec, jnp.int32(step), 1000, KEY)
    assert low <= float(found.target) <= high or float(found.target) == pytest.approx(low, abs=1e-6)
    assert CLOSED / 2 <= float(found.routed_share) <= 1 - CLOSED / 2
    assert np.isfinite(float(found.shift))


@given(st.floats(0.01, 0.99))
def test_the_shift_puts_the_threshold_where_the_share_is(share):
    """Gap + shift >= 0 is p >= 1 - R."""
    config = RoutingConfig(target_range=(share, share), counting="routed")
    found = aim_of(config, SPEC, jnp.int32(0), STEPS, KEY)
    theta = 1 - float(found.routed_share)
    assert float(found.routed_share) == pytest.approx(share, rel=1e-5)
    assert float(jax.nn.sigmoid(-found.shift)) == pytest.approx(theta, rel=1e-4)


def test_counting_all_layers_leaves_less_to_the_routed_ones():
    assert float(routed_share(0.5, 12, 2, "routed")) == 0.5
    assert float(routed_share(0.5, 12, 2, "all")) == pytest.approx(0.4)  # 6 of 12, 2 of them anyway
    assert float(routed_share(1.0, 12, 2, "all")) == pytest.approx(1, abs=2 * CLOSED)
    assert float(routed_share(0.1, 12, 2, "all")) == pytest.approx(CLOSED)  # out of reach


def test_each_method_trains_with_its_policy():
    def policy(**routing):
        config = RoutingConfig.model_validate(routing)
        return training_policy(config, aim_of(config, SPEC, jnp.int32(0), STEPS, KEY), KEY)

    sampled = policy(temperature=2.0, eviction_gradient=False)
    assert isinstance(sampled, Sampled) and (sampled.temperature, sampled.noise, sampled.shift) == (2.0, 1.0, 0.0)
    assert not sampled.eviction_gradient and policy().eviction_gradient
    chosen = policy(method="mod", target=0.5)
    assert isinstance(chosen, ExpertChoice) and float(chosen.share) == pytest.approx(0.4)
    hashed = policy(method="random", target=0.5)
    assert isinstance(hashed, Sampled) and hashed.noise == 0.0
    assert float(jax.nn.sigmoid(hashed.shift)) == pytest.approx(0.4)
