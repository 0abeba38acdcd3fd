"""The forward pass: pure functions over a nested dict of arrays, for any route policy and either parameter layout.

This is masked execution: every layer is computed for every token and its result kept where the token executes. It is
the reference that anything which really skips is tested against, as training does on request (`models.skipping`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from qtale_jax.models.attention import softcapped
from qtale_jax.models.compact_gradient import KEPT, Function, compacted
from qtale_jax.models.context import Context
from qtale_jax.models.decoder import LayerCache, Parameters, skeleton
from qtale_jax.models.policy import Dense, ExpertChoice, Policy, Sampled, decide, probability
from qtale_jax.models.router import hashed_logits
from qtale_jax.models.skipping import Selection, Skipping, weighted
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.models.stacking import is_stacked, stacks
from qtale_jax.parallel.axes import constrain
from qtale_jax.quantization.linear import linear

Remat = Literal["none", "dots", "full"]
Module = TypeVar("Module", bound=nnx.Module)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """What was decided: logits (batch, length, routed layers, 2), execute (batch, length, layers).

    `execute` includes always-on layers and tokens; padding executes nothing.
    """

    logits: Float[Array, "b t r 2"]
    execute: Bool[Array, "b t l"]

    @property
    def probability(self) -> Float[Array, "b t r"]:
        """Execute probability of every routed layer, float32."""
        return probability(self.logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """Next-token logits (batch, length, vocabulary) float32, and the routing behind them."""

    logits: Float[Array, "b t v"]
    routing: Routing
    gates: Float[Array, "b t r"] | None = None
    """Gate of every routed layer with its straight-through gradient; None unless the policy samples."""


def positions_of(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Position of each token within its segment; segments are runs of equal ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.concatenate(
        [jnp.ones_like(segment_ids[:, :1], jnp.bool_), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)


def context_of(
    spec: ModelSpecification, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"]
) -> tuple[Context, Bool[Array, "b t"]]:
    """What layers need to know about whole sequences, and the tokens that execute every layer.

    Args:
        spec: the model.
        tokens: int32; negative ids are padding.
        segment_ids: 0 for padding and equal ids for one example; examples do not see each other.
    """
    positions = positions_of(segment_ids)
    present = (segment_ids > 0) & (tokens >= 0)
    index = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    earlier = index[None, :, None] >= index[None, None, :]
    causal = (segment_ids[:, :, None] == segment_ids[:, None, :]) & present[:, None, :] & earlier
    own = jnp.broadcast_to(index[None, :, None] == index[None, None, :], causal.shape)
    always_on_tokens = spec.routing.always_on_tokens if spec.routing else 0
    context = Context.of(spec.architecture, causal, own, present, tokens, positions, keys=positions)
    return context, positions < always_on_tokens


def merge(module: Module, params: Parameters) -> Module:
    """The module with the given parameters in the place of its own."""
    return nnx.merge(nnx.graphdef(module), params)


def embed(
    spec: ModelSpecification, params: Parameters, tokens: Int[Array, "b t"], dtype: jnp.dtype
) -> Float[Array, "b t d"]:
    """Looks tokens up in the embedding table; padding ids (negative) read row 0, as beyond the table there is NaN."""
    hidden = merge(skeleton(spec).embedding, params["embedding"])(jnp.maximum(tokens, 0)).astype(dtype)
    if spec.architecture.scaled_embedding:  # by a factor rounded to the type, as such models were trained
        hidden = hidden * jnp.asarray(spec.architecture.hidden_size**0.5, dtype)
    return constrain(hidden, "batch", "length", "activation_embed")


def unembed(spec: ModelSpecification, params: Parameters, hidden: Float[Array, "b t d"]) -> Float[Array, "b t v"]:
    """Final norm and head; logits in float32, capped where the architecture caps them."""
    hidden = merge(skeleton(spec).final_norm, params["final_norm"])(hidden)
    if spec.architecture.tied_head:
        weight = merge(skeleton(spec).embedding, params["embedding"]).head()
    else:
        weight = merge(skeleton(spec).head, params["head"]).weight()
    logits = softcapped(linear(hidden, weight, jnp.float32), spec.architecture.logit_softcap)
    return constrain(logits, "batch", "length", "activation_vocab")


def route(block, hidden, context, initial, policy, routed, layer):
    """Decides one layer: (execute, gate or None, router logits or None)."""
    if not block.routed:
        return context.present, None, None
    if hasattr(block, "router"):
        logits = block.router(hidden)
    else:
        logits = hashed_logits(context.tokens, context.positions, layer)
    execute, gate = decide(policy, logits, routed, layer, context.present & ~initial)
    return (execute | initial) & context.present, None if gate is None else jnp.where(initial, 1.0, gate), logits


def _run_block(
    params,
    hidden,
    cache,
    *,
    layer,
    routed,
    kind,
    conditional,
    spec,
    context,
    initial,
    policy,
    dropout_key,
    transform,
    skipping,
    remat,
):
    """One layer: route, run, keep. `layer` and `routed` may be traced; `kind` is a static layer of its make."""
    params = transform(params, layer) if transform else params
    block = merge(skeleton(spec).layers[kind], params)
    execute, gate, logits = route(block, hidden, context, initial, policy, routed, layer)
    key = None if dropout_key is None else jax.random.fold_in(dropout_key, layer)
    seen = context.at_layer(spec.architecture, layer)

    through_eviction = isinstance(policy, Sampled | ExpertChoice) and policy.eviction_gradient

    if skipping is not None and gate is not None:
        key_of_layer = jax.random.fold_in(skipping.key, layer)
        selection = Selection.of(execute, seen.present, skipping.share, key_of_layer)
        some = _checkpointed(_block_of_some(spec, kind, through_eviction), "dots" if remat == "dots" else "none", (0,))
        router, shared = ({name: params[name] for name in params if (name == "router") == of} for of in (True, False))
        rest = (router, seen, execute, key)
        hidden = compacted(some, selection, shared, hidden, weighted(gate, selection.weight), rest)
        return constrain(hidden, "batch", "length", "activation_embed"), cache, (logits, execute, gate)

    def run():
        return block(hidden, seen, execute, gate, cache, key, through_eviction)

    # Besides saving the layer that no token executes, the branch is a boundary for the compiler: how a mask came about
    # cannot change how the block is compiled, so a routed model at theta = 0 equals the dense one bit for bit.
    # Without eviction a skipped token leaves its keys in the cache, so the block has to run for them.
    if conditional and gate is None and (cache is None or block.eviction):
        hidden, cache = jax.lax.cond(jnp.any(execute), run, lambda: (hidden, cache))
    else:
        hidden, cache = run()
    return constrain(hidden, "batch", "length", "activation_embed"), cache, (logits, execute, gate)


def _block_of_some(spec: ModelSpecification, kind: int, through_eviction: bool) -> Function:
    """The block for the tokens that are taken, as `compacted` calls it."""

    def run(take, shared, hidden, gate, rest):
        router, context, execute, key = rest
        block = merge(skeleton(spec).layers[kind], shared | router)
        return block(hidden, context.taken(take), take(execute), gate, None, key, through_eviction)[0]

    return run


def _checkpointed(function, remat: Remat, static: tuple[int, ...] = ()):
    if remat == "none":
        return function
    policies = jax.checkpoint_policies
    saved = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(KEPT)
    )
    return jax.checkpoint(function, policy=saved if remat == "dots" else None, prevent_cse=False, static_argnums=static)


def run_layers(
    spec: ModelSpecification,
    params: Parameters,
    hidden: Float[Array, "b t d"],
    context: Context,
    initial: Bool[Array, "b t"],
    policy: Policy,
    caches: dict[int, LayerCache] | None = None,
    dropout_key: PRNGKeyArray | None = None,
    remat: Remat = "none",
    layer_transform: Callable[[Parameters, Array | int], Parameters] | None = None,
    skipping: Skipping | None = None,
) -> tuple[Float[Array, "b t d"], Routing, Float[Array, "b t r"] | None, dict[int, LayerCache]]:
    """Runs all layers; scans over stacked parameters, unrolls the other layout (the only one with caches)."""
    always_on = len(stacks(spec).get("always_on", ()))
    run = functools.partial(
        _run_block,
        spec=spec,
        context=context,
        initial=initial,
        policy=policy,
        dropout_key=dropout_key,
        transform=layer_transform,
        skipping=skipping,
        remat=remat,
    )
    records, kept = [], {}
    if is_stacked(params):
        for name, layers in stacks(spec).items():

            def body(carry, inputs, kind=layers[0]):
                layer, layer_params = inputs
                routed = layer - always_on
                out, _, record = run(
                    layer_params, carry, None, layer=layer, routed=routed, kind=kind, conditional=False
                )
                return out, record

            indices = jnp.asarray(layers, jnp.int32)
            hidden, record = jax.lax.scan(_checkpointed(body, remat), hidden, (indices, params["layers"][name]))
            records.append(record)
    else:
        for layer in range(spec.architecture.num_layers):
            one = functools.partial(run, layer=layer, routed=layer - always_on, kind=layer, conditional=True)
            cache = caches[layer] if caches else None
            hidden, cache, record = _checkpointed(one, remat)(params["layers"][layer], hidden, cache)
            records.append(jax.tree.map(lambda leaf: leaf[None], record))
            if cache is not None:
                kept[layer] = cache

    def joined(part: int):
        parts = [jnp.moveaxis(record[part], 0, 2) for record in records if record[part] is not None]
        return jnp.concatenate(parts, axis=2) if parts else None

    logits, execute = joined(0), joined(1)
    assert execute is not None, "every layer decides"
    if logits is None:
        logits = jnp.zeros((*hidden.shape[:2], 0, 2), jnp.float32)
    return hidden, Routing(logits, execute), joined(2), kept


def run_trunk(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int[Array, "b t"],
    *,
    segment_ids: Int[Array, "b t"],
    policy: Policy | None = None,
    compute_dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    dropout_key: PRNGKeyArray | None = None,
    layer_transform: Callable[[Parameters, Array | int], Parameters] | None = None,
    skipping: Skipping | None = None,
) -> tuple[Float[Array, "b t d"], Routing, Float[Array, "b t r"] | None]:
    """Everything before the final norm and the head; arguments as in `forward`.

    With `skipping` a policy that gives gates is not executed masked: layers compute the tokens that execute and a
    sample of the others (`models.skipping`), with the same result up to rounding. It needs eviction.

    Returns:
        Residual stream after the last layer, routing, gates (None unless the policy samples).
    """
    context, initial = context_of(spec, tokens, segment_ids)
    hidden = embed(spec, params, tokens, jnp.dtype(compute_dtype))
    return run_layers(
        spec,
        params,
        hidden,
        context,
        initial,
        policy or Dense(),
        None,
        dropout_key,
        remat,
        layer_transform,
        skipping,
    )[:3]


def forward(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int[Array, "b t"],
    *,
    lengths: Int[Array, " b"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    policy: Policy | None = None,
    compute_dtype: jnp.dtype = jnp.float32,
    remat: Remat = "none",
    dropout_key: PRNGKeyArray | None = None,
    layer_transform: Callable[[Parameters, Array | int], Parameters] | None = None,
) -> Output:
    """Next-token logits for whole sequences.

    Args:
        spec: the model; static under jit.
        params: nested dict, stacked or one tree per layer.
        tokens: int32; negative ids are padding, as are those beyond `lengths` and in segment 0.
        lengths: tokens per row that are not padding (right-padded); default: all.
        segment_ids: for packed rows, 0 for padding and equal ids for one example; excludes `lengths`.
        policy: route policy; default: everything executes.
        compute_dtype: type of activations; routers, norms, softmax and logits are float32 regardless.
        remat: what the backward pass recomputes.
        dropout_key: turns adapter dropout on.
        layer_transform: applied to each layer's parameters and index just before use, inside the scan and its remat.

    Returns:
        Logits and routing.

    Raises:
        ValueError: both lengths and segment_ids are given.
    """
    if lengths is not None and segment_ids is not None:
        raise ValueError("give lengths or segment_ids, not both")
    if segment_ids is None:
        index = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]
        limit = jnp.full((tokens.shape[0],), tokens.shape[1], jnp.int32) if lengths is None else lengths
        segment_ids = (index < limit[:, None]).astype(jnp.int32)
    hidden, routing, gates = run_trunk(
        spec,
        params,
        tokens,
        segment_ids=segment_ids,
        policy=policy,
        compute_dtype=compute_dtype,
        remat=remat,
        dropout_key=dropout_key,
        layer_transform=layer_transform,
    )
    return Output(unembed(spec, params, hidden), routing, gates)
