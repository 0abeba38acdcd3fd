"""Turning a dense model into one that can be fine-tuned: fresh routers and adapters beside existing weights."""

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Block, Parameters, skeleton
from qtale_jax.models.specification import LoraSpecification, ModelSpecification, RoutingSpecification
from qtale_jax.models.stacking import stacks


def _missing(wanted: Parameters, existing: Parameters) -> Parameters:
    """The part of `wanted` that `existing` lacks."""
    out = {}
    for name, value in wanted.items():
        if isinstance(value, dict):
            part = _missing(value, existing.get(name, {}))
            out |= {name: part} if part else {}
        elif name not in existing:
            out[name] = value
    return out


def _select(tree: Parameters, like: Parameters) -> Parameters:
    """The leaves of `tree` at the paths of `like`."""
    return {name: _select(tree[name], value) if isinstance(value, dict) else tree[name] for name, value in like.items()}


def _fill(fresh: Parameters, existing: Parameters) -> Parameters:
    """The union of two trees without common leaves."""
    out = dict(existing)
    for name, value in fresh.items():
        out[name] = _fill(value, existing.get(name, {})) if isinstance(value, dict) else value
    return out


def adapt(
    spec: ModelSpecification,
    params: Parameters,
    routing: RoutingSpecification | None,
    lora: LoraSpecification | None,
    key: PRNGKeyArray,
) -> tuple[ModelSpecification, Parameters]:
    """Adds routers and adapters; what the model already has is kept (routers of an earlier fine-tune continue).

    Args:
        spec: a model; a quantized one keeps its weights and can only get routers.
        params: its parameters, one tree per layer.
        routing: routing to use; None: the model stays as it is, routed or not.
        lora: adapters to add; None: none.
        key: seed of the fresh parameters, folded with the layer.

    Returns:
        The new specification and parameters.

    Raises:
        InputError: adapters for a quantized model, or one that is routed with other always-on layers or router width.
    """
    if spec.quantization is not None and lora is not None:
        raise InputError("a quantized model takes no adapters, which could not be merged into it")
    if routing is not None and spec.routing is not None:
        for name in ("always_on_layers", "router_hidden"):
            found, asked = getattr(spec.routing, name), getattr(routing, name)
            if found != asked:
                raise InputError(f"routing.{name}={asked}, but the model to start from was routed with {name}={found}")
    if routing is not None and routing.always_on_layers >= spec.architecture.num_layers:
        layers = spec.architecture.num_layers
        raise InputError(
            f"routing.always_on_layers={routing.always_on_layers} leaves no routed layer of {layers}; "
            f"allowed: 0 to {layers - 1}"
        )
    new = spec.model_copy(update={"routing": routing or spec.routing, "lora": lora})
    layers = {}
    for kind in stacks(new).values():
        wanted = nnx.to_pure_dict(nnx.state(skeleton(new).layers[kind[0]]))
        make = _maker(new, kind[0], _missing(wanted, params["layers"][kind[0]]))
        for layer in kind:
            layers[layer] = _fill(make(jax.random.fold_in(key, layer)), params["layers"][layer])
    return new, {**params, "layers": dict(sorted(layers.items()))}


def _maker(spec: ModelSpecification, layer: int, missing: Parameters):
    """Compiles the initialisation of only the `missing` leaves: a 7B block is not drawn to be thrown away."""

    @jax.jit
    def make(key: PRNGKeyArray) -> Parameters:
        return _select(nnx.to_pure_dict(nnx.state(Block(spec, layer, rngs=nnx.Rngs(key)))), missing)

    return make
