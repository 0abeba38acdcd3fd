"""Which parameters train, and AdamW with the published schedule over them.

Trainable parameters live in a flat dict "path/of/leaf" -> array, apart from the frozen ones: gradients and optimizer
state exist only for what trains.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from qtale_jax.config.schema import OptimizerConfig
from qtale_jax.models.decoder import Parameters

Flat = dict[str, Any]


def flatten(params: Parameters) -> Flat:
    """Nested dict -> {"layers/routed/router/hidden/kernel": leaf}; all keys are strings in the stacked layout."""
    return traverse_util.flatten_dict(params, sep="/")


def nest(*parts: Flat) -> Parameters:
    """Joins flat dicts into the nested one."""
    return traverse_util.unflatten_dict({name: leaf for part in parts for name, leaf in part.items()}, sep="/")


def is_router(path: str) -> bool:
    """Whether a leaf belongs to a router."""
    return "/router/" in path


def is_trainable(path: str, parameters: str) -> bool:
    """Whether `train.parameters` ("adapters", "routers", "all") trains the leaf at `path`."""
    return parameters == "all" or is_router(path) or (parameters == "adapters" and "/lora/" in path)


def partition(params: Parameters, parameters: str) -> tuple[Flat, Flat]:
    """Splits parameters into (trainable, frozen)."""
    flat = flatten(params)
    trainable = {path: leaf for path, leaf in flat.items() if is_trainable(path, parameters)}
    return trainable, {path: leaf for path, leaf in flat.items() if path not in trainable}


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup` of the steps, then half a cosine to 0, or constant."""
    warmup = round(config.warmup * steps)
    if config.schedule == "cosine":
        tail = optax.cosine_decay_schedule(config.learning_rate, max(steps - warmup, 1))
    else:
        tail = optax.constant_schedule(config.learning_rate)
    # The first update already moves: step 0 has rate peak / warmup rather than 0.
    ramp = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    return optax.join_schedules([ramp, tail], [warmup]) if warmup else tail


def decays(path: str, leaf: jax.Array) -> bool:
    """Weight decay applies to matrices; the leading axis of a stack does not make a vector one."""
    return leaf.ndim - path.startswith("layers/") > 1


def build_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, AdamW, routers at their own peak rate."""
    ratio = (config.router_learning_rate or config.learning_rate) / config.learning_rate

    def scale_routers(updates: Any, _params: Any = None) -> Flat:
        return {path: update * ratio if is_router(path) else update for path, update in updates.items()}

    def mask(params: Flat) -> dict[str, bool]:
        return {path: decays(path, leaf) for path, leaf in params.items()}

    return _promoting(
        optax.clip_by_global_norm(config.clip) if config.clip else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask),
        optax.stateless(scale_routers),
        optax.scale_by_learning_rate(learning_rate_schedule(config, steps)),
    )


def _promoting(*parts: optax.GradientTransformation) -> optax.GradientTransformation:
    """Chains transformations and updates under standard promotion: Optax mixes floats with integer step counts."""
    chain = optax.chain(*parts)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(chain.init, update)


def optimizer_shardings(optimizer: optax.GradientTransformation, abstract: Flat, shardings: Flat, other: Any) -> Any:
    """Sharding of the optimizer state: moments like their parameters, everything else `other`."""
    state = jax.eval_shape(optimizer.init, abstract)
    return optax.tree_utils.tree_map_params(
        optimizer, lambda _, sharding: sharding, state, shardings, transform_non_params=lambda _: other
    )
