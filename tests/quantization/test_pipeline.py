import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import abstract_parameters, initialize
from qtale_jax.models.forward import forward
from qtale_jax.models.lora import map_linears
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import (
    LINEARS,
    Architecture,
    LoraSpecification,
    ModelSpecification,
    RoutingSpecification,
    TensorFormat,
)
from qtale_jax.models.stacking import stack_layers
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.rounding import fake_quantize
from qtale_jax.quantization.storage import storage_bytes

pytestmark = pytest.mark.slow

ARCHITECTURE = Architecture(
    vocab_size=23,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_length=32,
)


@pytest.fixture(scope="module")
def model():
    """A routed model with its parameters."""
    spec = ModelSpecification(
        architecture=ARCHITECTURE,
        routing=RoutingSpecification(method="qtale", always_on_layers=1, always_on_tokens=2, router_hidden=16),
    )
    return spec, initialize(spec, jax.random.key(0))


def linears_of(layer) -> dict:
    return layer["attention"] | layer["mlp"]


@pytest.mark.parametrize(("bits", "group"), [(4, -1), (3, 16)])
def test_quantized_model_computes_with_the_rounded_weights(model, bits, group):
    spec, params = model
    config = QuantizeConfig(bits=bits, group_size=group)
    new_spec, new_params, _ = quantize_parameters(spec, params, config)
    format = TensorFormat(bits=bits, group_size=group)
    rounded = {
        index: map_linears(lambda _, linear: {"kernel": fake_quantize(linear["kernel"], format)}, layer)
        for index, layer in params["layers"].items()
    }
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 23, jnp.int32)
    run = jax.jit(forward, static_argnums=0)
    policy = Thresholded(jnp.full((2,), 0.5, jnp.float32))
    expected = run(spec, {**params, "layers": rounded}, tokens, policy=policy).logits
    unrolled = run(new_spec, new_params, tokens, policy=policy).logits
    stacked = run(new_spec, stack_layers(new_spec, new_params), tokens, policy=policy).logits
    np.testing.assert_allclose(unrolled, expected, atol=1e-5)
    np.testing.assert_allclose(stacked, expected, atol=1e-5)
    full = run(spec, params, tokens, policy=policy).logits
    assert float(jnp.max(jnp.abs(full - expected))) > 1e-3


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_only_linears_change_and_the_skeleton_knows_it(model, bits, symmetric):
    spec, params = model
    config = QuantizeConfig(bits=bits, group_size=16, symmetric=symmetric)
    new_spec, new_params, report = quantize_parameters(spec, params, config)
    format = TensorFormat(bits=bits, group_size=16, symmetric=symmetric)
    assert new_spec.bits == bits and spec.quantization is None
    assert new_spec.quantization.formats == {f"{i}/{name}": format for i in range(3) for name in LINEARS}
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new_params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_parameters(new_spec))
    for name in ("embedding", "head", "final_norm"):
        assert new_params[name] is params[name]
    for index, layer in new_params["layers"].items():
        kept = set(layer) - {"attention", "mlp"}
        assert kept == {"attention_norm", "mlp_norm"} | ({"router"} if index >= 1 else set())
        for part in kept:  # the very arrays
            before, after = jax.tree.leaves(params["layers"][index][part]), jax.tree.leaves(layer[part])
            assert all(a is b for a, b in zip(after, before, strict=True))
    linears = sum(storage_bytes(ARCHITECTURE.linear_shape(name), format) for name in LINEARS)
    floats = sum(4 * int(np.prod(ARCHITECTURE.linear_shape(name))) for name in LINEARS)
    assert [one.bytes_before - one.bytes_after for one in report] == [floats - linears] * 3


def test_report_measures_the_relative_error(model):
    spec, params = model
    found = {bits: quantize_parameters(spec, params, QuantizeConfig(bits=bits))[2] for bits in (8, 3)}
    for layer, one in enumerate(found[3]):
        assert one.layer == layer and set(one.weight_error) == set(LINEARS)
        for name, error in one.weight_error.items():
            kernel = np.asarray(linears_of(params["layers"][layer])[name]["kernel"], np.float64)
            rounded = np.asarray(fake_quantize(jnp.asarray(kernel, jnp.float32), TensorFormat(bits=3)), np.float64)
            assert error == pytest.approx(np.linalg.norm(kernel - rounded) / np.linalg.norm(kernel), rel=1e-5)
    by_bits = [found[bits][0].weight_error["gate"] for bits in (8, 3)]
    assert by_bits[0] < 0.01 < 0.1 < by_bits[1]


def test_sixteen_bits_change_nothing(model):
    spec, params = model
    new_spec, new_params, report = quantize_parameters(spec, params, QuantizeConfig(method="none", bits=16))
    assert new_spec is spec and new_params is params and not report


def test_progress_counts_layers(model):
    done = []
    spec, params = model
    quantize_parameters(spec, params, QuantizeConfig(bits=8), done.append)
    assert done == [0, 1, 2]


def test_refuses_what_cannot_be_quantized(model):
    spec, params = model
    config = QuantizeConfig(bits=4)
    rounded_spec, rounded_params, _ = quantize_parameters(spec, params, config)
    with pytest.raises(InputError, match="4-bit weights already"):
        quantize_parameters(rounded_spec, rounded_params, config)
    with pytest.raises(InputError, match="not merged"):
        quantize_parameters(spec.model_copy(update={"lora": LoraSpecification(rank=2)}), params, config)
    with pytest.raises(InputError, match="group_size=32 does not divide the 48 inputs of linear '0/down'"):
        quantize_parameters(spec, params, QuantizeConfig(bits=4, group_size=32))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_refuses_weights_that_are_not_finite(model, bad):
    spec, params = model
    kernel = params["layers"][1]["mlp"]["up"]["kernel"].at[0, 0].set(bad)
    layer = {**params["layers"][1], "mlp": {**params["layers"][1]["mlp"], "up": {"kernel": kernel}}}
    broken = {**params, "layers": {**params["layers"], 1: layer}}
    with pytest.raises(InputError, match="layer 1, linear 'up'"):
        quantize_parameters(spec, broken, QuantizeConfig(bits=3))
