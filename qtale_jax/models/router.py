"""The router of a layer: two logits per token, (skip, execute), from the raw residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from qtale_jax.models.layers import Quantized, RMSNorm, parameter
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.linear import linear

OPEN_BIAS = (0.1, 2.0)
"""Initial bias of (skip, execute): softmax gives p_execute = 0.87, so training starts near the dense model (D-LLM)."""


class Affine(nnx.Module):
    """x W + b in float32, initialised as U(-1/sqrt(inputs), 1/sqrt(inputs)) for both (the reference's default)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs, format: TensorFormat | None = None):
        bound = inputs**-0.5
        if format is None:
            kernel = jax.random.uniform(rngs.params(), (inputs, outputs), jnp.float32, -bound, bound)
            self.kernel = parameter(kernel, (None, None))
        else:
            self.quantized = Quantized((inputs, outputs), format, axes=(None, None))
        bias = jax.random.uniform(rngs.params(), (outputs,), jnp.float32, -bound, bound)
        self.bias = parameter(bias, (None,))
        self.is_quantized = format is not None

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        """Applies the affine map to the last axis."""
        weight = self.quantized.weight() if self.is_quantized else self.kernel[...]
        return linear(x, weight) + self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))


class Router(nnx.Module):
    """Linear(d -> h) + bias, RMSNorm(h), SiLU, Linear(h -> 2) + bias; float32 whatever the compute type (D-LLM).

    `format` is how the first of the two, nearly all of the router, is stored.
    """

    def __init__(self, size: int, hidden: int, epsilon: float, *, rngs: nnx.Rngs, format: TensorFormat | None = None):
        self.hidden = Affine(size, hidden, rngs=rngs, format=format)
        self.norm = RMSNorm(hidden, epsilon)
        self.output = Affine(hidden, 2, rngs=rngs)
        self.output.bias[...] = jnp.asarray(OPEN_BIAS, jnp.float32)

    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t 2"]:
        """Returns float32 logits for the raw residual stream of every token."""
        with jax.default_matmul_precision("float32"):  # TPUs would round float32 inputs to bfloat16
            return self.output(jax.nn.silu(self.norm(self.hidden(x.astype(jnp.float32)))))
