import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from qtale_jax.errors import InputError
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.rounding import (
    dequantize,
    fake_quantize,
    fake_quantize_straight_through,
    quantize,
    validate,
)

quantize_jit = jax.jit(quantize, static_argnums=1)


def reference(weight: np.ndarray, bits: int, group: int, symmetric: bool) -> np.ndarray:
    """Round to nearest in float64, one group at a time, with unsigned codes: shares nothing with the library."""
    out = np.zeros(weight.shape, np.float64)
    size = weight.shape[0] if group == -1 else group
    for start in range(0, weight.shape[0], size):
        for column in range(weight.shape[1]):
            part = weight[start : start + size, column].astype(np.float64)
            if symmetric:
                step = max(abs(part.min()), abs(part.max())) / (2 ** (bits - 1) - 1)
                restored = np.rint(part / step) * step
            else:
                bottom, top = min(part.min(), 0.0), max(part.max(), 0.0)
                step = (top - bottom) / (2**bits - 1)
                zero = np.rint(-bottom / step)
                restored = (np.clip(np.rint(part / step) + zero, 0, 2**bits - 1) - zero) * step
            out[start : start + size, column] = restored
    return out


def steps(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The scale of every element."""
    return np.repeat(np.asarray(scales), weight.shape[0] // scales.shape[0], axis=0)


def test_agrees_with_a_float64_reference(weight, format):
    expected = reference(np.asarray(weight), format.bits, format.group_size, format.symmetric)
    np.testing.assert_allclose(fake_quantize(weight, format), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("qtype", [jnp.int8, jnp.int4])
@pytest.mark.parametrize("group", [-1, 16])
def test_asymmetric_rounding_agrees_with_qwix(weight, qtype, group):
    format = TensorFormat(bits=8 if qtype == jnp.int8 else 4, group_size=group)
    tiles = {} if group == -1 else {0: group}
    theirs = qwix.quantize(weight, qtype, channelwise_axes=(1,), tiled_axes=tiles, calibration_method="minmax")
    ours = quantize(weight, format)
    np.testing.assert_array_equal(ours.values, theirs.qvalue.astype(jnp.int8))
    np.testing.assert_array_equal(ours.zero_points, theirs.zero_point.astype(jnp.int8))
    np.testing.assert_allclose(ours.scales, theirs.scale, rtol=1e-6)
    np.testing.assert_allclose(dequantize(ours), qwix.dequantize(theirs), rtol=1e-6)


@given(data=st.data(), bits=st.sampled_from((8, 4, 3, 2)), group=st.sampled_from((-1, 8)), symmetric=st.booleans())
@settings(max_examples=60)
def test_error_is_at_most_half_a_step_and_zero_stays_zero(data, bits, group, symmetric):
    numbers = st.floats(-1e4, 1e4, width=32)
    weight = data.draw(hypothesis_numpy.arrays(np.float32, (16, 2), elements=numbers))
    rounded = quantize_jit(jnp.asarray(weight), TensorFormat(bits=bits, group_size=group, symmetric=symmetric))
    restored = np.asarray(dequantize(rounded))
    assert np.all(np.isfinite(restored))
    assert np.all(np.asarray(rounded.scales) > 0)
    allowed = 0.5 * steps(weight, rounded.scales) + 1e-6 * np.abs(weight)
    # A group of numbers that float32 can barely hold is rounded to zero.
    assert np.all(np.abs(restored - weight) <= np.maximum(allowed, 1e-35))
    assert np.all(restored[weight == 0] == 0)


def test_more_bits_and_smaller_groups_err_less(weight):
    def error(**format) -> float:
        return float(jnp.linalg.norm(fake_quantize(weight[:, 2:3], TensorFormat(**format)) - weight[:, 2:3]))

    for symmetric in (False, True):
        errors = [error(bits=bits, symmetric=symmetric) for bits in (8, 4, 3, 2)]
        assert errors == sorted(errors) and len(set(errors)) == 4
        assert error(bits=3, group_size=16, symmetric=symmetric) < error(bits=3, symmetric=symmetric)


def test_zero_points_help_where_weights_are_not_centred(weight):
    offset = jnp.abs(weight)
    plain, symmetric = (fake_quantize(offset, TensorFormat(bits=4, symmetric=flag)) for flag in (False, True))
    assert float(jnp.linalg.norm(plain - offset)) < 0.7 * float(jnp.linalg.norm(symmetric - offset))


def test_ranges(weight, format):
    rounded = quantize(weight, format)
    low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    groups = np.asarray(rounded.values).reshape(format.groups(weight.shape[0]), -1, weight.shape[1])
    assert rounded.values.dtype == jnp.int8 and rounded.scales.dtype == jnp.float32
    assert rounded.scales.shape == (groups.shape[0], weight.shape[1])
    if format.symmetric:
        assert rounded.zero_points is None
        assert np.all(np.abs(groups).max(axis=1) == high)
    else:
        assert rounded.zero_points.dtype == jnp.int8 and rounded.zero_points.shape == rounded.scales.shape
        assert np.all(rounded.zero_points >= low) and np.all(rounded.zero_points <= high)
        assert np.all(groups >= low) and np.all(groups <= high)


def test_symmetric_two_bits_has_three_levels(weight):
    values = quantize(weight, TensorFormat(bits=2, symmetric=True)).values
    assert set(np.unique(values)) == {-1, 0, 1}


def test_ties_round_to_even():
    weight = jnp.array([[7.0], [0.5], [1.5], [2.5], [-0.5], [-1.5]], jnp.float32)
    values = quantize(weight, TensorFormat(bits=4, symmetric=True)).values
    np.testing.assert_array_equal(values[:, 0], [7, 0, 2, 2, 0, -2])


def test_rounding_twice_changes_nothing(weight, format):
    once = fake_quantize(weight, format)
    np.testing.assert_allclose(fake_quantize(once, format), once, rtol=1e-6, atol=0)


def test_one_group_is_a_group_of_all_inputs(weight, format):
    whole = quantize(weight, format.model_copy(update={"group_size": -1}))
    sized = quantize(weight, format.model_copy(update={"group_size": weight.shape[0]}))
    jax.tree.map(np.testing.assert_array_equal, whole, sized)


@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-44, 1e-38])
def test_constant_groups(format, value):
    weight = jnp.full((32, 2), value, jnp.float32)
    rounded = quantize(weight, format)
    np.testing.assert_allclose(dequantize(rounded), weight, rtol=1e-6, atol=2e-38)
    if value == 0.0:
        assert np.all(np.asarray(rounded.scales) == 1)


def test_numbers_that_are_none_are_not_hidden(weight, format):
    for bad in (jnp.nan, jnp.inf):
        assert not np.all(np.isfinite(fake_quantize(weight.at[3, 2].set(bad), format)))


def test_arithmetic_is_float32_whatever_the_type(weight, format):
    narrow = weight.astype(jnp.bfloat16)
    wide = fake_quantize(narrow.astype(jnp.float32), format)
    assert fake_quantize(narrow, format).dtype == jnp.bfloat16
    np.testing.assert_array_equal(fake_quantize(narrow, format), wide.astype(jnp.bfloat16))


def test_stacked_layers_are_rounded_one_by_one(weight, format):
    stacked = jnp.stack([weight, 2 * weight[::-1]])
    expected = jnp.stack([fake_quantize(layer, format) for layer in stacked])
    np.testing.assert_array_equal(fake_quantize(stacked, format), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_has_the_rounded_value_and_the_identity_as_gradient(weight, some_format, dtype):
    weight, format = weight.astype(dtype), some_format
    cotangent = jax.random.normal(jax.random.key(1), weight.shape, dtype)

    @jax.jit
    def value_and_gradient(weight):
        value, pull = jax.vjp(lambda w: fake_quantize_straight_through(w, format), weight)
        return value, pull(cotangent)[0]

    value, gradient = value_and_gradient(weight)
    expected = jax.jit(fake_quantize, static_argnums=1)(weight, format)
    np.testing.assert_array_equal(value, expected)
    np.testing.assert_array_equal(jax.jit(fake_quantize_straight_through, static_argnums=1)(weight, format), expected)
    np.testing.assert_array_equal(gradient, cotangent)


def test_straight_through_in_a_scan_over_layers(weight):
    format = TensorFormat(bits=3, group_size=16)
    stacked = jnp.stack([weight, -2 * weight])

    def loss(stacked):
        def layer(carry, one):
            return carry + jnp.sum(fake_quantize_straight_through(one, format)), None

        return jax.lax.scan(jax.checkpoint(layer), jnp.float32(0), stacked)[0]

    np.testing.assert_allclose(jax.jit(loss)(stacked), jnp.sum(fake_quantize(stacked, format)), rtol=1e-5)
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(stacked), jnp.ones_like(stacked))


def test_groups_must_divide_the_inputs():
    validate(TensorFormat(bits=4), 30, "key")
    validate(TensorFormat(bits=4, group_size=15), 30, "key")
    with pytest.raises(
        InputError, match=r"group_size=16 does not divide the 30 inputs of key; allowed: \S+_size=15, or"
    ):
        validate(TensorFormat(bits=4, group_size=16), 30, "key")
    with pytest.raises(InputError, match=r"allowed: a\.b=10, or a\.b=-1 \(one group\)$"):  # it divides the others, too
        validate(TensorFormat(bits=4, group_size=16), 30, "key", "a.b", [20, 30])
    with pytest.raises(InputError, match=r"allowed: a\.b=-1 \(one group\)$"):
        validate(TensorFormat(bits=4, group_size=16), 30, "key", "a.b", [7])
    with pytest.raises(InputError, match="group_size=0"):
        validate(TensorFormat(bits=4, group_size=0), 30, "key")


NARROW = [("bfloat16", 2.0**-8), ("float16", 2.0**-11)]
"""Types of scales and how far, of itself, a number may move when it becomes one."""


@pytest.mark.parametrize(("scale", "precision"), NARROW)
def test_integers_stand_on_the_grid_of_the_stored_scales(weight, format, scale, precision):
    """Half a stored step, or what is clipped: the range in steps times what the scale lost when it was stored."""
    narrow = format.model_copy(update={"scale_dtype": scale})
    rounded = quantize(weight, narrow)
    assert rounded.scales.dtype == jnp.dtype(scale)
    step = steps(weight, np.asarray(rounded.scales, np.float64))
    restored = np.asarray(dequantize(rounded), np.float64)
    low, high = -(2 ** (format.bits - 1)) + format.symmetric, 2 ** (format.bits - 1) - 1
    error = np.abs(restored - np.asarray(weight, np.float64)) / step
    lost = precision / (1 - precision)
    # A zero point is whole: for want of its fraction one end of the range is clipped up to half a step more.
    allowed = max(0.5, high * lost) if format.symmetric else 0.5 + (high - low) * lost
    assert error.max() <= allowed + 1e-4
    zeros = None if rounded.zero_points is None else steps(weight, np.asarray(rounded.zero_points, np.int64))
    again = np.rint(np.asarray(weight, np.float64) / step) + (0 if zeros is None else zeros)
    nearest = np.clip(again, low, high)
    assert np.abs(nearest - np.asarray(rounded.values, np.int64)).max() <= 1  # a tie may fall either way
    assert np.mean(nearest != np.asarray(rounded.values, np.int64)) < 0.01


def test_scales_that_are_narrowed_afterwards_err_more():
    """Where the stored scale is half a unit larger, 127 steps are half a step more: integers have to know."""
    step = 1 + 1.02 * 2.0**-8  # bfloat16 holds 1 + 2^-7
    weight = np.random.default_rng(0).uniform(100, 127, (64, 2)).astype(np.float32)
    weight[0] = 127
    weight = jnp.asarray(weight * np.float32(step))
    format = TensorFormat(bits=8, symmetric=True, scale_dtype="bfloat16")
    wide = quantize(weight, format.model_copy(update={"scale_dtype": "float32"}))
    careless = dequantize(wide._replace(scales=wide.scales.astype(jnp.bfloat16)))
    careful = dequantize(quantize(weight, format))
    assert float(jnp.linalg.norm(careful - weight)) < 0.7 * float(jnp.linalg.norm(careless - weight))


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [8, 2])
def test_groups_that_a_scale_can_barely_hold(scale, symmetric, bits):
    """Zeros stay zeros; numbers too small or too large for a normal scale keep their sign, and nothing becomes NaN."""
    limits = jnp.finfo(jnp.dtype(scale))
    tiny, largest = float(limits.tiny), min(float(limits.max), 1e38)
    column = np.array([0.0, 1.0, -0.5, 0.25], np.float32)
    weight = jnp.asarray(np.stack([column * size for size in (0.0, tiny, 0.3 * tiny, largest, 1.0)], axis=1))
    rounded = quantize_jit(weight, TensorFormat(bits=bits, symmetric=symmetric, scale_dtype=scale))
    restored = np.asarray(dequantize(rounded), np.float64)
    stored = np.asarray(rounded.scales, np.float64)
    assert np.all(np.isfinite(restored)) and np.all(stored >= tiny) and np.all(np.isfinite(stored))
    assert stored[0, 0] == 1 and np.all(restored[:, 0] == 0) and np.all(restored[0] == 0)
    wanted = np.asarray(weight, np.float64)
    assert np.all(restored * wanted >= 0)
    assert np.all(np.abs(restored - wanted).max(axis=0) <= 1.01 * np.abs(wanted).max(axis=0))


def test_a_scale_beyond_its_type_is_clipped_to_the_largest():
    weight = jnp.array([[1e9], [-1e9], [2e4]], jnp.float32)
    rounded = quantize(weight, TensorFormat(bits=4, symmetric=True, scale_dtype="float16"))
    assert float(rounded.scales[0, 0]) == 65504
    np.testing.assert_array_equal(dequantize(rounded)[:, 0], [7 * 65504, -7 * 65504, 0])
