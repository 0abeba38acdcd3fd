"""AWQ's scales in a block: what is computed stays the same, what is rounded gets finer where it matters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import QuantizeConfig, StatisticsConfig
from qtale_jax.models.decoder import skeleton
from qtale_jax.models.forward import context_of, merge
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.layer import quantize_layer, restore_layer
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.scaling import READERS, can_scale, fold, scale_inputs

pytestmark = pytest.mark.slow

FORMATS = {name: TensorFormat(bits=3, group_size=16) for name in LINEARS}


@pytest.fixture(scope="module")
def models(make_routed):
    """Multi-head and grouped-query models of two layers, the second routed."""
    return {heads: make_routed(num_layers=2, num_kv_heads=heads) for heads in (4, 2)}


def block_of(spec, calibration):
    """Compiled: result and router logits of the routed layer, everything executing."""
    tokens, segments = map(jnp.asarray, calibration)

    @jax.jit
    def run(layer, hidden):
        context, _ = context_of(spec, tokens, segments)
        block = merge(skeleton(spec).layers[1], layer)
        return block(hidden, context, context.present)[0], block.router(hidden)

    return run


def prefix_of(spec, params, calibration) -> Prefix:
    """The rows before the routed layer, which is decided."""
    prefix = Prefix(spec, *calibration, StatisticsConfig(batch_size=10, min_rows=0), jnp.dtype(jnp.float32))
    prefix.start(params["embedding"])
    prefix.decide(0, params["layers"][0])
    prefix.advance(0, params["layers"][0])
    prefix.decide(1, params["layers"][1])
    return prefix


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["multi-head", "grouped"])
def test_a_folded_layer_computes_the_same(models, calibration, kv_heads):
    spec, params = models[kv_heads]
    layer, architecture = params["layers"][1], spec.architecture
    prefix = prefix_of(spec, params, calibration)
    found, statistics, before = scale_inputs(
        layer, architecture, FORMATS, lambda reader: prefix.statistics(1, layer, reader), grid=10
    )
    run, hidden = block_of(spec, calibration), prefix._hidden[0]
    (out, logits), (scaled_out, scaled_logits) = run(layer, hidden), run(found, hidden)
    np.testing.assert_allclose(scaled_out, out, atol=1e-5 * float(jnp.abs(out).max()))
    np.testing.assert_array_equal(scaled_logits, logits)
    assert before.keys() == FORMATS.keys() and all(0.01 < error < 1 for error in before.values())
    changed = {
        reader: not np.array_equal(statistics[reader].hessian, prefix.statistics(1, layer, reader).hessian)
        for reader in READERS
    }
    assert changed == {"query": True, "output": kv_heads == 4, "gate": True, "down": True}
    for reader in READERS:  # statistics of what the scaled layer's linears will see
        expected = prefix.statistics(1, found, reader).hessian
        np.testing.assert_allclose(statistics[reader].hessian, expected, atol=1e-4 * float(expected.max()))


def test_values_scale_only_where_every_query_head_has_its_own(models):
    for heads, allowed in ((4, True), (2, False)):
        architecture = models[heads][0].architecture
        assert [can_scale(architecture, reader) for reader in READERS] == [True, allowed, True, True]


def test_strong_channels_get_scales(models, calibration):
    """Larger for those that fire more; folded in, the weights that read them are larger and the norm is smaller."""
    spec, params = models[2]
    layer = params["layers"][1]
    prefix = prefix_of(spec, params, calibration)
    found, _, _ = scale_inputs(
        layer, spec.architecture, FORMATS, lambda reader: prefix.statistics(1, layer, reader), grid=10
    )
    scales = np.asarray(layer["attention_norm"]["scale"] / found["attention_norm"]["scale"])
    assert scales.max() / scales.min() > 1.2
    magnitude = np.asarray(prefix.statistics(1, layer, "query").mean_magnitude)
    assert np.corrcoef(np.log(scales), np.log(magnitude))[0, 1] > 0.99
    for name in READERS["query"]:
        ratio = np.asarray(found["attention"][name]["kernel"] / layer["attention"][name]["kernel"])
        np.testing.assert_allclose(ratio, np.broadcast_to(scales[:, None], ratio.shape), rtol=1e-5)


def test_linears_that_stay_in_floating_point_are_scaled_along(models, calibration):
    spec, params = models[2]
    layer = params["layers"][1]
    scales = {"gate": jnp.exp(jax.random.normal(jax.random.key(0), (32,), jnp.float32))}
    run, hidden = block_of(spec, calibration), jax.random.normal(jax.random.key(1), (10, 12, 32), jnp.float32)
    out, expected = run(fold(layer, scales), hidden)[0], run(layer, hidden)[0]
    np.testing.assert_allclose(out, expected, atol=1e-5 * float(jnp.abs(expected).max()))
    only_up = {"up": FORMATS["up"]}
    prefix = prefix_of(spec, params, calibration)
    found, _, before = scale_inputs(
        layer, spec.architecture, only_up, lambda reader: prefix.statistics(1, layer, reader), grid=10
    )
    assert before.keys() == {"up"}
    by = np.asarray(found["mlp"]["gate"]["kernel"] / layer["mlp"]["gate"]["kernel"])[:, 0]
    np.testing.assert_allclose(by, layer["mlp_norm"]["scale"] / found["mlp_norm"]["scale"], rtol=1e-5)
    assert by.max() / by.min() > 1.2
    np.testing.assert_array_equal(found["attention_norm"]["scale"], layer["attention_norm"]["scale"])


@pytest.mark.slow
def test_folding_decides_nothing(models, calibration):
    """The stored layer routes every token as the layer in floating point does."""
    spec, params = models[4]
    prefix = prefix_of(spec, params, calibration)
    execute = prefix._execute[0]
    formats = {f"1/{name}": form for name, form in FORMATS.items()}
    config = QuantizeConfig(method="awq", bits=3, group_size=16)
    stored, report = quantize_layer(spec, 1, params["layers"][1], formats, config, prefix)
    assert 0 < report.executed == execute.sum() < (calibration[1] > 0).sum()
    fresh = prefix_of(spec, params, calibration)
    fresh.decide(1, restore_layer(spec, 1, stored, formats))
    np.testing.assert_array_equal(fresh._execute[0], execute)
    assert not np.array_equal(stored["attention_norm"]["scale"], params["layers"][1]["attention_norm"]["scale"])
