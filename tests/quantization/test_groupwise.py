"""The product group after group: equal to the product with the restored matrix, in every format."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.quantization import groupwise
from qtale_jax.quantization.linear import QuantizedWeight, linear
from qtale_jax.quantization.storage import store

product = jax.jit(groupwise.product, static_argnames=("shape", "format"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_restored_matrix(weight, format, dtype):
    """Bfloat16 rows meet exact integers, so the result is as exact as in float32."""
    stored = jax.jit(store, static_argnums=1)(weight, format)
    x = jax.random.normal(jax.random.key(3), (3, len(weight)), jnp.float32).astype(dtype)
    restored = QuantizedWeight(**stored, format=format, shape=weight.shape).dequantize()
    expected = np.asarray(x, np.float64) @ np.asarray(restored, np.float64)
    found = product(x, stored, weight.shape, format)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_few_rows_take_it_on_accelerators(weight, some_format):
    """Lowered for a TPU: a product per group and no matrix with its scales."""
    stored = jax.jit(store, static_argnums=1)(weight, some_format)
    one = QuantizedWeight(**stored, format=some_format, shape=weight.shape)
    groups = one.scales.shape[0]

    def lowered(rows: int) -> str:
        x = jnp.ones((rows, len(weight)), jnp.float32)
        return jax.jit(linear).trace(x, one).lower(lowering_platforms=("tpu",)).as_text()

    few = f"tensor<{groups}x{len(weight) // groups}x{weight.shape[1]}xf32>"
    dots = [line for line in lowered(1).splitlines() if "dot_general" in line]
    assert len(dots) == 1 and few in dots[0]
    dots = [line for line in lowered(groupwise.FEW_ROWS + 1).splitlines() if "dot_general" in line]
    assert len(dots) == 1 and few not in dots[0]
