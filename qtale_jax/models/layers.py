"""The small modules that blocks are made of: linear, RMSNorm, embedding, low-rank adapter.

Every parameter carries its logical axes (`axes` metadata), which `parallel.sharding` maps to the mesh. Modules keep
only arrays in Variables and hold no state besides, so `nnx.split` gives a pure tree that plain `jax.jit` can run.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from qtale_jax.models.specification import Kernels, TensorFormat
from qtale_jax.quantization.linear import QuantizedWeight, Weight, linear
from qtale_jax.quantization.storage import abstract as abstract_storage


def parameter(value: Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """Wraps an array as a parameter with one logical axis name (or None) per dimension."""
    return nnx.Param(value, axes=axes)


class RMSNorm(nnx.Module):
    """y = x / sqrt(mean(x^2) + eps) * (offset + scale), computed in float32, returned in the type of x."""

    def __init__(self, size: int, epsilon: float, offset: float = 0.0):
        self.scale = parameter(jnp.full((size,), 1.0 - offset, jnp.float32), (None,))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises the last axis."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        scale = self.scale[...] if self.offset == 0 else self.offset + self.scale[...]
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon) * scale).astype(x.dtype)


class LowRank(nnx.Module):
    """LoRA branch in float32: dropout(x A B), no alpha/r scale; A ~ N(0, 1/r^2), B = 0 (D-LLM reference)."""

    def __init__(self, inputs: int, outputs: int, rank: int, dropout: float, *, axes: tuple, rngs: nnx.Rngs):
        down = jax.random.normal(rngs.params(), (inputs, rank), jnp.float32) / rank
        self.down = parameter(down, (axes[0], None))
        self.up = parameter(jnp.zeros((rank, outputs), jnp.float32), (None, axes[1]))
        self.dropout = dropout

    def __call__(self, x: Float[Array, "... i"], key: PRNGKeyArray | None) -> Float[Array, "... o"]:
        """Returns the branch's output in the type of x; with a key, dropout is on."""
        out = (x.astype(jnp.float32) @ self.down[...]) @ self.up[...]
        if key is not None and self.dropout > 0:
            kept = jax.random.bernoulli(key, 1.0 - self.dropout, out.shape)
            out = jnp.where(kept, out / (1.0 - self.dropout), 0.0)
        return out.astype(x.dtype)


class Quantized(nnx.Module):
    """Stored integers of a linear; placeholders until a model directory is loaded into them."""

    def __init__(self, shape: tuple[int, int], format: TensorFormat, *, axes: tuple, kernels: Kernels = "auto"):
        arrays = {name: jnp.zeros(a.shape, a.dtype) for name, a in abstract_storage(shape, format).items()}
        # Packed words and groups both run along the inputs, so every part keeps the axes of the kernel.
        self.values = parameter(arrays["values"], axes)
        self.scales = parameter(arrays["scales"], (None, axes[1]))
        if "zero_points" in arrays:
            self.zero_points = parameter(arrays["zero_points"], (None, axes[1]))
        if "order" in arrays:
            self.order = parameter(arrays["order"], (None,))
        self.shape, self.format = shape, format
        self.kernels: Kernels = kernels

    def weight(self) -> QuantizedWeight:
        """The weight as `quantization.linear` takes it."""
        return QuantizedWeight(
            self.values[...],
            self.scales[...],
            None if self.format.symmetric else self.zero_points[...],
            self.order[...] if self.format.permuted else None,
            format=self.format,
            shape=self.shape,
            kernels=self.kernels,
        )


class Embedding(nnx.Module):
    """Token table; also the output head of tied models. Quantized, it is a matrix (size, vocabulary)."""

    def __init__(
        self,
        vocab_size: int,
        size: int,
        *,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        format: TensorFormat | None = None,
        kernels: Kernels = "auto",
    ):
        if format is None:
            # About 0.02 at the sizes of published models, and rows of unit length at any size.
            table = size**-0.5 * jax.random.normal(rngs.params(), (vocab_size, size), jnp.float32)
            self.table = parameter(table.astype(dtype), ("vocab", "embed"))
        else:
            self.quantized = Quantized((size, vocab_size), format, axes=("embed", "vocab"), kernels=kernels)
        self.is_quantized = format is not None

    def __call__(self, tokens: Int[Array, "..."]) -> Float[Array, "... d"]:
        """Returns the rows of `tokens`."""
        if self.is_quantized:
            return self.quantized.weight().columns(tokens)
        return jnp.take(self.table[...], tokens, axis=0)

    def head(self) -> Weight:
        """The table as the weight (size, vocabulary) of an output head."""
        return self.quantized.weight() if self.is_quantized else self.table[...].T


class Linear(nnx.Module):
    """y = x W, or x W + b; W in floating point or quantized, with an optional adapter beside it; b in float32."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        axes: tuple[str, str],
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        scale: float = 1.0,
        format: TensorFormat | None = None,
        bias: bool = False,
        rank: int = 0,
        dropout: float = 0.0,
        kernels: Kernels = "auto",
    ):
        if format is None:
            kernel = jax.random.normal(rngs.params(), shape, jnp.float32) * (scale / shape[0] ** 0.5)
            self.kernel = parameter(kernel.astype(dtype), axes)
        else:
            self.quantized = Quantized(shape, format, axes=axes, kernels=kernels)
        if bias:
            self.bias = parameter(jnp.zeros((shape[1],), jnp.float32), (axes[1],))
        if rank:
            self.lora = LowRank(*shape, rank, dropout, axes=axes, rngs=rngs)
        self.is_quantized, self.has_bias, self.has_lora = format is not None, bias, bool(rank)

    def weight(self) -> Weight:
        """The weight as `quantization.linear` takes it."""
        return self.quantized.weight() if self.is_quantized else self.kernel[...]

    def __call__(self, x: Float[Array, "... i"], key: PRNGKeyArray | None = None) -> Float[Array, "... o"]:
        """Multiplies, adds the bias and the adapter's output; with a key, the adapter's dropout is on."""
        if self.has_bias:
            # In float32: biases of keys can be so large that rounding before adding would lose what is added to.
            bias = self.bias[...].reshape((1,) * (x.ndim - 1) + (-1,))
            out = (linear(x, self.weight(), jnp.float32) + bias).astype(x.dtype)
        else:
            out = linear(x, self.weight())
        return out + self.lora(x, key) if self.has_lora else out
