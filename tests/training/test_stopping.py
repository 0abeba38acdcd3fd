"""How far the host may run ahead of the devices."""

import jax
import jax.numpy as jnp

from qtale_jax.training.stopping import RunAhead


def test_the_host_waits_for_the_step_before_the_last_two():
    """Each step needs the one before; together they take far longer than to dispatch them."""
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 100, lambda _, x: x @ x, x))
    x, ahead, results = jnp.eye(500), RunAhead(), []
    step(x).block_until_ready()
    for _ in range(6):
        x = step(x)
        ahead.dispatched(x)
        results.append(x)
        assert all(result.is_ready() for result in results[:-2])
    for _ in range(6):
        x = step(x)
    assert not x.is_ready()  # without it the host is far ahead
