"""One training step as a pure function: what moves, what stays, and what accumulates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.models.forward import forward
from qtale_jax.models.policy import Dense
from qtale_jax.training import objective
from qtale_jax.training.optimizer import nest

DENSE = {"routing": {"method": "dense"}, "lora": None}


def copied(flat):
    return {path: np.asarray(leaf).copy() for path, leaf in flat.items()}


@pytest.mark.slow
def test_dense_loss_is_the_mean_cross_entropy_of_the_weighted_targets(trainer, batch):
    run = trainer(**DENSE)
    logits = np.asarray(
        forward(
            run.start.spec,
            nest(run.start.trainable, run.start.frozen),
            jnp.asarray(batch["tokens"]),
            segment_ids=jnp.asarray(batch["segment_ids"]),
            policy=Dense(),
        ).logits,
        np.float64,
    )
    chosen = np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    nats = np.log(np.exp(logits).sum(-1)) - chosen
    metrics = run.advance(batch)
    assert metrics["loss"] == pytest.approx((nats * batch["weights"]).sum() / batch["weights"].sum(), rel=1e-5)
    assert "rate_loss" not in metrics and "flip_rate" not in metrics
    assert int(run.state.step) == 1 and int(run.state.bad_step) == -1


@pytest.mark.slow
def test_microbatches_take_the_same_step(trainer, batch):
    batch["weights"][:3, 2:] = 0  # parts of unequal weight: means of means would be wrong
    runs = [trainer(**DENSE, train={"microbatches": parts}) for parts in (1, 2)]
    losses = [run.advance(batch)["loss"] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    whole, parts = (run.state.optimizer for run in runs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


@pytest.mark.slow
def test_microbatches_of_a_routed_model_weigh_tokens_alike(trainer, batch):
    """Noise differs by design, but the only router of two layers sees an input without noise: its entropy does not."""
    batch["segment_ids"][:3, 4:] = 0
    batch["weights"] *= batch["segment_ids"]
    two_layers = {"architecture": {"num_layers": 2}}
    one, two = (trainer(model=two_layers, train={"microbatches": parts}).advance(batch) for parts in (1, 2))
    assert one["entropy_loss"] == pytest.approx(two["entropy_loss"], rel=1e-5)
    assert set(one) == set(two)


@pytest.mark.slow
def test_loss_is_the_sum_of_its_parts(trainer, batch):
    run = trainer(routing={"rate_schedule": "constant", "rate_weight": 2.0, "entropy_weight": 0.7})
    metrics = run.advance(batch)
    expected = metrics["cross_entropy"] + 2.0 * metrics["rate_loss"] + 0.7 * metrics["entropy_loss"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["executed_per_layer"].shape == (2,)
    # executed_ratio counts all layers, the always-on one too; executed_per_layer the two routed ones
    assert metrics["executed_ratio"] == pytest.approx((1 + metrics["executed_per_layer"].sum()) / 3, rel=1e-5)


@pytest.mark.slow
def test_only_adapters_and_routers_move(trainer, batch):
    run = trainer(model={"dtype": "bfloat16"}, train={"parameters": "adapters"})
    frozen, before = copied(run.start.frozen), copied(run.start.trainable)
    for seed in range(2):
        run.advance(batch, seed)
    assert all("/lora/" in path or "/router/" in path for path in before)
    assert not any("/lora/" in path or "/router/" in path for path in frozen)
    for path, leaf in frozen.items():
        assert np.array_equal(leaf.view(np.uint8), np.asarray(run.start.frozen[path]).view(np.uint8)), path
    after = copied(run.state.trainable)
    assert not [path for path in before if np.array_equal(before[path], after[path])]
    assert {leaf.dtype for leaf in after.values()} == {np.dtype("float32")}


@pytest.mark.slow
@pytest.mark.parametrize("eviction_gradient", [True, False])
def test_gradient_reaches_every_router_through_the_cross_entropy_alone(trainer, batch, eviction_gradient):
    routing = {"method": "dllm", "rate_weight": 0.0, "eviction_gradient": eviction_gradient}
    run = trainer(routing=routing, train={"parameters": "routers", "optimizer": {"clip": 0.0}})
    run.advance(batch)
    kernel = "layers/routed/router/hidden/kernel"
    moved = np.abs(np.asarray(run.state.trainable[kernel]) - np.asarray(run.start.trainable[kernel]))
    assert (moved.max(axis=(1, 2)) > 0).all()


@pytest.mark.slow
def test_quantizer_acts_on_every_kth_step_only(trainer, batch):
    """Same parameters and noise at each step number; rounded on steps 0 and 2, full precision on 1."""
    overrides = {
        "routing": {"method": "dense"},
        "lora": {"rank": 2, "dropout": 0.0},
        "train": {"parameters": "adapters"},
    }
    plain = trainer(**overrides)
    aware = trainer(
        **overrides
        | {"train": {"parameters": "adapters", "quantization_aware": {"formats": [{"bits": 2}], "every": 2}}}
    )
    totals = {"targets": jnp.float32(batch["weights"].sum())}

    def loss(run, step):
        arrays = {name: jnp.asarray(array) for name, array in batch.items()}
        function = jax.jit(jax.value_and_grad(run.step.loss, has_aux=True))
        (value, _), grads = function(
            run.start.trainable, run.start.frozen, None, arrays, jnp.int32(step), jax.random.key(0), totals
        )
        return float(value), max(float(jnp.abs(leaf).max()) for leaf in grads.values())

    expected, _ = loss(plain, 0)
    found = [loss(aware, step) for step in range(3)]
    assert abs(found[0][0] - expected) > 1e-2
    assert found[0][0] == pytest.approx(found[2][0])
    assert found[1][0] == pytest.approx(expected, rel=1e-5)
    assert all(0 < slope < 1e3 for _, slope in found)  # straight through the rounding


@pytest.mark.slow
def test_distillation_from_the_dense_start(trainer, batch):
    """A student that is its teacher diverges by nothing; after a step it does."""
    both = {"weight": 1.0, "hidden_weight": 1.0}
    run = trainer(**DENSE, train={"distillation": both}, experiment={"base": {}})
    run.teacher = dict(run.start.trainable)
    first, second = run.advance(batch), run.advance(batch)
    for term in ("distillation", "hidden_distance"):
        assert first[term] == pytest.approx(0, abs=1e-6)
        assert second[term] > 1e-6


@pytest.mark.slow
def test_bad_step_is_remembered_and_parameters_are_left_alone(trainer, batch):
    run = trainer(**DENSE)
    run.advance(batch)
    good = copied(run.state.trainable)
    poisoned = {**batch, "weights": np.full_like(batch["weights"], np.inf)}
    run.advance(poisoned)
    run.advance(batch)
    assert int(run.state.bad_step) == 1 and int(run.state.step) == 3
    after = copied(run.state.trainable)
    assert all(np.array_equal(good[path], after[path]) for path in good)


def test_first_tokens_and_padding_do_not_count_in_routing(trainer, batch):
    from qtale_jax.training.step import counted_tokens

    spec = trainer(train={"parameters": "adapters"}).start.spec
    segments = jnp.array([[1, 1, 1, 2, 2, 0]], jnp.int32)
    np.testing.assert_array_equal(counted_tokens(spec, segments), [[0.0, 1, 1, 0, 1, 0]])
    assert objective.weighted_mean(jnp.ones((1, 6), jnp.float32), counted_tokens(spec, segments), jnp.float32(3)) == 1
