"""The product of few rows: equal to the product with the restored matrix, in every format and shape that it takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.blockwise import (
    BLOCK_INPUTS,
    BLOCK_WEIGHTS,
    DOTS,
    DOTS_AT_ONCE,
    FEW_ROWS,
    SMALLEST,
    product,
    steps,
)
from qtale_jax.quantization.linear import QuantizedWeight, linear

pytestmark = pytest.mark.slow

SCALES = ("float32", "bfloat16", "float16")

linear_jit = jax.jit(linear)
product_jit = jax.jit(product, static_argnames="format")


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """The documented layout, in NumPy."""
    outputs = values.shape[1]
    codes = np.pad(values.astype(np.int64) + 2 ** (bits - 1), ((0, -len(values) % 32), (0, 0)))
    low = (codes & 3).reshape(-1, 4, 8, outputs)
    parts = [sum(low[:, place] << 2 * place for place in range(4))]
    if bits == 3:
        high = (codes >> 2).reshape(-1, 8, 4, outputs)
        parts.append(sum(high[:, place] << place for place in range(8)))
    return np.concatenate(parts, axis=1).reshape(-1, outputs).astype(np.uint8)


def integers(inputs: int, outputs: int, format: TensorFormat) -> tuple[np.ndarray, np.ndarray | None]:
    """Any integers and zero points of the format, both ends among them."""
    rng = np.random.default_rng(inputs * 1000 + outputs)
    low, high = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1) - 1
    values = rng.integers(low, high + 1, (inputs, outputs))
    values[0], values[-1] = low, high
    zeros = rng.integers(low, high + 1, (format.groups(inputs), outputs))
    return values, None if format.symmetric else zeros


def assemble(values: np.ndarray, zeros: np.ndarray | None, format: TensorFormat) -> tuple[QuantizedWeight, np.ndarray]:
    """A weight stored without the library's help, and what it stands for in float64."""
    inputs, outputs = values.shape
    groups = format.groups(inputs)
    narrow = jnp.int4 if format.bits == 4 else jnp.int8
    scales = np.random.default_rng(outputs).uniform(0.01, 1.0, (groups, outputs)).astype(jnp.dtype(format.scale_dtype))
    stored = packed(values, format.bits) if format.bits in (2, 3) else values.astype(narrow)
    weight = QuantizedWeight(
        jnp.asarray(stored),
        jnp.asarray(scales),
        None if zeros is None else jnp.asarray(zeros.astype(narrow)),
        format=format,
        shape=values.shape,
    )
    grid = (groups, inputs // groups, outputs)
    shifted = values.reshape(grid) - (0 if zeros is None else zeros[:, None])
    return weight, (shifted * scales.astype(np.float64)[:, None]).reshape(inputs, outputs)


def any_weight(inputs: int, outputs: int, format: TensorFormat) -> tuple[QuantizedWeight, np.ndarray]:
    return assemble(*integers(inputs, outputs, format), format)


def rows(count: int, inputs: int, mean: float = 0.5) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).normal(mean, 1, (count, inputs)).astype(np.float32))


def run(x: jax.Array, weight: QuantizedWeight) -> jax.Array:
    return product_jit(x, weight.values, weight.scales, weight.zero_points, format=weight.format)


def assert_is_the_product(out: jax.Array, x: jax.Array, restored: np.ndarray) -> None:
    """Against float64: 1e-5 of the result, and of each number 2e-6 of what was added up for it."""
    wide = np.asarray(x, np.float64)
    expected = wide @ restored
    assert out.shape == expected.shape and out.dtype == jnp.float32
    assert np.linalg.norm(out - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.all(np.abs(out - expected) <= 2e-6 * (np.abs(wide) @ np.abs(restored)))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [-1, 16, 64, *(pytest.param(g, marks=pytest.mark.exhaustive) for g in (32, 128))])
def test_equals_the_product_with_the_restored_matrix(bits, group, symmetric):
    scale = SCALES[(bits + group + symmetric) % 3]
    format = TensorFormat(bits=bits, group_size=group, symmetric=symmetric, scale_dtype=scale)
    (weight, restored), x = any_weight(256, 6, format), rows(1 + bits, 256)
    fits = not (bits in (2, 3) and group == 16)  # a packed block has 32 inputs
    assert (steps(256, 6, format) is not None) == fits
    assert_is_the_product(run(x, weight) if fits else linear_jit(x, weight), x, restored)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_type_of_scale(bits, scale):
    format = TensorFormat(bits=bits, group_size=32, scale_dtype=scale)
    (weight, restored), x = any_weight(96, 4, format), rows(2, 96)
    assert weight.scales.dtype == jnp.dtype(scale)
    assert_is_the_product(run(x, weight), x, restored)


@st.composite
def cases(draw):
    bits = draw(st.sampled_from((8, 4, 3, 2)))
    group = draw(st.sampled_from((-1, -1, 16, 32, 64)))
    inputs = draw(st.integers(1, 200)) if group == -1 else group * draw(st.integers(1, 4))
    format = TensorFormat(
        bits=bits, group_size=group, symmetric=draw(st.booleans()), scale_dtype=draw(st.sampled_from(SCALES))
    )
    return inputs, draw(st.integers(1, 9)), draw(st.integers(1, FEW_ROWS)), format


