"""Steps that skip, against masked ones: same values, same update when nothing is left out, any mesh, one program."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

MOVING = {"train": {"parameters": "adapters", "optimizer": {"warmup": 0.0}}, "routing": {"rate_schedule": "constant"}}


def skipping(share: float | None, **train):
    return MOVING | {"train": MOVING["train"] | {"skipped_share": share} | train}


def reluctant(run):
    """Moves the routers to where they skip about seven tokens of ten."""
    path = "layers/routed/router/output/bias"
    bias = np.broadcast_to(np.array([1.0, 0.0], np.float32), run.state.trainable[path].shape)
    run.state.trainable[path] = jax.device_put(bias, run.state.trainable[path].sharding)
    return run


@pytest.fixture
def whole(batch):
    """The batch without padding."""
    ones = np.ones_like(batch["segment_ids"])
    return batch | {"segment_ids": ones, "weights": ones.astype(np.float32)}


@pytest.mark.parametrize("train", [{}, {"microbatches": 2}, {"parameters": "all"}], ids=["whole", "parts", "all"])
def test_step_without_leaving_out_is_the_masked_step(trainer, batch, train):
    masked, found = (reluctant(trainer(**skipping(share, **train))) for share in (None, 1.0))
    for seed in range(2):
        expected, metrics = (run.advance(batch, seed) for run in (masked, found))
        assert 0.35 < expected["executed_ratio"] < 0.8
        for name in expected:
            np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5, atol=1e-5, err_msg=name)
    for name, leaf in masked.state.trainable.items():
        np.testing.assert_allclose(found.state.trainable[name], leaf, atol=1e-5, err_msg=name)


def test_first_step_that_leaves_out_has_the_masked_loss_and_other_gradients(trainer, whole):
    masked, found = (reluctant(trainer(**skipping(share))).advance(whole) for share in (None, 0.1))
    assert found["loss"] == pytest.approx(masked["loss"], abs=1e-5)
    assert found["executed_ratio"] == masked["executed_ratio"]
    assert found["gradient_norm"] != pytest.approx(masked["gradient_norm"], rel=1e-3)


def test_steps_of_any_size_are_one_program(trainer, batch):
    """Batches whose tokens take different sizes, from few tokens of a row to all."""
    run = reluctant(trainer(**skipping(0.25)))
    for _ in range(2):
        run.advance(batch)
    programs = run.compiled._cache_size()
    for length in (2, 5, 8, 12):
        batch["segment_ids"] = np.broadcast_to((np.arange(12) < length).astype(np.int32), batch["tokens"].shape)
        batch["weights"] = batch["segment_ids"].astype(np.float32)
        assert np.isfinite(run.advance(batch, length)["loss"])
    assert run.compiled._cache_size() == programs


def test_a_mesh_takes_the_steps_of_one_device(trainer, whole):
    sizes = {"data": 2, "fsdp": 2, "tensor": 2}
    one, many = reluctant(trainer(**skipping(0.25))), reluctant(trainer(jax.devices(), **skipping(0.25), mesh=sizes))
    losses = np.asarray([[run.advance(whole, seed)["loss"] for run in (one, many)] for seed in range(3)])
    np.testing.assert_allclose(losses[:, 1], losses[:, 0], atol=1e-5)
    assert losses[2, 0] != losses[0, 0]
    for name, leaf in one.state.trainable.items():
        np.testing.assert_allclose(many.state.trainable[name], leaf, atol=1e-5, err_msg=name)


def test_dropout_rounding_and_bfloat16_go_with_it(trainer, whole):
    """Adapters' dropout draws for the tokens that are there, weights are rounded before a layer is run."""
    aware = {"formats": [{"bits": 4}], "every": 1}
    runs = [
        trainer(**skipping(0.25), lora={"dropout": 0.5}),
        trainer(**skipping(0.25, quantization_aware=aware, compute_dtype="bfloat16")),
    ]
    for run in map(reluctant, runs):
        losses = [float(run.advance(whole)["loss"]) for _ in range(2)]
        assert np.isfinite(losses).all() and losses[0] != losses[1]
