"""Prefill that skips: prompts run in chunks of one static width, and a layer sees only the tokens that execute it."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from qtale_jax.inference.advance import advance
from qtale_jax.inference.pages import PagedCache
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import ModelSpecification


@functools.partial(jax.jit, static_argnames=("spec", "compute_dtype"), donate_argnames=("cache", "last"))
def prefill(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int32[Array, "r w"],
    start: Int32[Array, ""],
    lengths: Int32[Array, " r"],
    rows: Int32[Array, " r"],
    cache: PagedCache,
    last: Float[Array, "r d"],
    policy: Policy,
    *,
    compute_dtype: jnp.dtype = jnp.float32,
) -> tuple[PagedCache, Float[Array, "r d"], Bool[Array, "r w l"]]:
    """Runs the part of right-padded prompts that begins at `start`.

    Args:
        spec: the model (`spec.structure`); static.
        params: one tree per layer.
        tokens: ids at positions start, start + 1, ...
        start: position of the first column.
        lengths: tokens of the whole prompts; what is beyond them is padding.
        rows: the rows of the cache that the prompts belong to; what the cache has of them stands before `start`.
        cache: with enough unused pages.
        last: hidden state of each prompt's last token as far as it has been seen.
        policy: route policy.
        compute_dtype: type of activations.

    Returns:
        The cache with the tokens' keys and values, `last` where the last token was among them, executed layers.
    """
    width = tokens.shape[1]
    positions = start + jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], tokens.shape)
    present = positions < lengths[:, None]
    part = cache.rows(rows)
    hidden, execute, part = advance(spec, params, tokens, positions, present, part, policy, jnp.dtype(compute_dtype))
    at = lengths - 1 - start
    found = jnp.take_along_axis(hidden, at[:, None, None], axis=1, mode="clip")[:, 0]
    last = jnp.where(((at >= 0) & (at < width))[:, None], found, last)
    return cache.with_rows(rows, part), last, execute
