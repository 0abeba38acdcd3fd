"""The kernel, run by Pallas' interpreter, against the product with the restored matrix in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.kernels.quantized_matmul import WHOLE_INPUTS, block_inputs, product
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.linear import QuantizedWeight, linear
from qtale_jax.quantization.rounding import Rounded
from qtale_jax.quantization.storage import lay_out, unstore

pytestmark = pytest.mark.slow

FORMATS = {
    "8 bits per channel": TensorFormat(bits=8, symmetric=True),
    "8 bits in groups": TensorFormat(bits=8, group_size=128, scale_dtype="bfloat16"),
    "4 bits in groups": TensorFormat(bits=4, group_size=64),
    "4 bits per channel": TensorFormat(bits=4),
    "3 bits in groups": TensorFormat(bits=3, group_size=128),
    "3 bits per channel": TensorFormat(bits=3, symmetric=True),
    "2 bits in groups": TensorFormat(bits=2, group_size=32, scale_dtype="bfloat16"),
}


def any_weight(inputs: int, outputs: int, format: TensorFormat) -> QuantizedWeight:
    """Integers over the whole range of the format, so that a misplaced bit shows."""
    rng = np.random.default_rng(inputs + outputs)
    low, high, groups = -(2 ** (format.bits - 1)), 2 ** (format.bits - 1), format.groups(inputs)
    values = jnp.asarray(rng.integers(low, high, (inputs, outputs)), jnp.int8)
    zeros = None if format.symmetric else jnp.asarray(rng.integers(low, high, (groups, outputs)), jnp.int8)
    scales = jnp.asarray(rng.uniform(0.5, 1.5, (groups, outputs)), jnp.dtype(format.scale_dtype))
    stored = lay_out(Rounded(values, scales, zeros), format)
    return QuantizedWeight(**stored, format=format, shape=(inputs, outputs), kernels="interpreted")


def rows(count: int, inputs: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).normal(0.5, 1.0, (count, inputs)), jnp.float32)


def exact(x, weight: QuantizedWeight) -> np.ndarray:
    return np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64)


def close(found, expected, tolerance):
    size = np.abs(expected).max()
    np.testing.assert_allclose(np.asarray(found, np.float64) / size, expected / size, rtol=0, atol=tolerance)


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("shape", [(1, 256, 128), (3, 1536, 640)], ids=["one block", "blocks and a part of one"])
def test_equals_the_restored_matrix(format, shape):
    count, inputs, outputs = shape
    weight, x = any_weight(inputs, outputs, format), rows(count, inputs)
    found = product(x, weight.values, weight.scales, weight.zero_points, format, interpret=True)
    assert found.dtype == jnp.float32 and found.shape == (count, outputs)
    close(found, exact(x, weight), 1e-6)


def test_bfloat16_rounds_nothing_but_the_rows():
    weight, x = any_weight(512, 128, FORMATS["4 bits in groups"]), rows(2, 512).astype(jnp.bfloat16)
    found = product(x, weight.values, weight.scales, weight.zero_points, weight.format, interpret=True)
    close(found, exact(x.astype(jnp.float32), weight), 1e-6)


@pytest.mark.parametrize("bits", [4, 3])
def test_a_weight_can_ask_for_it(bits):
    weight, x = any_weight(256, 128, TensorFormat(bits=bits, group_size=128)), rows(4, 256).reshape(2, 2, 256)
    program = jax.jit(linear).trace(x, weight).jaxpr
    assert "pallas_call" in str(program)
    close(linear(x, weight), exact(x, weight), 1e-6)


@pytest.mark.parametrize(
    ("inputs", "format", "expected"),
    [
        (4096, TensorFormat(bits=4, group_size=128), 1024),
        (11008, TensorFormat(bits=3, group_size=128), 256),
        (11008, TensorFormat(bits=8), 256),
        (172, TensorFormat(bits=8), 172),
        (172, TensorFormat(bits=3), None),
        (192, TensorFormat(bits=4, group_size=48), 192),
        (192, TensorFormat(bits=3, group_size=48), None),
        (WHOLE_INPUTS + 1, TensorFormat(bits=8), None),
        (4096, TensorFormat(bits=8, activation_bits=8), None),
    ],
)
def test_blocks_are_whole_groups_or_the_kernel_is_not_used(inputs, format, expected):
    assert block_inputs(inputs, format) == expected


def test_what_does_not_fit_takes_the_plain_form():
    format = TensorFormat(bits=3)
    weight, x = any_weight(172, 24, format), rows(2, 172)
    stored = {"values": weight.values, "scales": weight.scales, "zero_points": weight.zero_points}
    expected = np.asarray(x, np.float64) @ np.asarray(unstore(stored, (172, 24), format), np.float64)
    close(linear(x, weight), expected, 1e-6)
