"""A product of few rows with a stored weight, as compilers for accelerators like it: group after group, scaled last.

XLA for TPUs writes a matrix to memory that is restored with its scales in groups before it is multiplied, at one row in
float32: decode in 4 bits then moves more than in bfloat16. Here each group of inputs is an ordinary product with
integers, whose conversion fuses into it, and the scales are applied to what comes out: only what is stored travels
(`benchmarks/results/kernels_compiled_v5e.json`). Integers without their zero point, up to 256, are exact in bfloat16,
so nothing is rounded but the rows.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.storage import Stored, recover

FEW_ROWS = 64
"""Where the sum over groups is not fused, the parts take 4 bytes per group, row and output; a restored matrix in half
precision, written and read, takes 4 per weight. With groups of 128 that is even at 128 rows, with smaller ones sooner.
"""


def product(
    x: Float[Array, "m i"], stored: Stored, shape: tuple[int, int], format: TensorFormat
) -> Float[Array, "m o"]:
    """X @ W in float32.

    Args:
        x: rows, the inputs in the order in which they are stored; the products are of their type.
        stored: values, scales and zero points.
        shape: (inputs, outputs).
        format: what they mean.
    """
    rounded = recover(stored, shape, format)
    groups, outputs = rounded.scales.shape
    integers = rounded.values.reshape(groups, -1, outputs)
    if rounded.zero_points is not None:
        # Of 16 bits: the difference of two bytes has nine.
        integers = integers.astype(jnp.int16) - rounded.zero_points.astype(jnp.int16)[:, None]
    rows = x.reshape(x.shape[0], groups, -1)
    parts = jnp.einsum("mgi,gio->gmo", rows, integers.astype(x.dtype), preferred_element_type=jnp.float32)
    return jnp.sum(parts * rounded.scales.astype(jnp.float32)[:, None], axis=0)
