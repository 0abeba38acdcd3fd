"""The kernels translated for GPUs that are not there: what Triton is given, for every format and shape of decode."""

import functools

import jax
import jax.numpy as jnp
import pytest

from qtale_jax.kernels.gpu.page_attention import attend_kept
from qtale_jax.kernels.gpu.quantized_matmul import product
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.storage import abstract

FORMATS = {
    "8 bits per channel": TensorFormat(bits=8, symmetric=True),
    "8 bits": TensorFormat(bits=8, group_size=128),
    "4 bits": TensorFormat(bits=4, group_size=128, scale_dtype="bfloat16"),
    "3 bits": TensorFormat(bits=3, group_size=128, scale_dtype="bfloat16"),
    "2 bits": TensorFormat(bits=2, group_size=64),
}


def lowered(function, *arguments, **named) -> str:
    return jax.jit(function).trace(*arguments, **named).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("format", FORMATS.values(), ids=list(FORMATS))
@pytest.mark.parametrize(("rows", "dtype"), [(1, jnp.bfloat16), (1, jnp.float32), (8, jnp.bfloat16), (64, jnp.float32)])
def test_products(format, rows, dtype):
    stored = abstract((4096, 11008), format)
    multiply = functools.partial(product, format=format)
    zeros = stored.get("zero_points")
    program = lowered(multiply, jax.ShapeDtypeStruct((rows, 4096), dtype), stored["values"], stored["scales"], zeros)
    assert f"quantized_matmul_{format.bits}_bit" in program and "triton" in program


@pytest.mark.parametrize(("heads", "dtype"), [(8, jnp.bfloat16), (32, jnp.bfloat16), (8, jnp.float32), (8, jnp.int8)])
def test_attention(heads, dtype):
    query = jax.ShapeDtypeStruct((4, 32, 128), jnp.float32 if dtype == jnp.float32 else jnp.bfloat16)
    pool, scales = jax.ShapeDtypeStruct((2048, 16, heads, 128), dtype), None
    if dtype == jnp.int8:
        scales = jax.ShapeDtypeStruct((2048, 16, heads), jnp.float32)
    table, counts = jax.ShapeDtypeStruct((4, 256), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.int32)
    attend = functools.partial(attend_kept, scale=128**-0.5, softcap=30.0)
    program = lowered(attend, query, pool, pool, table, counts, key_scale=scales, value_scale=scales)
    assert "attend_kept_pages" in program and "triton" in program
