"""The sums that quantizers see: every row that counts weighs the same, and nothing else is in them."""

import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.quantization.statistics import accumulate, no_rows

ROWS, LENGTH, INPUTS = 6, 7, 5


@pytest.fixture
def inputs(rng) -> tuple[np.ndarray, np.ndarray]:
    """Rows (6, 7, 5) float32 with channels of different size, and which of them count."""
    x = rng.normal(size=(ROWS, LENGTH, INPUTS)) * np.array([0.01, 1.0, 1.0, 10.0, 100.0]) + 0.3
    return x.astype(np.float32), rng.random((ROWS, LENGTH)) < 0.6


def in_float64(x: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """X^T X and the sum of |x|."""
    rows = x.astype(np.float64)[counted]
    return rows.T @ rows, np.abs(rows).sum(0)


def check(found, x: np.ndarray, counted: np.ndarray) -> None:
    hessian, magnitude = in_float64(x, counted)
    size = np.sqrt(np.outer(np.diag(hessian), np.diag(hessian)))  # Cauchy-Schwarz: what an entry is at most
    np.testing.assert_allclose(found.hessian / size, hessian / size, atol=1e-6)
    np.testing.assert_allclose(found.magnitude, magnitude, rtol=1e-6)
    assert float(found.rows) == counted.sum() and found.rows.dtype == found.hessian.dtype == jnp.float32


def test_hessian_is_the_sum_over_the_rows_that_count(inputs):
    x, counted = inputs
    assert 0 < counted.sum() < counted.size
    check(accumulate(no_rows(INPUTS), jnp.asarray(x), jnp.asarray(counted)), x, counted)


def test_rows_that_do_not_count_leave_no_trace(inputs):
    x, counted = inputs
    wild = np.where(counted[..., None], x, np.float32(np.nan))
    found = accumulate(no_rows(INPUTS), jnp.asarray(wild), jnp.asarray(counted))
    expected = accumulate(no_rows(INPUTS), jnp.asarray(x), jnp.asarray(counted))
    np.testing.assert_array_equal(found.hessian, expected.hessian)
    np.testing.assert_array_equal(found.magnitude, expected.magnitude)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_batches_are_added_up(inputs, size):
    x, counted = inputs
    found = no_rows(INPUTS)
    for at in range(0, ROWS, size):
        found = accumulate(found, jnp.asarray(x[at : at + size]), jnp.asarray(counted[at : at + size]))
    check(found, x, counted)
    last = accumulate(no_rows(INPUTS), jnp.asarray(x[-size:]), jnp.asarray(counted[-size:]))
    assert float(last.hessian[1, 1]) < 0.9 * float(found.hessian[1, 1])


def test_narrow_inputs_are_summed_in_float32(inputs):
    x, counted = inputs
    narrow = jnp.asarray(x, jnp.bfloat16)
    found = accumulate(no_rows(INPUTS), narrow, jnp.asarray(counted))
    check(found, np.asarray(narrow.astype(jnp.float32)), counted)


def test_mean_magnitude_is_per_row_and_zero_without_rows(inputs):
    x, counted = inputs
    found = accumulate(no_rows(INPUTS), jnp.asarray(x), jnp.asarray(counted))
    np.testing.assert_allclose(found.mean_magnitude, np.abs(x[counted]).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(no_rows(INPUTS).mean_magnitude, np.zeros(INPUTS))


def test_scaled_statistics_are_those_of_scaled_inputs(inputs):
    x, counted = inputs
    scales = np.array([0.1, 1.0, 2.0, 5.0, 30.0], np.float32)
    found = accumulate(no_rows(INPUTS), jnp.asarray(x), jnp.asarray(counted)).scaled(jnp.asarray(scales))
    check(found, x / scales, counted)
