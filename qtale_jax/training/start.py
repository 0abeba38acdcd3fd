"""From a configuration to everything a run needs: model, parameters on the mesh, optimizer, initial state."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from qtale_jax.artifact import load_model, read_model_json
from qtale_jax.config.schema import ArchitectureConfig, Config, RopeScalingConfig
from qtale_jax.data.tokens import load_tokenizer
from qtale_jax.errors import InputError
from qtale_jax.models.adapt import adapt
from qtale_jax.models.decoder import Parameters, abstract_parameters, initialize
from qtale_jax.models.lora import merge_lora
from qtale_jax.models.placement import layer_shardings, stack_on_mesh, stacked_shardings
from qtale_jax.models.specification import (
    LINEARS,
    Architecture,
    LinearScaling,
    LoraSpecification,
    ModelSpecification,
    RopeScaling,
    RoutingSpecification,
)
from qtale_jax.models.stacking import can_stack, stack_layers
from qtale_jax.parallel.mesh import replicated
from qtale_jax.quantization.rounding import validate
from qtale_jax.training.aim import routed_share
from qtale_jax.training.dropping import drop_layers, layers_to_keep
from qtale_jax.training.optimizer import Flat, flatten, optimizer_shardings, partition
from qtale_jax.training.quantization_aware import formats_of
from qtale_jax.training.step import TrainState, initial_state

TRAINED = jnp.dtype(jnp.float32)
"""Type of what trains: bfloat16 weights would swallow small updates."""


@dataclass
class Start:
    """The starting point of a run; arrays are stacked, sharded and split into what trains and what does not.

    `inherited` is the provenance of the model it starts from.
    """

    spec: ModelSpecification
    tokenizer: Any
    trainable: Flat
    frozen: Flat
    shardings: Flat
    inherited: dict[str, Any]


def architecture_from(config: ArchitectureConfig, vocab_size: int) -> Architecture:
    """Fills the defaults that depend on other keys.

    Raises:
        InputError: vocab_size is smaller than the tokenizer's.
    """
    if config.vocab_size is not None and config.vocab_size < vocab_size:
        raise InputError(
            f"model.architecture.vocab_size={config.vocab_size} does not match the tokenizer, "
            f"which needs {vocab_size} or more"
        )
    fields = config.model_dump(exclude={"vocab_size", "num_kv_heads", "head_dim", "rope_scaling"})
    return Architecture(
        **fields,
        vocab_size=config.vocab_size or vocab_size,
        num_kv_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_heads,
        rope_scaling=_scaling_from(config.rope_scaling) if config.rope_scaling else None,
    )


def _scaling_from(config: RopeScalingConfig) -> RopeScaling | LinearScaling:
    if config.kind == "linear":
        return LinearScaling(factor=config.factor)
    return RopeScaling(**config.model_dump())


def routing_from(config: Config, num_layers: int) -> RoutingSpecification | None:
    """The static half of the routing section; None for dense."""
    routing = config.routing
    if routing.method == "dense":
        return None
    names = ("method", "always_on_layers", "always_on_tokens", "router_hidden", "counting", "target", "eviction")
    theta, router = routing.threshold, "learned"
    if routing.method == "random":  # its p is uniform, so the share it is trained at says what theta has to be
        with jax.ensure_compile_time_eval():  # dry runs trace this
            theta = 1 - float(routed_share(routing.target, num_layers, routing.always_on_layers, routing.counting))
        router = "hashed"
    thresholds = {}
    if theta != 0.5:
        layers = num_layers - routing.always_on_layers
        thresholds = {str(bits): (theta,) * layers for bits in (16, 8, 4, 3, 2)}
    given = {name: getattr(routing, name) for name in names}
    return RoutingSpecification(**given, router=router, thresholds=thresholds)


def starting_model(
    config: Config, mesh: Mesh, key: jax.Array
) -> tuple[ModelSpecification, Parameters, Any, dict[str, Any]]:
    """Loads the parent or initialises at random, then adds routers and adapters; one tree per layer.

    Arrays of a parent go from disk straight into their shards on the mesh.
    """
    if config.model.path is not None:
        parent_spec = read_model_json(config.model.path).spec
        loaded = load_model(config.model.path, shardings=layer_shardings(parent_spec, mesh))
        spec, params = merge_lora(loaded.spec, loaded.params)
        tokenizer = loaded.tokenizer
        inherited = loaded.provenance
        if tokenizer is None:
            raise InputError(f"model.path={config.model.path}: the model directory has no tokenizer")
        check_quantized(config, spec)
        if config.model.drop.keep < 1:
            spec, params = drop_layers(spec, params, layers_to_keep(config, spec, params, tokenizer))
    else:
        tokenizer = load_tokenizer(config.model.tokenizer)
        architecture = architecture_from(config.model.architecture, len(tokenizer))
        spec = ModelSpecification(architecture=architecture, dtype=config.model.dtype)
        params, inherited = initialize(spec, jax.random.fold_in(key, 0)), {}
    spec, params = extended(config, spec, params, jax.random.fold_in(key, 1))
    return spec, params, tokenizer, inherited


def extended(
    config: Config, spec: ModelSpecification, params: Parameters, key: jax.Array
) -> tuple[ModelSpecification, Parameters]:
    """The model with the routers and adapters that the configuration asks for; also under `jax.eval_shape`.

    Raises:
        InputError: rows longer than the model's context, or routing that does not go with the model's.
    """
    if config.data.length > spec.architecture.max_length:
        raise InputError(
            f"data.length={config.data.length} is longer than the model's context, "
            f"{spec.architecture.max_length} tokens"
        )
    _check_formats(config, spec.architecture)
    lora = None
    if config.lora is not None and config.train.parameters == "adapters":
        lora = LoraSpecification(**config.lora.model_dump())
    # Gradients go through the products with stored weights, and the kernels have none.
    spec = spec.model_copy(update={"kernels": "xla"})
    layers = spec.architecture.num_layers
    _check_routed(config, layers)
    found = adapt(spec, params, routing_from(config, layers), lora, key)
    _check_target(config, layers)
    return found


def check_quantized(config: Config, spec: ModelSpecification) -> None:
    """Of a quantized model only the routers can train, over weights that stay as they are stored."""
    if spec.quantization is None:
        return
    found = f"model.path={config.model.path} is quantized"
    if config.train.parameters != "routers":
        raise InputError(
            f"{found}, so only its routers can be trained; allowed: train.parameters=routers, "
            "or the model that it was made of"
        )
    if config.train.quantization_aware.formats:
        raise InputError(f"{found} already; allowed: train.quantization_aware.formats=[]")
    if any(name.endswith("/router") for name in spec.quantization.formats):
        raise InputError(f"{found}, its routers too, so they cannot be trained; allowed: quantize.router_bits=16")
    if not can_stack(spec):
        raise InputError(f"{found} in different formats from layer to layer, which training cannot stack")


def _check_routed(config: Config, layers: int) -> None:
    """Some layer and some token are routed."""
    routing = config.routing
    if routing.method == "dense":
        return
    always = routing.always_on_layers
    if always >= layers:
        raise InputError(
            f"routing.always_on_layers={always} leaves no routed layer of {layers}; allowed: 0 to {layers - 1}"
        )
    if routing.always_on_tokens >= config.data.length:
        raise InputError(
            f"routing.always_on_tokens={routing.always_on_tokens} leaves no routed token of "
            f"data.length={config.data.length}; allowed: 0 to {config.data.length - 1}"
        )


def _check_target(config: Config, layers: int) -> None:
    """The target is not below what always runs; of a range the end is not, and what is below is as near as can be."""
    routing = config.routing
    key, target = ("target_range", routing.target_range[1]) if routing.target_range else ("target", routing.target)
    share = routing.always_on_layers / layers
    if routing.method != "dense" and routing.counting == "all" and target < share:
        raise InputError(
            f"routing.{key}={target:g} is below what routing.always_on_layers={routing.always_on_layers} of {layers} "
            f"layers run; allowed: {share:.3g} to 1, or routing.counting=routed"
        )


def _check_formats(config: Config, architecture: Architecture) -> None:
    """The groups of every format that is trained for divide the inputs of every linear."""
    inputs = {name: architecture.linear_shape(name)[0] for name in LINEARS}
    for index, format in enumerate(formats_of(config.train.quantization_aware)):
        for name, width in inputs.items():
            key = f"train.quantization_aware.formats.{index}.group_size"
            validate(format, width, f"linear {name!r}", key, inputs.values())


def prepare(config: Config, mesh: Mesh, key: jax.Array) -> Start:
    """Builds the starting point of a run on `mesh`."""
    spec, params, tokenizer, inherited = starting_model(config, mesh, key)
    placed = stacked_shardings(spec, mesh)
    params = stack_on_mesh(spec, params, placed)
    trainable, frozen = partition(params, config.train.parameters)
    trainable = {path: leaf.astype(TRAINED) for path, leaf in trainable.items()}
    return Start(spec, tokenizer, trainable, frozen, flatten(placed), inherited)


def prepare_abstract(config: Config, spec: ModelSpecification, mesh: Mesh | AbstractMesh) -> Start:
    """What `prepare` gives for a model that has its routers and adapters, with shapes for arrays and no tokenizer."""
    trainable, frozen = partition(stack_layers(spec, abstract_parameters(spec)), config.train.parameters)
    trainable = {path: jax.ShapeDtypeStruct(leaf.shape, TRAINED) for path, leaf in trainable.items()}
    return Start(spec, None, trainable, frozen, flatten(stacked_shardings(spec, mesh)), {})


def state_shardings(start: Start, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> TrainState:
    """A sharding for every array of the state; the optimizer's moments follow their parameters."""
    whole: Any = replicated(mesh)  # a state whose leaves are shardings
    placed = {path: start.shardings[path] for path in start.trainable}
    abstract = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in start.trainable.items()}
    return TrainState(whole, whole, placed, optimizer_shardings(optimizer, abstract, placed, whole))


def place_state(start: Start, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The initial state on the mesh."""
    return jax.jit(
        lambda trainable: initial_state(trainable, optimizer), out_shardings=state_shardings(start, optimizer, mesh)
    )(start.trainable)
