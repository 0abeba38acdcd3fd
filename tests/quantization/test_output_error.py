import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.quantization.output_error import (
    channel_errors,
    diagonal_blocks,
    group_errors,
    output_error,
    weight_error,
)

INPUTS, OUTPUTS, ROWS = 24, 5, 90


@pytest.fixture
def case(rng) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of correlated inputs, a kernel, and a kernel near it."""
    x = (rng.normal(size=(ROWS, 6)) @ rng.normal(size=(6, INPUTS)) + 0.3 * rng.normal(size=(ROWS, INPUTS))).astype("f")
    kernel = rng.normal(size=(INPUTS, OUTPUTS)).astype("f")
    return x, kernel, kernel + (0.1 * rng.normal(size=kernel.shape)).astype("f")


def test_output_error_is_that_of_the_outputs(case):
    x, kernel, restored = case
    expected = np.linalg.norm(x @ (kernel - restored)) / np.linalg.norm(x @ kernel)
    np.testing.assert_allclose(output_error(kernel, restored, x.T @ x), expected, rtol=1e-5)
    np.testing.assert_allclose(output_error(kernel, restored, 1e-6 * x.T @ x), expected, rtol=1e-5)


def test_identity_hessian_gives_the_weight_error(case):
    _, kernel, restored = case
    expected = np.linalg.norm(kernel - restored) / np.linalg.norm(kernel)
    np.testing.assert_allclose(weight_error(kernel, restored), expected, rtol=1e-6)
    np.testing.assert_allclose(output_error(kernel, restored, np.eye(INPUTS, dtype="f")), expected, rtol=1e-6)


def test_nothing_lost_is_no_error_and_all_lost_is_one(case):
    x, kernel, _ = case
    for error in (weight_error, lambda *pair: output_error(*pair, x.T @ x)):
        assert float(error(kernel, kernel)) == 0
        np.testing.assert_allclose(error(kernel, 0 * kernel), 1, rtol=1e-6)
        assert float(error(0 * kernel, 0 * kernel)) == 0


def test_no_rows_give_no_error(case):
    _, kernel, restored = case
    assert float(output_error(kernel, restored, np.zeros((INPUTS, INPUTS), "f"))) == 0


def test_an_error_that_the_data_cannot_see_is_no_output_error(rng):
    hidden, seen = np.zeros((2, 4, 1), "f")
    hidden[3], seen[:3] = 1, 1
    x = rng.normal(size=(20, 4)).astype("f") * np.array([1, 1, 1, 0], "f")
    assert float(output_error(seen, seen + hidden, x.T @ x)) == 0
    assert float(weight_error(seen, seen + hidden)) > 0.5


def test_channel_errors_add_up(case):
    x, kernel, restored = case
    errors = channel_errors(kernel - restored, x.T @ x)
    np.testing.assert_allclose(errors, np.sum(np.square(x @ (kernel - restored)), axis=0), rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 3])
def test_group_errors_take_one_group_at_a_time(case, groups):
    x, kernel, restored = case
    difference = kernel - restored
    parts = difference.reshape(groups, -1, OUTPUTS)
    rows = x.reshape(ROWS, groups, -1)
    expected = [np.sum(np.square(rows[:, group] @ parts[group]), axis=0) for group in range(groups)]
    errors = group_errors(parts, diagonal_blocks(x.T @ x, groups))
    np.testing.assert_allclose(errors, expected, rtol=1e-4)
    if groups == 1:
        np.testing.assert_allclose(errors[0], channel_errors(difference, x.T @ x), rtol=1e-4)


def test_not_a_number_is_not_hidden(case):
    x, kernel, restored = case
    restored[3, 2] = np.nan
    assert np.isnan(output_error(kernel, restored, x.T @ x)) and np.isnan(weight_error(kernel, restored))


def test_narrow_types_are_widened_first(case):
    x, kernel, restored = case
    narrow, near = jnp.asarray(kernel, jnp.bfloat16), jnp.asarray(restored, jnp.bfloat16)
    error = jax.jit(output_error)(narrow, near, x.T @ x)
    assert error.dtype == jnp.float32
    wide = output_error(narrow.astype(jnp.float32), near.astype(jnp.float32), x.T @ x)
    np.testing.assert_allclose(error, wide, rtol=1e-6)
