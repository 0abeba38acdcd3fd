"""Residuals of programs, against those counted by hand."""

import jax
import jax.numpy as jnp
import pytest

from qtale_jax.planning.residuals import distinct_bytes, kept_bytes


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda a, b: (jnp.sum(jnp.sin(a) * b), None), 4 * 6),  # cos(a); b was given
        (lambda a, b: (jnp.sum(a * b), None), 0),
        (lambda a, b: (jnp.sum(jax.checkpoint(lambda x: jnp.sin(jnp.sin(x)))(a) * b), None), 0),
        (lambda a, b: (jnp.sum(jnp.sin(jnp.sin(a)) * b), None), 2 * 4 * 6),
    ],
)
def test_what_is_kept_for_the_backward_pass(function, kept):
    assert kept_bytes(function, array(6), array(6)) == kept


def scanned(step):
    """A loss of six turns of `step`, which takes the carry and the weights of a turn."""

    def loss(weights, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jax.jit(step)(x, w), None), x, weights)[0]), None

    return loss


@pytest.mark.parametrize(
    ("step", "kept", "distinct"),
    [
        (lambda x, w: x @ w, 6 * 32, 0),  # the carry, which a turn is given
        (lambda x, w: jnp.sin(x @ w), 6 * (32 + 32), 6 * 32),  # and the cosine
        # The carry; of the first product its cosine, and its sine in bfloat16, which the second product reads; w in
        # bfloat16 is a form of what a turn is given.
        (
            lambda x, w: jnp.matmul(
                jnp.sin(x @ w).astype(jnp.bfloat16), w.astype(jnp.bfloat16), preferred_element_type=jnp.float32
            ),
            6 * (32 + 32 + 16 + 32),
            6 * (32 + 16),
        ),
    ],
)
def test_a_turn_that_is_computed_again_has_the_same_numbers_once(step, kept, distinct):
    arguments = array(6, 4, 4), array(2, 4)
    assert kept_bytes(scanned(step), *arguments) == kept
    assert distinct_bytes(scanned(step), *arguments) == distinct
