import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from pydantic import ValidationError

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.linear import QuantizedWeight, integer_dot, linear, quantize_rows
from qtale_jax.quantization.rounding import fake_quantize, quantize
from qtale_jax.quantization.storage import as_qarray, lay_out, recover, store

pytestmark = pytest.mark.slow

linear_jit = jax.jit(linear)
store_jit = jax.jit(store, static_argnums=1)


def quantized(weight, format) -> QuantizedWeight:
    return QuantizedWeight(**store_jit(weight, format), format=format, shape=weight.shape)


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


W8A8 = [
    TensorFormat(bits=bits, group_size=group, symmetric=symmetric, activation_bits=8)
    for bits, group, symmetric in itertools.product((8, 4), (-1, 16), (False, True))
]


def name_of(format: TensorFormat) -> str:
    return f"W{format.bits}A8-g{format.group_size}{'-sym' if format.symmetric else ''}"


@pytest.fixture(params=W8A8, ids=name_of)
def integer_format(request) -> TensorFormat:
    return request.param


def integer_reference(x: np.ndarray, weight: QuantizedWeight) -> np.ndarray:
    """Rows rounded with a scale each, sums of products of integers, then the scales."""
    rounded = recover({"values": weight.values, "scales": weight.scales}, weight.shape, weight.format)
    row_scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    rows = np.rint(x / row_scale).astype(np.int64)
    assert np.abs(rows).max(axis=1).min() == 127
    size = len(rounded.values) // len(weight.scales)
    total = np.zeros((len(x), weight.shape[1]))
    for group, scale in enumerate(np.asarray(weight.scales, np.float64)):
        part = slice(group * size, (group + 1) * size)
        zero = 0 if weight.zero_points is None else np.asarray(weight.zero_points[group].astype(jnp.int8), np.int64)
        total += (rows[:, part] @ (np.asarray(rounded.values, np.int64)[part] - zero)) * scale
    return total * row_scale


@pytest.mark.parametrize("count", [1, 5, 40])
def test_integer_dots_are_exact(weight, integer_format, count):
    x = jax.random.normal(jax.random.key(4), (count, 64), jnp.float32) + 0.5
    stored = quantized(weight, integer_format)
    out, expected = linear_jit(x, stored), integer_reference(np.asarray(x), stored)
    assert out.dtype == jnp.float32
    size = np.abs(expected).max(axis=0, keepdims=True)
    np.testing.assert_allclose(out / size, expected / size, rtol=1e-6, atol=1e-6)


def test_integer_dots_are_those_of_qwix(weight, integer_format, activations):
    stored = quantized(weight, integer_format)
    rows = activations.reshape(-1, 64)
    right = as_qarray(store_jit(weight, integer_format), integer_format)
    with jax.numpy_dtype_promotion("standard"):
        theirs = qwix.dot_general(qwix.QArray(*quantize_rows(rows)), right, (((1,), (0,)), ((), ())))
    out = integer_dot(activations, stored).reshape(theirs.shape)
    size = jnp.abs(theirs).max(axis=0, keepdims=True)
    np.testing.assert_allclose(out / size, theirs / size, atol=1e-6)


DOT = re.compile(r"stablehlo\.dot_general.*: \(tensor<([\dx]*)xi8>, tensor<([\dx]*)xi8>\) -> tensor<[\dx]*xi32>")


def test_one_integer_dot_and_no_other_product(weight, integer_format, activations):
    """Also with zero points, and whatever the number of rows."""
    for x in (activations, activations[:1, :1]):
        text = linear_jit.lower(x, quantized(weight, integer_format)).as_text()
        assert len(DOT.findall(text)) == text.count("stablehlo.dot_general") == 1
        assert "stablehlo.while" not in text


def test_integer_dots_are_near_the_product(integer_format):
    """At 8 bits 2 % of the exact product for normal inputs; at 4 bits what the weight has lost already."""
    x, weight = (jax.random.normal(jax.random.key(seed), (256, 256), jnp.float32) for seed in (1, 2))
    out, exact = linear_jit(x, quantized(weight, integer_format)), x @ weight
    wide = linear_jit(x, quantized(weight, integer_format.model_copy(update={"activation_bits": 16})))

    def error(a, b) -> float:
        return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(exact))

    assert 1e-3 < error(out, wide) < 0.015  # rounding of the activations alone
    assert error(out, exact) < (0.02 if integer_format.bits == 8 else 1.05 * error(wide, exact))


def test_a_token_keeps_its_own_scale(weight, integer_format, activations):
    stored = quantized(weight, integer_format)
    first = linear_jit(activations, stored)
    loud = linear_jit(activations.at[:, 1:].multiply(1000.0), stored)
    np.testing.assert_array_equal(loud[:, 0], first[:, 0])
    np.testing.assert_allclose(loud[:, 1:], 1000 * first[:, 1:], rtol=1e-2, atol=10 * float(jnp.abs(first).max()))


