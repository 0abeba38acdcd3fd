"""The seam: one function multiplies activations with a weight, whatever the weight is stored as."""

import dataclasses
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8, Int32

from qtale_jax.kernels.choice import runs_gpu_kernels
from qtale_jax.kernels.gpu import quantized_matmul as gpu_matmul
from qtale_jax.kernels.tpu import quantized_matmul as tpu_matmul
from qtale_jax.models.specification import Kernels, TensorFormat
from qtale_jax.quantization import blockwise, groupwise
from qtale_jax.quantization.rounding import restore
from qtale_jax.quantization.storage import PACKED, Stored, unstore


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedWeight:
    """A stored (inputs, outputs) matrix: arrays as `quantization.storage` lays them out, and what they mean."""

    values: Array
    scales: Float[Array, "g o"]
    zero_points: Array | None = None
    order: Int32[Array, " i"] | None = None
    """The input that each stored row belongs to; None: the rows stand in the order of the inputs."""
    format: TensorFormat = field(kw_only=True, metadata={"static": True})
    shape: tuple[int, int] = field(kw_only=True, metadata={"static": True})
    kernels: Kernels = field(default="auto", kw_only=True, metadata={"static": True})
    """What computes products with it, see `ModelSpecification`."""

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> Float[Array, "i o"]:
        """The weight in floating point, its inputs in their own order."""
        return unstore(self.stored, self.shape, self.format, dtype)

    @property
    def stored(self) -> Stored:
        """The arrays that there are, by name."""
        found = {"values": self.values, "scales": self.scales, "zero_points": self.zero_points, "order": self.order}
        return {name: array for name, array in found.items() if array is not None}

    def columns(self, outputs: Int[Array, "..."]) -> Float[Array, "... i"]:
        """The inputs' weights of some outputs, float32: the rows of a quantized embedding.

        Raises:
            ValueError: the format is not 8 bits with one scale per output.
        """
        if self.format.bits != 8 or self.format.group_size != -1 or self.format.permuted:
            raise ValueError("only 8-bit weights with one scale per output give single columns")
        zero = None if self.zero_points is None else jnp.take(self.zero_points[0], outputs)[..., None]
        values = jnp.moveaxis(jnp.take(self.values, outputs, axis=1), 0, -1)
        return restore(values, jnp.take(self.scales[0], outputs)[..., None], zero)


Weight = Float[Array, "i o"] | QuantizedWeight


def linear(x: Float[Array, "... i"], weight: Weight, dtype: jnp.dtype | None = None) -> Float[Array, "... o"]:
    """Returns x @ weight, accumulated in float32, as `dtype` (default: the type of x).

    A quantized weight is restored as a whole for many rows. Few rows take the form of `blockwise` on a CPU, elsewhere
    that of `groupwise`, or of the kernel for a TPU or GPU, see `weight.kernels`. With `activation_bits` 8 the product
    is an integer dot. Of a weight with an order the activations are put into it, which is cheaper than to put the
    weight back.
    """
    dtype = x.dtype if dtype is None else dtype
    if not isinstance(weight, QuantizedWeight):
        return _multiply(x, weight.astype(x.dtype)).astype(dtype)
    x, weight = _in_stored_order(x, weight)
    if weight.format.activation_bits == 8:
        return integer_dot(x, weight).astype(dtype)
    out = _multiply_stored(x.reshape(-1, x.shape[-1]), weight)
    return out.reshape(*x.shape[:-1], weight.shape[1]).astype(dtype)


def _multiply_stored(rows: Float[Array, "m i"], weight: QuantizedWeight) -> Float[Array, "m o"]:
    if not 0 < len(rows) <= groupwise.FEW_ROWS:
        return _restored(rows, weight)
    by_blocks = len(rows) <= blockwise.FEW_ROWS and blockwise.steps(*weight.shape, weight.format) is not None
    forms = {"cpu": _by_blocks if by_blocks else _restored}
    if tpu_matmul.block_inputs(weight.shape[0], weight.format) is not None:
        if weight.kernels == "interpreted":
            return _by_tpu_kernel(rows, weight, interpret=True)
        if weight.kernels == "pallas":
            forms["tpu"] = _by_tpu_kernel
    if runs_gpu_kernels(weight.kernels) and gpu_matmul.step_inputs(*weight.shape, weight.format) is not None:
        forms["cuda"] = _by_gpu_kernel
    return jax.lax.platform_dependent(rows, weight, default=_by_groups, **forms)


