"""From next-token logits to a token: greedy, temperature, nucleus."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


def nucleus(logits: Float[Array, "b v"], top_p: Float[Array, ""]) -> Float[Array, "b v"]:
    """Hides all but the smallest set of likeliest tokens whose probability reaches `top_p` (Holtzman et al., 2020)."""
    ordered = -jnp.sort(-logits, axis=-1)
    cumulative = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1)
    # A token stays when the mass before it is below top_p, so the most likely one always does.
    kept = jnp.sum(cumulative - jax.nn.softmax(ordered, axis=-1) < top_p, axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(ordered, kept - 1, axis=-1)
    return jnp.where(logits >= cutoff, logits, -jnp.inf)


def sample(
    logits: Float[Array, "b v"],
    keys: PRNGKeyArray,
    temperature: Float[Array, ""],
    top_p: Float[Array, ""],
) -> Int[Array, " b"]:
    """One token per row, int32; greedy where temperature is 0. `keys` has one key per row."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = nucleus(logits / jnp.maximum(temperature, 1e-6), top_p)
    drawn = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)
    return jnp.where(temperature > 0, drawn, greedy)
