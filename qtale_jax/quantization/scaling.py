"""AWQ's scales in a block: found for each linear's input, folded into what comes before, so that they cost nothing.

x W = (x / s) (diag(s) W): the right factor is what is rounded, and 1 / s goes into the norm or linear that made x. The
four inputs of a block and where their scales go:

    query, key, value    attention norm
    output               value (only where every query head has its own value head: not with grouped queries)
    gate, up             MLP norm
    down                 up

A bias of what made x is divided too; one of what reads x / s stays, since the product stays. Softmax weights sum to
1, so the bias of value passes attention as its other outputs do.

Routers read the residual stream before the norms, so no decision changes.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.decoder import Parameters
from qtale_jax.models.lora import with_weight
from qtale_jax.models.specification import Architecture, TensorFormat
from qtale_jax.quantization.awq import search_scales
from qtale_jax.quantization.output_error import output_error
from qtale_jax.quantization.rounding import fake_quantize
from qtale_jax.quantization.statistics import Statistics

READERS = {"query": ("query", "key", "value"), "output": ("output",), "gate": ("gate", "up"), "down": ("down",)}
"""The linears that share an input, under the first of them, in the order in which a block runs."""

PART = {name: "attention" for name in ("query", "key", "value", "output")} | {
    name: "mlp" for name in ("gate", "up", "down")
}
"""Where a linear stands among a layer's parameters."""


@functools.partial(jax.jit, static_argnames=("format",))
def rounding_error(kernel: Float[Array, "i o"], hessian: Float[Array, "i i"], format: TensorFormat) -> Float[Array, ""]:
    """Output error of plain rounding."""
    return output_error(kernel, fake_quantize(kernel, format), hessian)


def can_scale(architecture: Architecture, reader: str) -> bool:
    """Whether the input of `reader` is made by something that can take its scales."""
    return reader != "output" or architecture.num_kv_heads == architecture.num_heads


def scale_inputs(
    layer: Parameters,
    architecture: Architecture,
    formats: dict[str, TensorFormat],
    statistics: Callable[[str], Statistics],
    grid: int,
) -> tuple[Parameters, dict[str, Statistics], dict[str, float]]:
    """Finds and folds the scales of a layer.

    Args:
        layer: in floating point.
        architecture: its shape.
        formats: of the linears that will be quantized; the others are scaled along with them.
        statistics: of the input of a reader, for the layer as given.
        grid: exponents that are tried.

    Returns:
        The scaled layer, which computes the same; the statistics of its inputs by reader; and the output error that
        plain rounding of the layer as given would have, by linear.
    """
    found = {reader: statistics(reader) for reader in READERS}
    before: dict[str, float] = {}
    scales: dict[str, Array] = {}
    for reader, names in READERS.items():
        rounded = [name for name in names if name in formats]
        kernels = [layer[PART[name]][name]["kernel"] for name in rounded]
        for name, kernel in zip(rounded, kernels, strict=True):
            before[name] = float(rounding_error(kernel, found[reader].hessian, format=formats[name]))
        if rounded and can_scale(architecture, reader) and int(found[reader].rows):
            chosen, seen = [formats[name] for name in rounded], found[reader]
            scales[reader] = search_scales(kernels, chosen, seen.hessian, seen.mean_magnitude, grid=grid).scales
            found[reader] = seen.scaled(scales[reader])
    return fold(layer, scales, architecture.norm_offset), found, before


def fold(layer: Parameters, scales: dict[str, Float[Array, " i"]], norm_offset: float = 0.0) -> Parameters:
    """Divides what makes the inputs of the given readers by their scales, and multiplies what reads them.

    A norm multiplies by `norm_offset` plus its scale, and the sum is what is divided.
    """
    out = {part: dict(tree) for part, tree in layer.items()}

    def scale_rows(name: str, by: Array) -> None:
        linear = out[PART[name]][name]
        out[PART[name]][name] = with_weight(linear, {"kernel": _times(linear["kernel"], by[:, None])})

    def divide_outputs(name: str, by: Array) -> None:
        linear = out[PART[name]][name]
        divided = {"kernel": _times(linear["kernel"], 1.0 / by[None, :])}
        if "bias" in linear:
            divided["bias"] = _times(linear["bias"], 1.0 / by)
        out[PART[name]][name] = divided

    for reader, by in scales.items():
        for name in READERS[reader]:
            scale_rows(name, by)
        if reader in ("output", "down"):
            divide_outputs({"output": "value", "down": "up"}[reader], by)
        else:
            norm = {"query": "attention_norm", "gate": "mlp_norm"}[reader]
            out[norm] = {"scale": (out[norm]["scale"] + norm_offset) / by - norm_offset}
    return out


def _times(kernel: Array, by: Array) -> Array:
    return (kernel.astype(jnp.float32) * by).astype(kernel.dtype)