def _restored(rows: Float[Array, "m i"], weight: QuantizedWeight) -> Float[Array, "m o"]:
    return _multiply(rows, weight.dequantize(rows.dtype))


def _by_groups(rows: Float[Array, "m i"], weight: QuantizedWeight) -> Float[Array, "m o"]:
    return groupwise.product(rows, weight.stored, weight.shape, weight.format)


def _multiply(x: Float[Array, "... i"], matrix: Float[Array, "i o"]) -> Float[Array, "... o"]:
    # As one matrix: with several leading axes the gradient of the weight contracts over all of them, for which a CPU
    # first transposes both sides (a quarter of the time of a training step of a small model).
    rows = x.reshape(-1, x.shape[-1])
    return jnp.matmul(rows, matrix, preferred_element_type=jnp.float32).reshape(*x.shape[:-1], matrix.shape[-1])


def _by_tpu_kernel(rows: Float[Array, "m i"], weight: QuantizedWeight, interpret: bool = False) -> Float[Array, "m o"]:
    stored = (weight.values, weight.scales, weight.zero_points)
    return tpu_matmul.product(rows, *stored, weight.format, interpret=interpret)


def _by_gpu_kernel(rows: Float[Array, "m i"], weight: QuantizedWeight) -> Float[Array, "m o"]:
    return gpu_matmul.product(rows, weight.values, weight.scales, weight.zero_points, weight.format)


def _by_blocks(rows: Float[Array, "m i"], weight: QuantizedWeight) -> Float[Array, "m o"]:
    stored = (weight.values, weight.scales, weight.zero_points)
    return blockwise.product(rows.astype(jnp.float32), *stored, weight.format)


def _in_stored_order(x: Float[Array, "... i"], weight: QuantizedWeight) -> tuple[Array, QuantizedWeight]:
    if weight.order is None:
        return x, weight
    return jnp.take(x, weight.order, axis=-1), dataclasses.replace(weight, order=None)


def integer_dot(x: Float[Array, "... i"], weight: QuantizedWeight) -> Float[Array, "... o"]:
    """X @ weight with both sides integers: int8 x int8 -> int32, scaled afterwards (W8A8; 4-bit weights widened, W4A8).

    Each row of x is rounded to int8 with its own scale max|x| / 127. Zero points are taken off in int32, exactly, as
    z sum(x): one product with a vector, where a second dot with the zero points spread out takes as long as the first.

    Returns:
        float32; not finite for rows that are not.

    Raises:
        ValueError: the weight has 2 or 3 bits, which have no integer form in storage.
    """
    if weight.format.bits in PACKED:
        raise ValueError(f"{weight.format.bits}-bit weights have no integer dot")
    x, weight = _in_stored_order(x, weight)
    groups, outputs = weight.scales.shape
    values, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
    left = values.reshape(len(values), groups, x.shape[-1] // groups)
    right = weight.values.astype(jnp.int8).reshape(groups, -1, outputs)
    total = jax.lax.dot_general(left, right, (((2,), (1,)), ((1,), (0,))), preferred_element_type=jnp.int32)
    if weight.zero_points is not None:
        sums = jnp.sum(left, axis=2, dtype=jnp.int32).T[:, :, None]
        total = total - sums * weight.zero_points.astype(jnp.int32)[:, None]
    scaled = total.astype(jnp.float32) * weight.scales.astype(jnp.float32)[:, None]
    return (jnp.sum(scaled, axis=0) * scale).reshape(*x.shape[:-1], outputs)


def quantize_rows(x: Float[Array, "m i"]) -> tuple[Int8[Array, "m i"], Float[Array, "m 1"]]:
    """Rounds each row to int8, symmetric, with its own float32 scale.

    A row of zeros, or of numbers that float32 can barely hold, has scale 1; one that is not finite keeps a scale that
    is not, so that it does not become a number.
    """
    wide = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(wide), axis=1, keepdims=True) / 127
    scale = jnp.where(scale < float(jnp.finfo(jnp.float32).tiny), 1.0, scale)
    return jnp.round(wide / scale).astype(jnp.int8), scale
