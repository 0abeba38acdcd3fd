"""The kernels against the product with the restored matrix in float64: by Pallas' interpreter, compiled on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.kernels.gpu import quantized_matmul as gpu
from qtale_jax.kernels.tpu import quantized_matmul as tpu
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
    "2 bits in groups": TensorFormat(bits=2, group_size=64, scale_dtype="bfloat16"),
    "2 bits per channel": TensorFormat(bits=2),
}


FORMS = {
    "tpu": functools.partial(tpu.product, interpret=True),
    "gpu": functools.partial(gpu.product, interpret=True),
    "gpu, compiled": gpu.product,
}


@pytest.fixture(params=FORMS)
def form(request):
    """A kernel as a function of rows and weight."""
    if "compiled" in request.param and jax.default_backend() != "gpu":
        pytest.skip("no GPU here")
    kernel = FORMS[request.param]

    @jax.jit
    def product(x, weight: QuantizedWeight):
        return kernel(x, weight.values, weight.scales, weight.zero_points, weight.format)

    return product


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
def test_equals_the_restored_matrix(form, format, shape):
    count, inputs, outputs = shape
    weight, x = any_weight(inputs, outputs, format), rows(count, inputs)
    found = form(x, weight)
    assert found.dtype == jnp.float32 and found.shape == (count, outputs)
    close(found, exact(x, weight), 1e-6)


@pytest.mark.parametrize("name", ["8 bits in groups", "4 bits in groups", "3 bits in groups", "2 bits per channel"])
@pytest.mark.parametrize("count", [1, 33])
def test_bfloat16_rounds_nothing_but_the_rows(form, name, count):
    weight, x = any_weight(512, 128, FORMATS[name]), rows(count, 512).astype(jnp.bfloat16)
    close(form(x, weight), exact(x.astype(jnp.float32), weight), 1e-6)


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
        (tpu.WHOLE_INPUTS + 1, TensorFormat(bits=8), None),
        (4096, TensorFormat(bits=8, activation_bits=8), None),
    ],
)
def test_tpu_blocks_are_whole_groups_or_the_kernel_is_not_used(inputs, format, expected):
    assert tpu.block_inputs(inputs, format) == expected


@pytest.mark.parametrize(
    ("inputs", "format", "expected"),
    [
        (4096, TensorFormat(bits=4, group_size=128), 128),
        (4096, TensorFormat(bits=4, group_size=256), 128),
        (11008, TensorFormat(bits=3), 128),
        (192, TensorFormat(bits=4, group_size=48), 16),
        (192, TensorFormat(bits=3, group_size=64), 64),
        (192, TensorFormat(bits=3, group_size=32), None),
        (172, TensorFormat(bits=8), None),
        (4096, TensorFormat(bits=8, activation_bits=8), None),
    ],
)
def test_gpu_steps_lie_within_groups_or_the_kernel_is_not_used(inputs, format, expected):
    assert gpu.step_inputs(inputs, 64, format) == expected


def test_gpus_take_outputs_that_fill_a_tile():
    assert gpu.step_inputs(4096, 24, TensorFormat(bits=8)) is None


def test_tpu_blocks_of_the_smallest_groups():
    weight, x = any_weight(256, 128, TensorFormat(bits=2, group_size=32)), rows(2, 256)
    found = tpu.product(x, weight.values, weight.scales, weight.zero_points, weight.format, interpret=True)
    close(found, exact(x, weight), 1e-6)


def test_what_does_not_fit_takes_the_plain_form():
    format = TensorFormat(bits=3)
    weight, x = any_weight(172, 24, format), rows(2, 172)
    stored = {"values": weight.values, "scales": weight.scales, "zero_points": weight.zero_points}
    expected = np.asarray(x, np.float64) @ np.asarray(unstore(stored, (172, 24), format), np.float64)
    close(linear(x, weight), expected, 1e-6)
