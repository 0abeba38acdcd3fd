"""All layers for some tokens of every row, skipping what does not execute: the middle of prefill and of decode."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from qtale_jax.inference.paged_attention import Kept
from qtale_jax.inference.pages import PagedCache
from qtale_jax.inference.skipping import ROW_SHARES, ROWS, TOKEN_SHARES, TOKENS, run_compact, sizes
from qtale_jax.models.context import Context
from qtale_jax.models.decoder import Parameters, skeleton
from qtale_jax.models.forward import embed, merge, route
from qtale_jax.models.policy import Dense, Fixed, Policy, Thresholded
from qtale_jax.models.rotary import rotary_tables
from qtale_jax.models.specification import ModelSpecification


def at_positions(policy: Policy, positions: Int32[Array, "b t"]) -> Policy:
    """The policy for tokens at `positions`: given masks are indexed by them, the others do not depend on them.

    Raises:
        ValueError: a policy of training, which samples or looks at later tokens.
    """
    if isinstance(policy, Fixed):
        return Fixed(jnp.take_along_axis(policy.execute, positions[:, :, None], axis=1, mode="clip"))
    if not isinstance(policy, Dense | Thresholded):
        raise ValueError(f"the skipping engine takes Dense, Thresholded or Fixed, found {type(policy).__name__}")
    return policy


def advance(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int32[Array, "b t"],
    positions: Int32[Array, "b t"],
    present: Bool[Array, "b t"],
    cache: PagedCache,
    policy: Policy,
    compute_dtype: jnp.dtype,
) -> tuple[Float[Array, "b t d"], Bool[Array, "b t l"], PagedCache]:
    """Runs tokens against what is kept of those before them: decode where t is 1, otherwise prefill.

    The cache is read by all layers and written once, after the last: a branch that wrote it would have to hand it on,
    and the compiler would copy it for those that do not.

    Returns:
        Hidden states, executed layers, the cache with the tokens' keys and values.
    """
    axis, shares = (ROWS, ROW_SHARES) if tokens.shape[1] == 1 else (TOKENS, TOKEN_SHARES)
    programs = sizes(tokens.shape[axis], shares)
    policy = at_positions(policy, positions)
    # Routers look at tokens, positions and padding; what a query sees is the pages' business.
    nothing = jnp.zeros((*tokens.shape, 0), jnp.bool_)
    context = Context(rotary_tables(spec.architecture, positions), nothing, nothing, present, tokens, positions)
    initial = positions < (spec.routing.always_on_tokens if spec.routing else 0)
    hidden = embed(spec, params, tokens, compute_dtype)
    always_on = spec.architecture.num_layers - len(spec.routed_layers)
    decisions, written = [], []
    for layer in range(spec.architecture.num_layers):
        block = merge(skeleton(spec).layers[layer], params["layers"][layer])
        execute, _, _ = route(block, hidden, context, initial, policy, layer - always_on, layer)
        kept = Kept(cache.pool, cache.table[layer], cache.counts[layer])
        hidden, fresh = run_compact(
            block, hidden, positions, present, execute, kept, axis=axis, sizes=programs, layer=layer
        )
        decisions.append(execute)
        written.append(fresh)
    fresh = jax.tree.map(lambda *leaves: jnp.stack(leaves), *written)
    return hidden, jnp.stack(decisions, axis=2), cache.append(fresh.key, fresh.value, fresh.positions, fresh.kept)
