"""Losses and gradients of fine-tuning against the reference code of D-LLM; made by golden/generate.py."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from qtale_jax.config.schema import Config
from qtale_jax.models.specification import Architecture, LoraSpecification, ModelSpecification, RoutingSpecification
from qtale_jax.models.stacking import stack_layers, unstack_layers
from qtale_jax.training.optimizer import build_optimizer, nest, partition
from qtale_jax.training.step import TrainStep, counted_tokens

HEADS, STEPS = 1, 10
GRADIENT = "gradient of "

NAMES = {
    "tok_embeddings": "embedding/table",
    "norm": "final_norm/scale",
    "output": "head/kernel",
    "attention.wq": "attention/query/kernel",
    "attention.wk": "attention/key/kernel",
    "attention.wv": "attention/value/kernel",
    "attention.wo": "attention/output/kernel",
    **{
        f"attention.lora_{short}.linear_{letter}": f"attention/{name}/lora/{part}"
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for letter, part in (("A", "down"), ("B", "up"))
    },
    "attention_norm": "attention_norm/scale",
    "ffn_norm": "mlp_norm/scale",
    "feed_forward.w1": "mlp/gate/kernel",
    "feed_forward.w2": "mlp/down/kernel",
    "feed_forward.w3": "mlp/up/kernel",
    "router.linear_1": "router/hidden/kernel",
    "router.norm": "router/norm/scale",
    "router.linear_2": "router/output/kernel",
}


def path_of(name: str) -> tuple[str | int, ...]:
    """Where an array of the reference stands in our parameters."""
    module, kind = name.rsplit(".", 1)
    layer: tuple[str | int, ...] = ()
    if module.startswith("layers."):
        _, number, module = module.split(".", 2)
        layer = ("layers", int(number))
    path = NAMES[module].split("/")
    if kind == "bias":
        path[-1] = "bias"
    return (*layer, *path)


def ours(name: str, array: np.ndarray) -> jax.Array:
    """An array of the reference as we have it: inputs first; the two halves of a head apart, not interleaved."""
    path = path_of(name)
    if {"query", "key"} & set(path) and path[-1] in ("kernel", "up"):
        array = array.reshape(HEADS, -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
    return jnp.asarray(array.T if path[-1] in ("kernel", "down", "up") else array)


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(Path(__file__).parent / "golden" / "reference.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def spec() -> ModelSpecification:
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 48, "num_layers": 3, "head_dim": 16}
    return ModelSpecification(
        architecture=Architecture(**sizes, num_heads=HEADS, num_kv_heads=HEADS, max_length=16),
        routing=RoutingSpecification(method="dllm", router_hidden=8, always_on_layers=1, always_on_tokens=1),
        lora=LoraSpecification(rank=2, dropout=0.0),
    )


@pytest.fixture(scope="module")
def step(spec) -> TrainStep:
    """The step as D-LLM has it, without noise: noise that has been annealed away is none."""
    routing = {"method": "dllm", "always_on_layers": 1, "always_on_tokens": 1, "noise_schedule": "anneal"}
    config = Config.model_validate(
        {"routing": routing | {"rate_schedule": "constant"}, "lora": {"rank": 2, "dropout": 0.0}}
    )
    return TrainStep(spec, config, build_optimizer(config.train.optimizer, STEPS), STEPS)


def test_losses_and_gradients_are_those_of_the_reference(golden, spec, step):
    weights = {
        path_of(name): ours(name, array)
        for name, array in golden.items()
        if not name.startswith(GRADIENT) and "." in name
    }
    trained, frozen = partition(stack_layers(spec, unflatten_dict(weights)), "adapters")
    tokens, present = golden["tokens"].astype(np.int32), golden["present"].astype(np.int32)
    batch = {
        "tokens": jnp.asarray(tokens[:, :-1]),
        "targets": jnp.asarray(tokens[:, 1:]),
        "weights": jnp.asarray(golden["labels"][:, 1:] > 0, jnp.float32),
        # The last token of a row has no target, and its routing does not count in the reference.
        "segment_ids": jnp.asarray(present[:, 1:]),
    }
    totals = {"targets": batch["weights"].sum(), "counted": counted_tokens(spec, batch["segment_ids"]).sum()}
    loss = jax.jit(jax.value_and_grad(step.loss, has_aux=True))
    (_, metrics), flat = loss(trained, frozen, None, batch, jnp.int32(STEPS), jax.random.key(0), totals)
    np.testing.assert_allclose(metrics["cross_entropy"], golden["cross_entropy"], rtol=1e-5)
    np.testing.assert_allclose(metrics["rate_loss"], golden["active"], rtol=1e-5)
    assert 0.2 < metrics["executed_ratio"] < 0.9

    gradients = flatten_dict(unstack_layers(spec, nest(flat)))
    names = [name.removeprefix(GRADIENT) for name in golden if name.startswith(GRADIENT)]
    assert {path_of(name) for name in names} == set(gradients)
    for name in names:
        expected = ours(name, golden[GRADIENT + name])
        np.testing.assert_allclose(gradients[path_of(name)], expected, rtol=1e-3, atol=2e-5, err_msg=name)
