"""Quantizing one matrix by any of the methods, and saying how well that went."""

import functools
import math
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.awq import search_clip
from qtale_jax.quantization.gptq import GPTQResult, gptq
from qtale_jax.quantization.magr import magr
from qtale_jax.quantization.output_error import output_error, weight_error
from qtale_jax.quantization.report import LinearReport
from qtale_jax.quantization.rounding import Rounded, dequantize, fit_grid, grouped, quantize, quantize_to_grid
from qtale_jax.quantization.statistics import Statistics

_quantize = jax.jit(quantize, static_argnames=("format",))


@functools.partial(jax.jit, static_argnames=("format",))
def _quantize_clipped(kernel: Float[Array, "i o"], shrink: Float[Array, "g o"], format: TensorFormat) -> Rounded:
    return quantize_to_grid(kernel, fit_grid(grouped(kernel, format), format, shrink), format)


@jax.jit
def _weight_error(kernel: Float[Array, "i o"], rounded: Rounded) -> Float[Array, ""]:
    return weight_error(kernel, dequantize(rounded))


@jax.jit
def _output_error(kernel: Float[Array, "i o"], rounded: Rounded, hessian: Float[Array, "i i"]) -> Float[Array, ""]:
    return output_error(kernel, dequantize(rounded), hessian)


@dataclass(frozen=True)
class Problem:
    """A matrix to quantize.

    Attributes:
        name: for messages, "layer 3, linear 'down'".
        kernel: (inputs, outputs), as it will be multiplied (after AWQ's scaling, if any).
        format: how it will be stored.
        statistics: of its inputs; None for plain rounding.
        rounding_error: output error of plain rounding where AWQ's scaling has changed what it would be now.
    """

    name: str
    kernel: Float[Array, "i o"]
    format: TensorFormat
    statistics: Statistics | None = None
    rounding_error: float | None = None


def quantize_matrix(
    problem: Problem, config: QuantizeConfig, last_sample: Statistics | None = None
) -> tuple[Rounded, LinearReport]:
    """Quantizes one matrix; what does worse than plain rounding, or cannot be computed, becomes plain rounding.

    Args:
        problem: the matrix and what is known of its inputs.
        config: method and settings.
        last_sample: statistics that MagR uses instead, if it is to see the last calibration row alone.

    Raises:
        InputError: the matrix holds numbers that are not finite.
    """
    rounded = _quantize(problem.kernel, format=problem.format)
    plain_error = float(_weight_error(problem.kernel, rounded))
    if not math.isfinite(plain_error):
        raise InputError(f"quantize.model: {problem.name} holds weights that are not finite")
    bits, statistics = problem.format.bits, problem.statistics
    if statistics is None:
        return rounded, LinearReport(bits, plain_error)
    rows = int(statistics.rows)
    if rows == 0:
        return rounded, LinearReport(bits, plain_error, fallback="no calibration token executes the layer")

    def output_of(candidate: Rounded) -> float:
        return float(_output_error(problem.kernel, candidate, statistics.hessian))

    plain = output_of(rounded)
    if not math.isfinite(plain):
        return rounded, LinearReport(bits, plain_error, rows=rows, fallback="its inputs are not finite")
    compared = plain if problem.rounding_error is None else problem.rounding_error
    candidate, retries, reason = _candidate(problem, config, statistics, last_sample or statistics)
    if candidate is not None:
        found = output_of(candidate)
        if found <= plain:
            weight = float(_weight_error(problem.kernel, candidate))
            return candidate, LinearReport(bits, weight, found, compared, rows, retries)
        reason = f"its output error would be {found:.4f}, that of plain rounding is {plain:.4f}"
    return rounded, LinearReport(bits, plain_error, plain, compared, rows, retries, reason)


def _candidate(
    problem: Problem, config: QuantizeConfig, statistics: Statistics, seen_by_magr: Statistics
) -> tuple[Rounded | None, int, str | None]:
    """What the method makes of the matrix, how often the damping was raised, and why there is nothing if so."""
    kernel, format, hessian = problem.kernel, problem.format, statistics.hessian
    shrink = None
    if config.method in ("magr", "magr+gptq"):
        kernel = magr(
            kernel,
            seen_by_magr.hessian,
            strength=config.magr.strength_for(format.group_size),
            iterations=config.magr.iterations,
            group_size=format.group_size,
        )
    if (config.method == "awq" and config.awq.clip) or (config.method.endswith("gptq") and config.gptq.clip):
        shrink = search_clip(kernel, hessian, format=format, grid=config.awq.grid)
    if config.method.endswith("gptq"):
        settings = config.gptq
        found: GPTQResult = gptq(
            kernel,
            hessian,
            format=format,
            damping=settings.damping,
            attempts=settings.attempts,
            activation_order=settings.activation_order,
            shrink=shrink,
        )
        retries = int(found.retries)
        if not bool(found.succeeded):
            return None, retries, f"the Hessian could not be factorized, even with damping {float(found.damping):g}"
        return found.rounded, retries, None
    if shrink is not None:
        return _quantize_clipped(kernel, shrink, format=format), 0, None
    return _quantize(kernel, format=format), 0, None
