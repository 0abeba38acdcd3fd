"""Fine-tuning that sees the quantizer: which format, which steps, what gradient, how much noise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import QuantizationAwareConfig
from qtale_jax.models.lora import merged_kernel
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.rounding import fake_quantize, fit_grid, grouped
from qtale_jax.training.optimizer import flatten, nest
from qtale_jax.training.quantization_aware import disturb, formats_of, quantizer_transform

pytestmark = pytest.mark.slow

FORMATS = ({"bits": 4}, {"bits": 3, "symmetric": True}, {"bits": 2, "group_size": 8})
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def layer() -> dict:
    """A layer of all seven linears, the query one with an adapter, and what is not a linear."""
    keys = jax.random.split(jax.random.key(0), 9)
    kernels = {name: jax.random.normal(key, (16, 6), jnp.float32) for name, key in zip(LINEARS, keys, strict=False)}
    tree = {
        "attention": {name: {"kernel": kernels[name]} for name in LINEARS[:4]},
        "mlp": {name: {"kernel": kernels[name]} for name in LINEARS[4:]},
        "mlp_norm": {"scale": jnp.ones(16, jnp.float32)},
    }
    lora = {"down": jax.random.normal(keys[7], (16, 2)), "up": jax.random.normal(keys[8], (2, 6))}
    tree["attention"]["query"] = {"kernel": kernels["query"], "lora": lora}
    return tree


def settings(**fields) -> QuantizationAwareConfig:
    return QuantizationAwareConfig.model_validate({"formats": FORMATS, "every": 1} | fields)


@functools.cache
def compiled_transform(config: QuantizationAwareConfig):
    return jax.jit(lambda step, number, tree: quantizer_transform(config, step, KEY)(tree, number))


def transformed(config: QuantizationAwareConfig, step: int, layer: dict, number: int = 0) -> dict:
    return compiled_transform(config)(jnp.int32(step), jnp.int32(number), layer)


quantized = jax.jit(fake_quantize, static_argnums=1)


def kernels_of(layer: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(linear["kernel"]) for part in ("attention", "mlp") for name, linear in layer[part].items()}


def drawn(config: QuantizationAwareConfig, step: int, layer: dict) -> int | None:
    """The index of the format that a step rounds all linears to; None for full precision."""
    whole = kernels_of(layer) | {"query": np.asarray(merged_kernel(layer["attention"]["query"]))}
    found = kernels_of(transformed(config, step, layer))
    for index, format in enumerate(formats_of(config)):
        expected = {name: quantized(jnp.asarray(kernel), format) for name, kernel in whole.items()}
        if all(np.allclose(found[name], expected[name], atol=1e-5) for name in LINEARS):
            return index
    for name in LINEARS:
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-6)
    return None


def test_biases_and_head_norms_stay(layer):
    bias, scale = jnp.arange(6, dtype=jnp.float32), jnp.full((3,), 2.0, jnp.float32)
    attention = {name: {**linear, "bias": bias} for name, linear in layer["attention"].items()}
    found = transformed(settings(), 1, {**layer, "attention": attention | {"query_norm": {"scale": scale}}})
    plain = transformed(settings(), 1, layer)
    np.testing.assert_array_equal(found["attention"]["query_norm"]["scale"], scale)
    for name, linear in plain["attention"].items():
        assert found["attention"][name].keys() == {"kernel", "bias"}
        np.testing.assert_array_equal(found["attention"][name]["bias"], bias)
        np.testing.assert_array_equal(found["attention"][name]["kernel"], linear["kernel"])


def test_formats_are_those_of_the_configuration():
    assert formats_of(settings()) == (
        TensorFormat(bits=4),
        TensorFormat(bits=3, symmetric=True),
        TensorFormat(bits=2, group_size=8),
    )
    with pytest.raises(ValueError, match="no format to train for"):
        quantizer_transform(QuantizationAwareConfig(), jnp.int32(0), KEY)


@pytest.mark.slow
def test_every_format_is_drawn_and_one_serves_a_whole_step(layer):
    found = [drawn(settings(), step, layer) for step in range(24)]
    counts = np.bincount(found, minlength=3)
    assert counts.min() >= 3 and counts.sum() == 24
    assert found[:4] == [drawn(settings(), step, layer) for step in range(4)]


@pytest.mark.parametrize("every", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_other_steps_have_full_precision(layer, every):
    found = [drawn(settings(every=every), step, layer) for step in range(6)]
    assert [index is not None for index in found] == [step % every == 0 for step in range(6)]


def test_adapters_are_merged_and_the_rest_is_left_alone(layer):
    found = transformed(settings(every=2), 1, layer)
    np.testing.assert_array_equal(found["mlp_norm"]["scale"], layer["mlp_norm"]["scale"])
    assert set(found["attention"]["query"]) == {"kernel"}
    np.testing.assert_array_equal(found["mlp"]["up"]["kernel"], layer["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("form", ["round", "noise"])
@pytest.mark.parametrize("step", [0, 1])
def test_the_gradient_is_that_of_the_merged_weights(layer, form, step):
    config = settings(form=form, every=2)
    weights = {name: jax.random.normal(jax.random.key(i), (16, 6)) for i, name in enumerate(LINEARS)}

    def loss(tree):
        out = quantizer_transform(config, jnp.int32(step), KEY)(tree, 0)
        return sum(
            jnp.sum(out[part][name]["kernel"] * weights[name]) for part in ("attention", "mlp") for name in out[part]
        )

    slope = jax.jit(jax.grad(loss))(layer)
    np.testing.assert_allclose(slope["mlp"]["down"]["kernel"], weights["down"], rtol=1e-6)
    lora = layer["attention"]["query"]["lora"]
    np.testing.assert_allclose(slope["attention"]["query"]["kernel"], weights["query"], rtol=1e-6)
    np.testing.assert_allclose(slope["attention"]["query"]["lora"]["up"], lora["down"].T @ weights["query"], rtol=1e-4)


@pytest.mark.parametrize("format", [TensorFormat(bits=3), TensorFormat(bits=2, group_size=32, symmetric=True)])
def test_noise_is_uniform_over_one_step_of_the_grid(format):
    """Mean 0, variance s^2 / 12, never more than half a step: as large as an error of rounding can be."""
    weight = jax.random.normal(jax.random.key(5), (256, 64), jnp.float32)
    scales = np.asarray(fit_grid(grouped(weight, format), format).scales)
    noise = np.asarray(disturb(weight, format, KEY) - weight)
    in_steps = noise / np.repeat(scales, 256 // len(scales), axis=0)
    assert np.abs(in_steps).max() <= 0.5 + 1e-5
    assert abs(in_steps.mean()) < 4 / np.sqrt(12 * in_steps.size)
    assert in_steps.var() == pytest.approx(1 / 12, rel=4 * np.sqrt(0.8 / in_steps.size))  # kurtosis 1.8
    rounding = np.asarray(fake_quantize(weight, format) - weight)
    assert noise.var() == pytest.approx(rounding.var(), rel=0.35)


def test_every_linear_layer_and_step_has_noise_of_its_own(layer):
    same = {name: {"kernel": layer["mlp"]["up"]["kernel"]} for name in LINEARS}
    tree = {"attention": {n: same[n] for n in LINEARS[:4]}, "mlp": {n: same[n] for n in LINEARS[4:]}}
    config = settings(formats=FORMATS[:1], form="noise")
    fields = [
        kernels_of(transformed(config, step, tree, number))[name] - np.asarray(layer["mlp"]["up"]["kernel"])
        for step, number, name in ((0, 0, "up"), (0, 0, "gate"), (0, 1, "up"), (1, 0, "up"))
    ]
    for index, one in enumerate(fields):
        for other in fields[index + 1 :]:
            assert abs(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) < 0.4
    again = kernels_of(transformed(config, 0, tree, 1))["up"] - np.asarray(layer["mlp"]["up"]["kernel"])
    np.testing.assert_array_equal(again, fields[2])


@pytest.mark.slow
def test_the_loss_of_a_quantized_step_is_that_of_quantized_weights(trainer, batch):
    """One of the formats explains the loss, of scanned layers and of routed ones, in full."""
    dense = {"routing": {"method": "dense"}, "lora": None}
    run = trainer(**dense, train={"quantization_aware": {"formats": FORMATS, "every": 1}})
    plain = trainer(**dense)
    totals = {"targets": jnp.float32(batch["weights"].sum())}
    arrays = {name: jnp.asarray(array) for name, array in batch.items()}

    unquantized = jax.jit(plain.step.loss)

    def rounded(format):
        tree = nest(plain.start.trainable)
        for stack in tree["layers"].values():
            for part in ("attention", "mlp"):
                stack[part] = {name: {"kernel": fake_quantize(x["kernel"], format)} for name, x in stack[part].items()}
        return flatten(tree)

    expected = [
        float(unquantized(rounded(format), {}, None, arrays, jnp.int32(0), KEY, totals)[0])
        for format in formats_of(run.config.train.quantization_aware)
    ]
    assert min(np.diff(sorted(expected))) > 1e-4
    compiled = jax.jit(run.step.loss)
    found = [
        float(compiled(run.start.trainable, {}, None, arrays, jnp.int32(step), KEY, totals)[0]) for step in range(12)
    ]
    nearest = [int(np.argmin([abs(value - other) for other in expected])) for value in found]
    np.testing.assert_allclose(found, [expected[index] for index in nearest], rtol=1e-5)
    assert set(nearest) == {0, 1, 2}
