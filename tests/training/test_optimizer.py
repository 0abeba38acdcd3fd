"""Schedules as published, decay on matrices only, and what trains."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qtale_jax.config.schema import OptimizerConfig
from qtale_jax.training.optimizer import (
    build_optimizer,
    decays,
    flatten,
    is_trainable,
    learning_rate_schedule,
    nest,
    partition,
)


def test_warm_up_is_linear_then_half_a_cosine_to_zero():
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=2.0, warmup=0.2), 50)
    found = [np.asarray(schedule(step)) for step in range(51)]
    np.testing.assert_allclose(found[:10], [2.0 * (step + 1) / 10 for step in range(10)], rtol=1e-5)
    expected = [1 + math.cos(math.pi * step / 40) for step in range(41)]
    np.testing.assert_allclose(found[10:], expected, atol=1e-6)


@pytest.mark.parametrize(("warmup", "first"), [(0.0, 1.0), (0.1, 1.0), (0.5, 0.2)])
def test_constant_schedule_and_short_warm_ups(warmup, first):
    schedule = learning_rate_schedule(OptimizerConfig(learning_rate=1.0, warmup=warmup, schedule="constant"), 10)
    assert np.asarray(schedule(0)) == pytest.approx(first)
    assert np.asarray(schedule(9)) == 1.0


def test_decay_is_on_matrices_only_in_stacks_too():
    shapes = {
        "embedding/table": ((9, 4), True),
        "final_norm/scale": ((4,), False),
        "layers/routed/attention/query/kernel": ((3, 4, 4), True),
        "layers/routed/attention_norm/scale": ((3, 4), False),
        "layers/routed/router/hidden/bias": ((3, 4), False),
        "layers/always_on/attention/query/lora/up": ((2, 4, 4), True),
    }
    for path, (shape, expected) in shapes.items():
        assert decays(path, jnp.zeros(shape, jnp.float32)) == expected, path


def test_decay_shrinks_matrices_by_rate_times_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, warmup=0.0, schedule="constant")
    optimizer = build_optimizer(config, 10)
    params = {
        "layers/routed/mlp/up/kernel": jnp.ones((2, 3, 3), jnp.float32),
        "layers/routed/mlp_norm/scale": jnp.ones((2, 3), jnp.float32),
    }
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new: Any = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["layers/routed/mlp/up/kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(new["layers/routed/mlp_norm/scale"], 1.0)


def test_first_update_is_adam_with_clipping_and_routers_at_their_own_rate():
    config = OptimizerConfig(learning_rate=0.1, router_learning_rate=0.4, weight_decay=0.0, warmup=0.0, clip=1.0)
    optimizer = build_optimizer(config, 10)
    params = {
        "head/kernel": jnp.zeros((2, 2), jnp.float32),
        "layers/routed/router/hidden/kernel": jnp.zeros((1, 2, 2), jnp.float32),
    }
    grads = jax.tree.map(lambda x: jnp.full_like(x, 100.0), params)
    updates: Any
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head/kernel"], -0.1, rtol=1e-5)  # Adam's first step is the sign times the rate
    np.testing.assert_allclose(updates["layers/routed/router/hidden/kernel"], -0.4, rtol=1e-5)
    moment = optax.tree_utils.tree_get(state, "mu")["head/kernel"]
    np.testing.assert_allclose(moment, 0.1 * 100 / (100 * math.sqrt(8)), rtol=1e-5)  # the gradient had norm 1


@pytest.mark.parametrize(
    ("parameters", "trains"),
    [("all", [True] * 4), ("adapters", [False, True, True, False]), ("routers", [False, False, True, False])],
)
def test_what_trains(parameters, trains):
    paths = [
        "layers/routed/attention/query/kernel",
        "layers/routed/attention/query/lora/up",
        "layers/routed/router/norm/scale",
        "embedding/table",
    ]
    assert [is_trainable(path, parameters) for path in paths] == trains
    tree = nest(dict.fromkeys(paths, 0))
    trainable, frozen = partition(tree, parameters)
    assert nest(trainable, frozen) == tree
    assert set(trainable) | set(frozen) == set(flatten(tree)) and not set(trainable) & set(frozen)
