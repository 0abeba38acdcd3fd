"""The seam: one function multiplies activations with a weight, whatever the weight is stored as."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.storage import unstore


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A stored (inputs, outputs) matrix: arrays as `quantization.storage` lays them out, and what they mean."""

    values: Array
    scales: Float[Array, "g o"]
    zero_points: Array | None
    format: TensorFormat = field(metadata={"static": True})
    shape: tuple[int, int] = field(metadata={"static": True})

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Array, "i o"]:
        """The weight in floating point."""
        stored = {"values": self.values, "scales": self.scales}
        if self.zero_points is not None:
            stored["zero_points"] = self.zero_points
        return unstore(stored, self.shape, self.format, dtype)


Weight = Float[Array, "i o"] | QuantizedWeight


def linear(x: Float[Array, "... i"], weight: Weight) -> Float[Array, "... o"]:
    """Returns x @ weight, accumulated in float32, in the type of x.

    A quantized weight is restored where it is used, so that XLA can fuse the conversion into the product's operand.
    """
    matrix = weight.dequantize(x.dtype) if isinstance(weight, QuantizedWeight) else weight.astype(x.dtype)
    return jnp.matmul(x, matrix, preferred_element_type=jnp.float32).astype(x.dtype)
