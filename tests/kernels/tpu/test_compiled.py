"""The kernels compiled ahead of time for TPUs that are not there, and what they spare, where libtpu is installed.

Bytes are those of the compiler's own memory analysis. A product that restores its matrix in memory moves more than the
same in bfloat16; neither the kernels nor the plain form for few rows do.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from qtale_jax.kernels.tpu.page_attention import attend_kept
from qtale_jax.models.specification import TensorFormat
from qtale_jax.planning.compiled import topology_devices
from qtale_jax.quantization.linear import QuantizedWeight, linear
from qtale_jax.quantization.storage import abstract, storage_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra 'aot' is not installed"),
]


@pytest.fixture(params=["v5e:2x2", "v6e:2x2"])
def topology(request):
    return request.param


@pytest.fixture
def array(topology):
    """Makes abstract arrays on one device of the topology."""
    return functools.partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(topology_devices(topology)[0]))


def compiled(function, *arguments, **named):
    return jax.jit(function).trace(*arguments, **named).lower(lowering_platforms=("tpu",)).compile()


def multiply(array, shape, format, kernels, rows=1, dtype=jnp.bfloat16):
    stored = {name: array(part.shape, part.dtype) for name, part in abstract(shape, format).items()}
    weight = QuantizedWeight(**stored, format=format, shape=shape, kernels=kernels)
    return compiled(linear, array((rows, 1, shape[0]), dtype), weight)


FORMATS = {
    "8 bits": TensorFormat(bits=8, group_size=128),
    "4 bits": TensorFormat(bits=4, group_size=128, scale_dtype="bfloat16"),
    "3 bits": TensorFormat(bits=3, group_size=128, scale_dtype="bfloat16"),
    "2 bits": TensorFormat(bits=2, group_size=64),
    "8 bits per channel": TensorFormat(bits=8, symmetric=True),
}


@pytest.mark.parametrize("kernels", ["xla", "pallas"])
@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize("rows", [1, 16])
def test_products_restore_nothing_in_memory(topology, array, rows, format, kernels):
    shape = (11008, 4096)
    program = multiply(array, shape, format, kernels, rows)
    assert ("tpu_custom_call" in (program.as_text() or "")) == (kernels == "pallas")
    written = program.memory_analysis().temp_size_in_bytes
    if topology.startswith("v6e") and format.bits == 3 and kernels == "xla":
        assert written < 1.5 * shape[0] * shape[1]  # integers of 8 bits, which is what the kernel is for there
    else:
        assert written < 0.1 * storage_bytes(shape, format)


def test_most_rows_and_float32(array):
    multiply(array, (4096, 1024), FORMATS["4 bits"], "pallas", 64, jnp.float32)


@pytest.mark.parametrize(("heads", "dtype"), [(8, jnp.bfloat16), (32, jnp.bfloat16), (8, jnp.float32), (8, jnp.int8)])
def test_attention_compiles(array, heads, dtype):
    query = array((4, 32, 128), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    pool, scales = array((2048, 16, heads, 128), dtype), None
    if dtype == jnp.int8:
        scales = array((2048, 16, heads), jnp.float32)
    table, counts = array((4, 256), jnp.int32), array((4,), jnp.int32)
    attend = functools.partial(attend_kept, scale=128**-0.5, softcap=None)
    program = compiled(attend, query, pool, pool, table, counts, key_scale=scales, value_scale=scales)
    # The pool stays where it is; the scales of int8 pages, 3 % of it, change their layout.
    assert program.memory_analysis().temp_size_in_bytes < 0.05 * pool.size * pool.dtype.itemsize


@pytest.mark.parametrize(("bits", "group_size"), [(8, -1), (8, 128), (4, 128)])
def test_integer_dots_are_integer_dots(array, bits, group_size):
    """W8A8 and W4A8: the matrix unit gives int32, and nothing is widened in memory."""
    shape, format = (4096, 4096), TensorFormat(bits=bits, group_size=group_size, activation_bits=8)
    program = multiply(array, shape, format, "xla", rows=512)
    assert re.search(r"= s32\[.*(convolution|dot)\(", program.as_text() or "")
    assert program.memory_analysis().temp_size_in_bytes < 0.1 * storage_bytes(shape, format)
