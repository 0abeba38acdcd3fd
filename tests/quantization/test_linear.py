import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.quantization.linear import QuantizedWeight, linear
from qtale_jax.quantization.rounding import fake_quantize
from qtale_jax.quantization.storage import store


def quantized(weight, format) -> QuantizedWeight:
    stored = store(weight, format)
    return QuantizedWeight(
        stored["values"], stored["scales"], stored.get("zero_points"), format=format, shape=weight.shape
    )


@pytest.fixture
def activations() -> jax.Array:
    return jax.random.normal(jax.random.key(8), (2, 5, 64), jnp.float32)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 1e-2)])
def test_product_with_a_stored_weight_is_the_product_with_the_rounded_one(
    weight, format, activations, dtype, tolerance
):
    x = activations.astype(dtype)
    out = linear(x, quantized(weight, format))
    expected = np.asarray(x, np.float64) @ np.asarray(fake_quantize(weight, format), np.float64)
    assert out.dtype == dtype and out.shape == (2, 5, 6)
    size = np.abs(expected).max(axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(np.asarray(out, np.float64) / size, expected / size, atol=tolerance)


def test_scan_over_stacked_layers_and_vmap(weight, some_format, activations):
    layers = [weight, -0.5 * weight[::-1], 3 * weight]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(quantized(layer, some_format) for layer in layers))
    expected = jnp.stack([activations @ fake_quantize(layer, some_format) for layer in layers])

    @jax.jit
    def scanned(x, stacked):
        return jax.lax.scan(lambda carry, layer: (carry, linear(x, layer)), None, stacked)[1]

    for out in (scanned(activations, stacked), jax.vmap(linear, in_axes=(None, 0))(activations, stacked)):
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-3)


def test_a_weight_is_a_tree_of_arrays_with_static_meaning(weight, format):
    one = quantized(weight, format)
    assert len(jax.tree.leaves(one)) == (2 if format.symmetric else 3)
    same = jax.tree.map(lambda leaf: leaf, one)
    assert (same.format, same.shape) == (format, weight.shape)


def test_gradients_reach_the_activations(weight, some_format, activations):
    stored = quantized(weight, some_format)
    gradient = jax.grad(lambda x: jnp.sum(linear(x, stored)))(activations)
    row = jnp.sum(fake_quantize(weight, some_format), axis=1)
    np.testing.assert_allclose(gradient, jnp.broadcast_to(row[None, None], gradient.shape), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("compute", [jnp.float32, jnp.bfloat16])
def test_activations_decide_the_type(weight, activations, stored, compute):
    kernel, x = weight.astype(stored), activations.astype(compute)
    out = linear(x, kernel)
    assert out.dtype == compute
    expected = jnp.matmul(x.astype(jnp.float32), kernel.astype(compute).astype(jnp.float32))
    tolerance = 1e-2 if compute == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=tolerance, atol=tolerance)


def test_sums_are_float32():
    ones = jnp.ones((1, 1024), jnp.bfloat16)  # a sum in bfloat16 stops at 256
    assert float(linear(ones, jnp.ones((1024, 1), jnp.bfloat16))[0, 0]) == 1024
