"""Linears with biases: rounded without them, stored with them, computed with both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import QuantizeConfig, StatisticsConfig
from qtale_jax.models.decoder import skeleton
from qtale_jax.models.forward import context_of, forward, merge
from qtale_jax.models.policy import Thresholded
from qtale_jax.quantization.layer import restore_layer
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.scaling import fold

pytestmark = pytest.mark.slow

BIASES = ("query", "key", "value")
EVERYTHING = Thresholded(jnp.zeros((1,), jnp.float32))

run = jax.jit(forward, static_argnames=("spec",))


@pytest.fixture(scope="module")
def model(make_routed):
    """Two layers with all parts of families, every query head with its own value head: AWQ scales values too."""
    return make_routed(
        num_layers=2,
        num_kv_heads=4,
        biases=BIASES,
        query_key_norm=True,
        sliding_window=5,
        global_layers=(1,),
        local_rope_theta=100.0,
        norm_offset=0.5,
        post_norms=True,
        scaled_embedding=True,
        activation="gelu_tanh",
        query_pre_attn_scalar=4.0,
        attention_softcap=8.0,
        logit_softcap=20.0,
    )


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "magr"])
@pytest.mark.parametrize("activation_bits", [16, 8])
def test_every_quantizer_keeps_them(model, calibration, method, activation_bits):
    if activation_bits == 8 and method != "awq":
        pytest.skip("the same product for all")
    spec, params = model
    config = QuantizeConfig(method=method, bits=8, group_size=16, activation_bits=activation_bits)
    settings = StatisticsConfig(batch_size=10, min_rows=0)
    prefix = Prefix(spec, *calibration, settings, jnp.dtype(jnp.float32)) if config.sees_activations else None
    new_spec, new_params, _ = quantize_parameters(spec, params, config, prefix=prefix)
    tokens, segments = map(jnp.asarray, calibration)

    def logits(spec, params):
        return np.asarray(run(spec, params, tokens, segment_ids=segments, policy=EVERYTHING).logits)[calibration[1] > 0]

    expected, found = logits(spec, params), logits(new_spec, new_params)
    scale = np.abs(expected).max()
    assert np.abs(found - expected).max() < (0.05 if activation_bits == 16 else 0.2) * scale
    for index, layer in new_params["layers"].items():
        for name in BIASES:
            bias, before = layer["attention"][name]["bias"], params["layers"][index]["attention"][name]["bias"]
            assert bias.dtype == jnp.float32
            folded = method == "awq" and name == "value"
            assert np.array_equal(bias, before) != folded
    if activation_bits == 16:
        restored = {
            index: restore_layer(spec, index, layer, new_spec.quantization.formats)
            for index, layer in new_params["layers"].items()
        }
        np.testing.assert_allclose(found, logits(spec, {**new_params, "layers": restored}), atol=1e-4 * scale)
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "'attention'" in str(path) and "'bias'" in str(path) else leaf,
        new_params,
    )
    assert np.abs(logits(new_spec, without) - expected).max() > 0.3 * scale


def test_scales_fold_into_the_bias_of_value(model, calibration):
    """Attention is linear in values, so the output projection sees the value's bias over its scale."""
    spec, params = model
    tokens, segments = map(jnp.asarray, calibration)
    layer = params["layers"][1]
    hidden = jax.random.normal(jax.random.key(1), (10, 12, 32), jnp.float32)

    @jax.jit
    def block(layer):
        context, _ = context_of(spec, tokens, segments)
        return merge(skeleton(spec).layers[1], layer)(hidden, context, context.present)[0]

    keys = jax.random.split(jax.random.key(0), 4)
    sizes = {"query": 32, "output": 32, "gate": 32, "down": 48}
    scales = {
        name: jnp.exp(jax.random.normal(key, (size,), jnp.float32))
        for key, (name, size) in zip(keys, sizes.items(), strict=True)
    }
    folded, expected = fold(layer, scales, spec.architecture.norm_offset), block(layer)
    largest = float(jnp.abs(expected).max())
    np.testing.assert_allclose(block(folded), expected, atol=1e-5 * largest)
    np.testing.assert_array_equal(folded["attention"]["query"]["bias"], layer["attention"]["query"]["bias"])
    unfolded = {**folded, "attention": dict(folded["attention"])}
    unfolded["attention"]["value"] = {**folded["attention"]["value"], "bias": layer["attention"]["value"]["bias"]}
    assert float(jnp.abs(block(unfolded) - expected).max()) > 0.01 * largest
