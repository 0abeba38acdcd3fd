"""AWQ (arXiv 2306.00978): inputs with large activations get larger weights, so that rounding moves them less.

W' = Q(W * s) / s with one scale s per input, which the caller folds into whatever produces the input. Both searches
measure the error of the output exactly, from the Hessian H = sum x x^T, where the paper runs a sample of the data.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.output_error import channel_errors, diagonal_blocks, group_errors, relative
from qtale_jax.quantization.rounding import dequantize, fit_grid, grouped, quantize_to_grid

SMALLEST_MAGNITUDE = 1e-4
"""Magnitudes are at least this share of the largest: an input that hardly fires must not get a scale of 0."""


class Scales(NamedTuple):
    """What `search_scales` found.

    Attributes:
        scales: s per input, float32, positive; geometric mean of the largest and the smallest is 1.
        ratio: exponent of the magnitude; 0 means that all scales are 1.
        error: relative error of the output of all matrices together with these scales, ||X D|| / ||X W||.
        rtn_error: the same with plain rounding.
    """

    scales: Float[Array, " i"]
    ratio: Float[Array, ""]
    error: Float[Array, ""]
    rtn_error: Float[Array, ""]


def search_scales(
    kernels: Sequence[Float[Array, "i _"]],
    formats: Sequence[TensorFormat],
    hessian: Float[Array, "i i"],
    magnitude: Float[Array, " i"],
    *,
    grid: int = 20,
) -> Scales:
    """The scales s = magnitude^ratio with the smallest error of the output (arXiv 2306.00978, equations 4 and 5).

    Ratio 0, plain rounding, is tried too, so the error is never larger than that of plain rounding. Losses that are not
    finite are passed over; if all are, ratio 0 is returned.

    Args:
        kernels: matrices (inputs, outputs) that read the same input, any float type; computed in float32.
        formats: one per matrix.
        hessian: sum of x x^T over calibration rows, any factor.
        magnitude: mean |x| per input, any factor; zeros and denormal numbers are allowed.
        grid: number of ratios tried: 0, 1 / grid, ... 1 - 1 / grid.
    """
    return _search_scales(tuple(kernels), tuple(formats), hessian, magnitude, grid)


@functools.partial(jax.jit, static_argnames=("formats", "grid"))
def _search_scales(
    kernels: tuple[Array, ...], formats: tuple[TensorFormat, ...], hessian: Array, magnitude: Array, grid: int
) -> Scales:
    weights = [kernel.astype(jnp.float32) for kernel in kernels]
    hessian, magnitude = hessian.astype(jnp.float32), _normalized(magnitude.astype(jnp.float32))

    def loss(ratio: Float[Array, ""]) -> Float[Array, ""]:
        scales = _scales(magnitude, ratio)[:, None]
        total = jnp.float32(0)
        for weight, format in zip(weights, formats, strict=True):
            restored = _rounded(weight * scales, format, None) / scales
            total += jnp.sum(channel_errors(restored - weight, hessian))
        return total

    ratios = jnp.arange(grid, dtype=jnp.float32) / grid
    losses = jax.lax.map(loss, ratios)  # one after another: a restored matrix per ratio would not fit
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    size = sum((jnp.sum(channel_errors(weight, hessian)) for weight in weights), jnp.float32(0))
    ratio = ratios[best]
    return Scales(_scales(magnitude, ratio), ratio, relative(losses[best], size), relative(losses[0], size))


def _normalized(magnitude: Float[Array, " i"]) -> Float[Array, " i"]:
    """Magnitudes between `SMALLEST_MAGNITUDE` and 1; all 1 where nothing fires."""
    largest = jnp.max(magnitude)
    usable = (largest >= float(jnp.finfo(jnp.float32).tiny)) & jnp.isfinite(largest)
    return jnp.clip(jnp.where(usable, magnitude / jnp.where(usable, largest, 1.0), 1.0), SMALLEST_MAGNITUDE, 1.0)


def _scales(magnitude: Float[Array, " i"], ratio: Float[Array, ""]) -> Float[Array, " i"]:
    scales = jnp.where(ratio == 0, 1.0, magnitude**ratio)
    return scales / jnp.sqrt(jnp.max(scales) * jnp.min(scales))


def _rounded(
    weight: Float[Array, "i o"], format: TensorFormat, shrink: Float[Array, "g o"] | None
) -> Float[Array, "i o"]:
    return dequantize(quantize_to_grid(weight, fit_grid(grouped(weight, format), format, shrink), format))


@functools.partial(jax.jit, static_argnames=("format", "grid"))
def search_clip(
    kernel: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    format: TensorFormat,
    *,
    grid: int = 20,
    smallest: float | Float[Array, ""] = 0.5,
) -> Float[Array, "g o"]:
    """Factors (groups, outputs) that shrink ranges before rounding, float32: outliers are clipped for finer steps.

    Per group and channel, the factor with the smallest error of the output of that group alone (the clip search of
    AWQ's reference code, which the paper uses but does not describe). Errors of groups add up with signs, so a channel
    whose output as a whole gets worse by it goes without: no channel is worse than without clipping.

    Args:
        kernel: W (inputs, outputs), any float type; computed in float32. With scales: W * s.
        hessian: sum of x x^T over calibration rows, any factor. With scales: that of x / s.
        format: what to round to; its groups divide the inputs.
        grid: number of factors tried, evenly from 1 (no clipping) to `smallest`.
        smallest: in (0, 1].
    """
    weight, hessian = kernel.astype(jnp.float32), hessian.astype(jnp.float32)
    groups = grouped(weight, format)
    blocks = diagonal_blocks(hessian, groups.shape[0])

    def error(shrink: Float[Array, "g o"]) -> Float[Array, "g o"]:
        return group_errors(grouped(_rounded(weight, format, shrink), format) - groups, blocks)

    def better(best: tuple[Array, Array], factor: Float[Array, ""]) -> tuple[tuple[Array, Array], None]:
        shrink = jnp.full_like(best[0], factor)
        now = error(shrink)
        return (jnp.where(now < best[1], shrink, best[0]), jnp.minimum(now, best[1])), None

    none = jnp.ones((groups.shape[0], groups.shape[2]), jnp.float32)
    candidates = jnp.linspace(1.0, jnp.asarray(smallest, jnp.float32), grid, dtype=jnp.float32)[1:]
    (shrink, _), _ = jax.lax.scan(better, (none, error(none)), candidates)
    clipped, plain = (channel_errors(_rounded(weight, format, factor) - weight, hessian) for factor in (shrink, none))
    return jnp.where((clipped <= plain)[None], shrink, 1.0)