def loops(function, *arguments, platform: str = "cpu") -> int:
    return function.trace(*arguments).lower(lowering_platforms=(platform,)).as_text().count("stablehlo.while")


@pytest.mark.slow
@given(cases())
@settings(max_examples=25)
def test_any_shape_in_the_form_that_fits_it(case):
    inputs, outputs, count, format = case
    (weight, restored), x = any_weight(inputs, outputs, format), rows(count, inputs)
    assert loops(linear_jit, x, weight) == (steps(inputs, outputs, format) is not None)
    assert_is_the_product(linear_jit(x, weight), x, restored)


@pytest.mark.parametrize(
    ("bits", "inputs", "outputs", "count"),
    [(8, 172, 5, 1), (8, 33, 7, 16), (3, 172, 5, 2), (3, 33, 7, 1), (2, 48, 3, 16), (2, 688, 5, 1)],
)
def test_inputs_that_are_no_multiple_of_a_block(bits, inputs, outputs, count):
    (weight, restored), x = any_weight(inputs, outputs, TensorFormat(bits=bits)), rows(count, inputs)
    assert_is_the_product(run(x, weight), x, restored)


@pytest.mark.parametrize(("inputs", "outputs"), [(172, 6), (33, 2), (48, 10)])
def test_pairs_of_outputs_of_four_bits(inputs, outputs):
    (weight, restored), x = any_weight(inputs, outputs, TensorFormat(bits=4)), rows(4, inputs)
    assert_is_the_product(run(x, weight), x, restored)


@pytest.mark.parametrize(
    ("inputs", "outputs", "form", "expected"),
    [
        (4096, 11008, {"bits": 8}, (16, 2)),  # a block is 128 inputs of 11008, two are under 2^22 weights
        (768, 32000, {"bits": 8}, (6, 2)),  # a block of 65 inputs would be over 2^21 weights
        (768, 768, {"bits": 8, "group_size": 128}, (2, 3)),  # not one step of all
        (4096, 4096, {"bits": 3}, (32, 1)),
        (4096, 4096, {"bits": 4, "group_size": 128}, (8, 4)),
        (2048, 2048, {"bits": 4, "group_size": 128}, (4, 4)),
        (11008, 4096, {"bits": 8, "group_size": 64}, (43, 4)),
        (11008, 4096, {"bits": 2, "group_size": 64}, (86, 2)),
        (172, 64, {"bits": 3}, (2, 1)),  # padded to 192
        (172, 64, {"bits": 8}, (2, 1)),
        (1, 3, {"bits": 8}, (1, 1)),
        (257, 6, {"bits": 8}, None),  # a prime
        (514, 6, {"bits": 4}, None),
        (257, 6, {"bits": 2}, (3, 1)),  # padded to 288
        (64, 5, {"bits": 4}, None),  # no pairs
        (64, 5, {"bits": 8, "group_size": 8}, None),
        (64, 5, {"bits": 3, "group_size": 16}, None),
        (96, 5, {"bits": 3, "group_size": 48}, None),
    ],
)
def test_steps_of_known_shapes(inputs, outputs, form, expected):
    assert steps(inputs, outputs, TensorFormat(**form)) == expected