def test_rows_of_zeros_and_rows_that_are_not_finite(weight, integer_format, activations):
    rows = activations.reshape(-1, 64).at[0].set(0.0).at[1].set(1e-39).at[2, 3].set(jnp.nan).at[3, 3].set(jnp.inf)
    out = linear_jit(rows, quantized(weight, integer_format))
    np.testing.assert_array_equal(out[:2], np.zeros((2, 6)))
    assert not jnp.isfinite(out[2:4]).any()  # does not become a number
    assert jnp.isfinite(out[4:]).all()


def test_activations_are_rounded_to_half_a_step(activations):
    rows = activations.reshape(-1, 64) * jnp.geomspace(1e-3, 1e3, 10, dtype=jnp.float32)[:, None]
    values, scale = quantize_rows(rows)
    assert values.dtype == jnp.int8 and scale.shape == (10, 1) and scale.dtype == jnp.float32
    np.testing.assert_array_equal(np.abs(values).max(axis=1), 127)
    assert np.all(np.abs(values.astype(jnp.float32) * scale - rows) <= 0.5 * scale * (1 + 1e-5))


def test_integer_dots_in_bfloat16(weight, activations):
    stored = quantized(weight, W8A8[0])
    narrow = linear_jit(activations.astype(jnp.bfloat16), stored)
    wide = linear_jit(activations.astype(jnp.bfloat16).astype(jnp.float32), stored)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(narrow, wide.astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", [2, 3])
def test_packed_widths_have_no_integer_dot(weight, activations, bits):
    stored = quantized(weight, TensorFormat(bits=bits, activation_bits=8))
    with pytest.raises(ValueError, match=f"{bits}-bit weights have no integer dot"):
        linear(activations, stored)
    for settings in ({"bits": bits}, {"bits": 8, "rules": ({"match": "*/down", "bits": bits},)}):
        with pytest.raises(ValidationError, match=f"activation_bits=8 does not go with {bits}-bit weights") as caught:
            QuantizeConfig(activation_bits=8, **settings)
        (found,) = caught.value.errors()
        assert "\n" not in found["msg"] and "allowed: 4 or 8" in found["msg"]


PERMUTED = [
    TensorFormat(bits=bits, group_size=group, symmetric=symmetric, activation_bits=activation, permuted=True)
    for bits, group, symmetric, activation in (
        (8, 16, False, 16),
        (4, 16, True, 16),
        (3, 32, False, 16),
        (2, -1, True, 16),
        (8, 16, True, 8),
        (4, 16, False, 8),
    )
]


@pytest.mark.parametrize("format", PERMUTED, ids=lambda f: f"{f.bits}bit-g{f.group_size}-a{f.activation_bits}")
def test_inputs_in_another_order(weight, format):
    order = jnp.asarray(np.random.default_rng(0).permutation(64).astype(np.int32))
    rounded = quantize(weight[order], format)
    stored = QuantizedWeight(**lay_out(rounded, format, order), format=format, shape=weight.shape)
    restored = jnp.zeros_like(weight).at[order].set(fake_quantize(weight[order], format))
    np.testing.assert_array_equal(stored.dequantize(), restored)
    assert stored.dequantize(jnp.bfloat16).dtype == jnp.bfloat16
    plain = QuantizedWeight(**lay_out(rounded, format), format=format, shape=weight.shape)
    for count in (1, 40):  # the form of few rows, and that of many
        x = jax.random.normal(jax.random.key(count), (count, 64), jnp.float32)
        out = linear_jit(x, stored)
        same = linear_jit(x[:, order], plain)
        assert jnp.linalg.norm(out - same) <= 1e-6 * jnp.linalg.norm(same)
        exact = x @ restored
        near = 0.02 if format.activation_bits == 8 else 1e-5
        assert jnp.linalg.norm(out - exact) <= near * jnp.linalg.norm(exact)
        assert "scatter" not in linear_jit.lower(x, stored).as_text()  # the matrix stays where it is


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_columns_are_those_of_the_restored_matrix(weight, symmetric, scale):
    stored = quantized(weight, TensorFormat(bits=8, symmetric=symmetric, scale_dtype=scale))
    outputs = jnp.array([[5, 0], [3, 3]], jnp.int32)
    found = jax.jit(QuantizedWeight.columns)(stored, outputs)
    assert found.shape == (2, 2, 64) and found.dtype == jnp.float32
    np.testing.assert_array_equal(found, stored.dequantize().T[outputs])
    assert jnp.isnan(stored.columns(jnp.array([6], jnp.int32))).all()  # as a floating-point table gives


@pytest.mark.parametrize("form", [{"bits": 4}, {"bits": 8, "group_size": 16}, {"bits": 8, "permuted": True}])
def test_other_formats_have_no_columns(weight, form):
    with pytest.raises(ValueError, match="8-bit weights with one scale per output"):
        quantized(weight, TensorFormat(**form)).columns(jnp.array([0], jnp.int32))
