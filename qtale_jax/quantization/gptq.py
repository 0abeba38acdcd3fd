"""GPTQ (arXiv 2210.17323): inputs are rounded one after another, and the later ones make up for the error so far.

With H = sum x x^T and (H + damping)^-1 = U^T U, U upper triangular, rounding row i of W leaves the error
e = (w_i - q_i) / U_ii per output channel; the best correction of the rows j > i is w_j -= U_ij e (algorithm 1). Rows
are worked on in blocks: those of the block are corrected at once, the rows after it when the block is done.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.rounding import (
    Grid,
    Rounded,
    as_rounded,
    fit_grid,
    grouped,
    quantize_to_grid,
    restore,
    round_to_grid,
)

BLOCK = 128
"""Rows per block where groups do not say otherwise, as in the paper."""

LONGEST_BLOCK = 256
"""Rows per block at most: the rank of the update inside a block grows with it."""


class GPTQResult(NamedTuple):
    """What `gptq` returns.

    Attributes:
        rounded: integers and their grid; rounded to nearest where it did not succeed.
        damping: the factor of the mean diagonal that was added, the last one tried where it did not succeed.
        retries: how often the damping was raised.
        succeeded: whether a factorization was finite, and any input had fired.
    """

    rounded: Rounded
    damping: Float[Array, ""]
    retries: Int[Array, ""]
    succeeded: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("format", "attempts", "activation_order"))
def gptq(
    kernel: Float[Array, "i o"],
    hessian: Float[Array, "i i"],
    format: TensorFormat,
    *,
    damping: float | Float[Array, ""] = 0.01,
    attempts: int = 4,
    activation_order: bool = True,
    shrink: Float[Array, "g o"] | None = None,
) -> GPTQResult:
    """Rounds a matrix so that the error of its output, not of its weights, is small (arXiv 2210.17323, algorithm 1).

    Inputs that never fire (H_ii = 0) get weight 0. Without `activation_order` the grid of a group is fitted to the
    corrected weights when its first row is reached; with it, all grids are fitted before ("static groups"), in the
    order of the matrix, so that no permutation has to be stored.

    Args:
        kernel: W (inputs, outputs), any float type; computed in float32.
        hessian: sum of x x^T over calibration rows, symmetric, any factor.
        format: what to round to; its groups divide the inputs.
        damping: added to the diagonal, times the mean of the diagonal; positive.
        attempts: factorizations tried, at least 1, each with ten times the damping.
        activation_order: rows with the largest H_ii first.
        shrink: factors that make the range of each group and channel smaller (`awq.search_clip`).
    """
    weight, hessian = kernel.astype(jnp.float32), hessian.astype(jnp.float32)
    diagonal = jnp.diagonal(hessian)
    order = jnp.argsort(diagonal, descending=True) if activation_order else jnp.arange(weight.shape[0])
    found = _factorize(hessian[order][:, order], jnp.asarray(damping, jnp.float32), attempts)
    # Without any row there is nothing to go by, and the whole matrix would become 0.
    succeeded = found.finite & jnp.any(diagonal != 0)

    def correct() -> Rounded:
        live = jnp.where((diagonal == 0)[:, None], 0.0, weight)
        grid = fit_grid(grouped(live, format), format, shrink)
        fit_on_the_way = not activation_order and format.groups(weight.shape[0]) > 1
        values, grid = _eliminate(live[order], found.factor, order, grid, format, shrink, fit_on_the_way)
        return as_rounded(jnp.zeros_like(values).at[order].set(values), grid, format)

    def nearest() -> Rounded:
        return quantize_to_grid(weight, fit_grid(grouped(weight, format), format, shrink), format)

    rounded = jax.lax.cond(succeeded, correct, nearest)
    return GPTQResult(rounded, found.damping, found.tries - 1, succeeded)


class _Factorization(NamedTuple):
    factor: Float[Array, "i i"]
    damping: Float[Array, ""]
    tries: Int[Array, ""]
    finite: Bool[Array, ""]


def _factorize(hessian: Float[Array, "i i"], damping: Float[Array, ""], attempts: int) -> _Factorization:
    """Upper U with (H + damping * mean diagonal)^-1 = U^T U, the damping raised until it is finite."""

    def again(state: _Factorization) -> Bool[Array, ""]:
        return ~state.finite & (state.tries < attempts)

    def attempt(state: _Factorization) -> _Factorization:
        current = jnp.where(state.tries == 0, damping, 10 * state.damping)
        factor = _inverse_factor(hessian, current)
        return _Factorization(factor, current, state.tries + 1, jnp.all(jnp.isfinite(factor)))

    start = _Factorization(jnp.zeros_like(hessian), damping, jnp.int32(0), jnp.bool_(False))
    return jax.lax.while_loop(again, attempt, start)


def _inverse_factor(hessian: Float[Array, "i i"], damping: Float[Array, ""]) -> Float[Array, "i i"]:
    # With the rows in reverse, H = L L^T becomes H = R R^T with R upper, and U = R^-1: no inverse of H, and no second
    # factorization.
    diagonal = jnp.diagonal(hessian)
    index = jnp.arange(diagonal.size)
    damped = hessian.at[index, index].set(jnp.where(diagonal == 0, 1.0, diagonal) + damping * jnp.mean(diagonal))
    lower = jnp.linalg.cholesky(damped[::-1, ::-1])
    identity = jnp.eye(diagonal.size, dtype=jnp.float32)
    return jax.scipy.linalg.solve_triangular(lower, identity, lower=True)[::-1, ::-1]


def _block_size(inputs: int, format: TensorFormat, fit_on_the_way: bool) -> int:
    """Rows per block: a divisor of the group where a group's grid is fitted when a block begins."""
    if not fit_on_the_way:
        return min(BLOCK, inputs)
    return max(size for size in range(1, LONGEST_BLOCK + 1) if format.group_size % size == 0)


