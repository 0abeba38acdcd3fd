"""Products of programs, against those counted by hand."""

import jax
import jax.numpy as jnp

from qtale_jax.planning.program import Products, products


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def test_a_product_counts_multiply_adds_and_bytes():
    found = products(jnp.matmul, array(3, 5), array(5, 7))
    assert found == Products(2 * 3 * 5 * 7, 4 * (15 + 35 + 21))
    batched = products(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), array(2, 3, 5), array(2, 5, 7))
    assert batched.flops == 2 * 2 * 3 * 5 * 7


def test_loops_branches_and_calls_count():
    weights = array(6, 4, 4)

    def scanned(x, weights):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None))
        return jax.lax.scan(step, x, weights)[0]

    once = 2 * 2 * 4 * 4
    assert products(scanned, array(2, 4), weights).flops == 6 * once
    assert products(jax.jit(scanned), array(2, 4), weights).flops == 6 * once

    def branched(x, w):
        return jax.lax.cond(jnp.sum(x) > 0, lambda: x, lambda: (x @ w) @ w)

    assert products(branched, array(2, 4), array(4, 4)).flops == 2 * once


def test_recomputation_counts():
    def loss(w, x):
        def twice(w, x):
            return jnp.tanh(jnp.tanh(x @ w) @ w)

        return jnp.sum(jax.checkpoint(twice)(w, x))

    one = 2 * 3 * 4 * 4
    # Two forward, one of them again (what comes out of the second product is needed for its tanh), and for each product
    # a gradient of w, for the second one of its input, too.
    assert products(jax.grad(loss), array(4, 4), array(3, 4)).flops == (2 + 2 + 3) * one
