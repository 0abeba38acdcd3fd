"""Generation with a KV cache: prefill, then the whole decode loop inside one compiled function.

Execution is masked, as in `models.forward`; a layer that no row of the batch executes is skipped for real.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from qtale_jax.inference.rows import is_end
from qtale_jax.inference.sampling import sample
from qtale_jax.models.cache import LayerCache, empty_cache
from qtale_jax.models.context import Context
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import embed, run_layers, unembed
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import ModelSpecification


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """New tokens (batch, new) int32, how many of them count, and what prompt and new tokens executed."""

    tokens: Int[Array, "b n"]
    counts: Int[Array, " b"]
    prompt_execute: Bool[Array, "b p l"]
    new_execute: Bool[Array, "b n l"]


def empty_caches(spec: ModelSpecification, batch: int, slots: int, dtype: jnp.dtype) -> dict[int, LayerCache]:
    """Caches in which nothing is kept; fresh for every call, so nothing of an earlier one can be seen.

    Args:
        spec: the model.
        batch: rows.
        slots: tokens per row, prompt and new ones.
        dtype: of keys and values: a floating-point type, or int8 (one float32 scale per token and KV head).

    Raises:
        ValueError: another type.
    """
    shape = spec.architecture
    return {
        layer: empty_cache(batch, slots, shape.num_kv_heads, shape.head_dim, dtype) for layer in range(shape.num_layers)
    }


def advance(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int[Array, "b t"],
    positions: Int[Array, "b t"],
    present: Bool[Array, "b t"],
    caches: dict[int, LayerCache],
    policy: Policy,
    compute_dtype: jnp.dtype,
) -> tuple[Array, Bool[Array, "b t l"], dict[int, LayerCache]]:
    """Runs tokens at their positions against the caches: prefill with many, decode with one.

    Returns:
        Hidden states, executed layers, caches with the tokens' keys and values.
    """
    slot = jnp.arange(caches[0].kept.shape[1], dtype=jnp.int32)[None, None, :]
    at = positions[:, :, None]
    context = Context.of(spec.architecture, slot <= at, slot == at, present, tokens, positions)
    always_on_tokens = spec.routing.always_on_tokens if spec.routing else 0
    hidden = embed(spec, params, jnp.maximum(tokens, 0), compute_dtype)
    hidden, routing, _, caches = run_layers(spec, params, hidden, context, positions < always_on_tokens, policy, caches)
    return hidden, routing.execute, caches


@functools.partial(jax.jit, static_argnames=("spec", "max_new_tokens", "compute_dtype", "cache_dtype"))
def generate(
    spec: ModelSpecification,
    params: Parameters,
    prompts: Int[Array, "b p"],
    lengths: Int[Array, " b"],
    policy: Policy,
    key: PRNGKeyArray,
    temperature: Array,
    top_p: Array,
    stop_ids: Int[Array, "..."],
    *,
    max_new_tokens: int,
    compute_dtype: jnp.dtype = jnp.float32,
    cache_dtype: jnp.dtype | None = None,
) -> Generated:
    """Continues right-padded prompts until one of `stop_ids` or `max_new_tokens`.

    Args:
        spec: the model (`spec.structure`, so that theta does not recompile); static.
        params: one tree per layer.
        prompts: int32, right-padded.
        lengths: real tokens per prompt, at least 1.
        policy: route policy, `Dense` or `Thresholded`.
        key: seed of sampling; row i uses key folded with i.
        temperature: 0 for greedy.
        top_p: nucleus mass.
        stop_ids: the token that ends a row, or several; it is counted; -1: none.
        max_new_tokens: static size of the result.
        compute_dtype: type of activations.
        cache_dtype: type of cached keys and values, floating point or int8; default: `compute_dtype`. An element on the
            border of two integers may fall either way when it is computed among another number of rows or tokens, as
            its last bits may then differ: what follows can move by up to what rounding costs.

    Raises:
        ValueError: `cache_dtype` is another type.
    """
    batch, width = prompts.shape
    layers = spec.architecture.num_layers
    dtype = jnp.dtype(compute_dtype)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    positions = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32)[None, :], prompts.shape)
    caches = empty_caches(spec, batch, width + max_new_tokens, dtype if cache_dtype is None else cache_dtype)
    hidden, prompt_execute, caches = advance(
        spec, params, prompts, positions, positions < lengths[:, None], caches, policy, dtype
    )
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)

    def choose(hidden: Array, step: Array) -> Array:
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        return sample(unembed(spec, params, hidden)[:, 0], step_keys, temperature, top_p)

    def unfinished(carry):
        step, _, done, *_ = carry
        return (step < max_new_tokens) & ~jnp.all(done)

    def one(carry):
        step, token, done, counts, tokens, execute, caches = carry
        tokens = tokens.at[:, step].set(jnp.where(done, -1, token))
        counts = counts + (~done).astype(jnp.int32)
        done = done | is_end(token, jnp.ravel(stop_ids))
        # The last token that is returned is never run: nothing would come after it.
        at = (lengths + step)[:, None]
        hidden, taken, caches = advance(spec, params, token[:, None], at, ~done[:, None], caches, policy, dtype)
        execute = execute.at[:, step].set(taken[:, 0])
        return step + 1, choose(hidden, step + 1), done, counts, tokens, execute, caches

    start = (
        jnp.int32(0),
        choose(last, jnp.int32(0)),
        jnp.zeros((batch,), jnp.bool_),
        jnp.zeros((batch,), jnp.int32),
        jnp.full((batch, max_new_tokens), -1, jnp.int32),
        jnp.zeros((batch, max_new_tokens, layers), jnp.bool_),
        caches,
    )
    _, _, _, counts, tokens, new_execute, _ = jax.lax.while_loop(unfinished, one, start)
    return Generated(tokens, counts, prompt_execute, new_execute)
