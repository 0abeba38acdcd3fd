"""Every mesh computes what one device computes."""

import jax
import numpy as np
import pytest

pytestmark = pytest.mark.slow

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all": (2, 2, 2)}
ROUTED = {"train": {"parameters": "adapters"}, "routing": {"rate_schedule": "constant"}}


@pytest.fixture(scope="module")
def batches():
    rng = np.random.default_rng(1)
    out = []
    for _ in range(3):
        tokens = rng.integers(3, 56, (8, 12)).astype(np.int32)
        ones = np.ones((8, 12), np.int32)
        out.append(
            {
                "tokens": tokens,
                "targets": np.roll(tokens, -1, 1),
                "weights": ones.astype(np.float32),
                "segment_ids": ones,
            }
        )
    return out


@pytest.fixture(scope="module")
def single(trainer, batches):
    """Losses and parameters of three steps on one device."""
    run = trainer(**ROUTED)
    losses = [float(run.advance(batch)["loss"]) for batch in batches]
    return losses, jax.device_get(run.state.trainable)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_loss_equals_that_of_one_device(trainer, batches, single, shape):
    data, fsdp, tensor = shape
    run = trainer(jax.devices(), **ROUTED, mesh={"data": data, "fsdp": fsdp, "tensor": tensor})
    losses = [float(run.advance(batch)["loss"]) for batch in batches]
    np.testing.assert_allclose(losses, single[0], atol=1e-5, rtol=0)
    kernel = run.start.frozen["layers/routed/mlp/up/kernel"]
    # Each device holds its part of the weights: 1 / (fsdp x tensor).
    assert kernel.addressable_shards[0].data.size * fsdp * tensor == kernel.size
    assert losses[2] != losses[0]