def _eliminate(
    weight: Float[Array, "i o"],
    factor: Float[Array, "i i"],
    order: Int[Array, " i"],
    grid: Grid,
    format: TensorFormat,
    shrink: Float[Array, "g o"] | None,
    fit_on_the_way: bool,
) -> tuple[Float[Array, "i o"], Grid]:
    """Integers, in the order of the rows given, and their grid; `order` names the row of the matrix that each is."""
    inputs, outputs = weight.shape
    size = _block_size(inputs, format, fit_on_the_way)
    # Rows of zeros that nothing is correlated with fill up the last block.
    padding = -inputs % size
    factor = jnp.pad(factor, ((0, padding), (0, padding)))
    index = jnp.arange(inputs + padding)
    factor = factor.at[index, index].add(jnp.where(index < inputs, 0.0, 1.0))
    group_of = jnp.pad(order // (inputs // format.groups(inputs)), (0, padding))

    def block(number: Array, carry: tuple[Array, Grid]) -> tuple[Array, Grid]:
        weight, grid = carry
        start = number * size
        if fit_on_the_way:
            grid = jax.lax.cond(
                start % format.group_size == 0,
                lambda: _fit_group(grid, weight, start // format.group_size, format, shrink),
                lambda: grid,
            )
        rows = jax.lax.dynamic_slice_in_dim(weight, start, size)
        factor_rows = jax.lax.dynamic_slice_in_dim(factor, start, size)
        inner = jax.lax.dynamic_slice_in_dim(factor_rows, start, size, axis=1)
        values, errors = _round_rows(rows, inner, jax.lax.dynamic_slice_in_dim(group_of, start, size), grid, format)
        later = jnp.where((index >= start + size)[None], factor_rows, 0.0)
        weight = weight - jnp.matmul(later.T, errors, precision="highest")
        # Nobody reads these weights again: their place holds the integers.
        return jax.lax.dynamic_update_slice_in_dim(weight, values, start, axis=0), grid

    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    values, grid = jax.lax.fori_loop(0, (inputs + padding) // size, block, (weight, grid))
    return values[:inputs], grid


def _fit_group(
    grid: Grid, weight: Float[Array, "i o"], group: Array, format: TensorFormat, shrink: Float[Array, "g o"] | None
) -> Grid:
    """The grid with that of one group fitted anew."""
    rows = jax.lax.dynamic_slice_in_dim(weight, group * format.group_size, format.group_size)
    factor = None if shrink is None else jax.lax.dynamic_slice_in_dim(shrink, group, 1)
    return jax.tree.map(lambda whole, part: whole.at[group].set(part[0]), grid, fit_grid(rows[None], format, factor))


def _round_rows(
    rows: Float[Array, "b o"], factor: Float[Array, "b b"], group_of: Int[Array, " b"], grid: Grid, format: TensorFormat
) -> tuple[Float[Array, "b o"], Float[Array, "b o"]]:
    """Integers of the rows of a block, and the errors e that the rows after the block make up for."""

    def row(index: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, errors = carry
        scales, zero_points = jax.tree.map(lambda leaf: leaf[group_of[index]], grid)
        values = round_to_grid(rows[index], scales, zero_points, format)
        error = (rows[index] - restore(values, scales, zero_points)) / factor[index, index]
        # U is 0 left of its diagonal: rows that hold integers already stay.
        rows = rows - factor[index][:, None] * error[None]
        return rows.at[index].set(values), errors.at[index].set(error)

    return jax.lax.fori_loop(0, rows.shape[0], row, (rows, jnp.zeros_like(rows)))