@given(
    inputs=st.integers(1, 3000),
    outputs=st.sampled_from((1, 2, 7, 4096, 11008, 32001, 128256)),
    bits=st.sampled_from((8, 4, 3, 2)),
    group=st.sampled_from((-1, 4, 16, 32, 48, 64, 128, 512)),
)
@settings(max_examples=300)
def test_steps_cover_the_inputs_and_are_none_only_where_nothing_fits(inputs, outputs, bits, group):
    inputs = inputs if group == -1 else group * max(1, inputs // group)
    found = steps(inputs, outputs, TensorFormat(bits=bits, group_size=group))
    unit = 32 if bits in (2, 3) else 1
    most = min(BLOCK_INPUTS, BLOCK_WEIGHTS // outputs)
    padded = math.ceil(inputs / unit) * unit
    if group == -1:
        sizes = [size for size in range(unit, padded + 1, unit) if padded % size == 0 and size <= max(most, unit)]
        fits = max(sizes) >= min(inputs, SMALLEST)
    else:
        fits = group % unit == 0 and group >= SMALLEST
    assert (found is not None) == (fits and not (bits == 4 and outputs % 2))
    if found is not None:
        count, at_once = found
        assert padded % (count * at_once) == 0
        size = padded // (count * at_once)
        assert size == group or (group == -1 and size <= max(most, unit))
        assert at_once == 1 or (count >= 2 and at_once * DOTS[bits] <= DOTS_AT_ONCE)
        assert at_once == 1 or at_once * size <= 4 * BLOCK_INPUTS


@pytest.mark.parametrize(("bits", "group"), [(8, -1), (8, 32), (4, 32), (3, -1), (2, 32)])
def test_zero_points_cost_no_digits_but_four_bits_at_four_bits(bits, group):
    """Most integers stand near a zero point at the end of the range, inputs have a mean: sums of q x would be large."""
    format = TensorFormat(bits=bits, group_size=group)
    low = -(2 ** (bits - 1))
    values = low + np.random.default_rng(bits).integers(0, 2, (512, 8))
    zeros = np.full((format.groups(512), 8), low)
    (weight, restored), x = assemble(values, zeros, format), rows(2, 512, mean=3.0)
    signs = jnp.asarray(np.where(np.arange(512) % 2, 1.0, -1.0)[None].astype(np.float32))
    for inputs in (x, x * signs):
        expected = np.asarray(inputs, np.float64) @ restored
        bound = 2e-6 if bits != 4 else 16 * 2e-6
        assert np.linalg.norm(run(inputs, weight) - expected) <= bound * np.linalg.norm(expected)
    if bits != 4:
        nothing, _ = assemble(np.full((512, 8), low), zeros, format)
        np.testing.assert_array_equal(run(x, nothing), np.zeros((2, 8)))  # what restores to 0 adds exactly nothing


@pytest.mark.parametrize("form", [{"bits": 8}, {"bits": 4, "group_size": 32}, {"bits": 3, "symmetric": True}])
def test_a_row_does_not_depend_on_the_others(form):
    (weight, _), x = any_weight(96, 6, TensorFormat(**form)), rows(FEW_ROWS, 96)
    together = linear_jit(x, weight)
    size = float(jnp.abs(together).max())
    for changed in (x.at[1:].multiply(1000.0), x[:1], jnp.concatenate([x, x])):
        np.testing.assert_allclose(linear_jit(changed, weight)[0], together[0], rtol=1e-6, atol=1e-6 * size)


@pytest.mark.parametrize("form", [{"bits": 8}, {"bits": 4, "group_size": 16}, {"bits": 3}, {"bits": 2}])
def test_few_rows_take_a_loop_on_a_cpu_and_nowhere_else(form):
    weight, _ = any_weight(64, 6, TensorFormat(**form))
    few, many = rows(FEW_ROWS, 64), rows(FEW_ROWS + 1, 64)
    assert loops(linear_jit, few[:1], weight) == loops(linear_jit, few.reshape(2, -1, 64), weight) == 1
    assert loops(linear_jit, many, weight) == 0
    for platform in ("tpu", "cuda"):
        assert loops(linear_jit, few[:1], weight, platform=platform) == 0
    both = linear_jit.trace(few, weight).lower(lowering_platforms=("cpu", "tpu")).as_text()  # chosen where it runs
    assert both.count("stablehlo.while") == 1 and "stablehlo.case" in both


@pytest.mark.slow
@pytest.mark.parametrize("form", [{"bits": 8, "symmetric": True}, {"bits": 4}, {"bits": 3, "group_size": 32}])
def test_under_scan_vmap_and_grad(form):
    format = TensorFormat(**form)
    values, zeros = integers(64, 6, format)
    layers = [assemble(np.roll(values, shift, axis=0), zeros, format) for shift in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(weight for weight, _ in layers))
    x = rows(2, 64)
    scanned = jax.jit(lambda x, layers: jax.lax.scan(lambda _, layer: (None, linear(x, layer)), None, layers)[1])
    over_layers = jax.jit(jax.vmap(linear, in_axes=(None, 0)))
    over_rows = jax.jit(jax.vmap(linear, in_axes=(0, None)))
    for out in (scanned(x, stacked), over_layers(x, stacked), [over_rows(x, weight) for weight, _ in layers]):
        for index, (_, restored) in enumerate(layers):
            assert_is_the_product(out[index], x, restored)
    pull = rows(2, 6)
    weight, restored = layers[0]
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(linear(x, weight) * pull)))(x)
    assert_is_the_product(gradient, pull, restored.T)


@pytest.mark.parametrize("count", [1, FEW_ROWS + 1])
def test_bfloat16_rows_give_bfloat16(count):
    (weight, restored), x = any_weight(96, 6, TensorFormat(bits=3)), rows(count, 96).astype(jnp.bfloat16)
    out = linear_jit(x, weight)
    expected = np.asarray(x, np.float64) @ restored
    assert out.dtype == jnp.bfloat16
    assert np.linalg.norm(np.asarray(out, np.float64) - expected) <= 5e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("activation_bits", [8, 16])
def test_no_row_at_all(activation_bits):
    weight, _ = any_weight(64, 6, TensorFormat(bits=4, group_size=16, activation_bits=activation_bits))
    assert linear_jit(jnp.zeros((2, 0, 64), jnp.float32), weight).shape == (2, 0, 6)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_the_restored_matrix_is_that_of_the_documented_layout(bits):
    """Every integer at every place, by rows of the identity, and through `dequantize`."""
    weight, restored = any_weight(64, 6, TensorFormat(bits=bits, group_size=32))
    np.testing.assert_allclose(jax.jit(QuantizedWeight.dequantize)(weight), restored, rtol=1e-6)
    np.testing.assert_allclose(run(jnp.eye(64, dtype=jnp.float32), weight), restored, rtol=1e-6)
