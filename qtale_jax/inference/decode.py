"""Decode that skips: a chunk of the generation loop inside one compiled function, for rows that are independent."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from qtale_jax.inference.advance import advance
from qtale_jax.inference.pages import PagedCache
from qtale_jax.inference.rows import Rows, choose
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import unembed
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import ModelSpecification


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """New tokens (b, n), -1 where a row had ended, what they executed, and the steps that were taken, at most n.

    A row's last token is never run, so it executes nothing.
    """

    tokens: Int32[Array, "b n"]
    execute: Bool[Array, "b n l"]
    steps: Int32[Array, ""]


@functools.partial(jax.jit, static_argnames=("spec",))
def first_token(
    spec: ModelSpecification, params: Parameters, last: Float[Array, "b d"], rows: Rows
) -> Int32[Array, " b"]:
    """The first new token of each row, from the hidden state of its prompt's last one."""
    logits = unembed(spec, params, last[:, None])[:, 0]
    return choose(logits, rows.key, rows.count, rows.temperature, rows.top_p)


@functools.partial(jax.jit, static_argnames=("spec", "chunk", "compute_dtype"), donate_argnames=("cache", "rows"))
def decode(
    spec: ModelSpecification,
    params: Parameters,
    cache: PagedCache,
    rows: Rows,
    policy: Policy,
    *,
    chunk: int,
    compute_dtype: jnp.dtype = jnp.float32,
) -> tuple[PagedCache, Rows, Chunk]:
    """Up to `chunk` new tokens per row; ends early when all rows are done, or when the pool might have too few pages.

    Args:
        spec: the model (`spec.structure`, so that theta does not recompile); static.
        params: one tree per layer.
        cache: what the rows keep.
        rows: their state.
        policy: route policy.
        chunk: static width of the result.
        compute_dtype: type of activations.
    """
    dtype = jnp.dtype(compute_dtype)
    batch, layers = rows.token.shape[0], spec.architecture.num_layers

    def more(carry) -> Array:
        step, cache, rows, _, _ = carry
        fits = cache.used + cache.needed(1, ~rows.done) <= cache.pool.pages
        return (step < chunk) & ~jnp.all(rows.done) & fits

    def one(carry):
        step, cache, rows, tokens, execute = carry
        tokens = tokens.at[:, step].set(jnp.where(rows.done, -1, rows.token))
        count = rows.count + (~rows.done).astype(jnp.int32)
        done = rows.done | rows.at_end | (count >= rows.limit)
        hidden, taken, cache = advance(
            spec, params, rows.token[:, None], rows.position[:, None], ~done[:, None], cache, policy, dtype
        )
        execute = execute.at[:, step].set(taken[:, 0])
        logits = unembed(spec, params, hidden)[:, 0]
        token = choose(logits, rows.key, count, rows.temperature, rows.top_p)
        rows = dataclasses.replace(
            rows,
            token=jnp.where(done, rows.token, token),
            position=rows.position + (~done).astype(jnp.int32),
            count=count,
            done=done,
        )
        return step + 1, cache, rows, tokens, execute

    tokens = jnp.full((batch, chunk), -1, jnp.int32)
    execute = jnp.zeros((batch, chunk, layers), jnp.bool_)
    steps, cache, rows, tokens, execute = jax.lax.while_loop(more, one, (jnp.int32(0), cache, rows, tokens, execute))
    return cache, rows, Chunk(tokens, execute, steps)
