"""The router of a layer: two logits per token, (skip, execute), from the raw residual stream."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from qtale_jax.models.layers import Quantized, RMSNorm, parameter
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.linear import linear

OPEN_BIAS = (0.1, 2.0)
"""Initial bias of (skip, execute): softmax gives p_execute = 0.87, so training starts near the dense model (D-LLM)."""


def hashed_logits(
    tokens: Int[Array, "b t"], positions: Int[Array, "b t"], layer: Int[Array, ""] | int
) -> Float[Array, "b t 2"]:
    """Logits of a router that knows nothing: p is uniform on (0, 1), a hash of the token, its position and the layer.

    The floor for learned routers. It decides alike in prefill and decode and whatever else is in the batch, and
    theta = 1 - R executes a share R. The hash is the finalizer of MurmurHash3 over an odd-multiplier combination.
    """
    word = [jnp.asarray(part).astype(jnp.uint32) for part in (tokens, positions, layer)]
    mixed = word[0] * jnp.uint32(0x9E3779B1) ^ word[1] * jnp.uint32(0x85EBCA77)
    mixed = mixed ^ jnp.broadcast_to(word[2] * jnp.uint32(0xC2B2AE3D), mixed.shape)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> jnp.uint32(shift))) * jnp.uint32(factor)
    mixed = mixed ^ (mixed >> jnp.uint32(16))
    uniform = ((mixed >> jnp.uint32(9)).astype(jnp.float32) + 0.5) * 2.0**-23
    gap = jnp.log(uniform) - jnp.log1p(-uniform)
    return jnp.stack([jnp.zeros_like(gap), gap], axis=-1)


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
