"""Checks across sections: combinations of keys that cannot work, or that would silently do nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from qtale_jax.errors import mended_group_size

if TYPE_CHECKING:
    from qtale_jax.config.schema import Config


def check_combinations(config: Config) -> None:
    """Checks what can be known before a model or a device is seen.

    Raises:
        ValueError: names the keys, what was found and what is allowed.
    """
    _check_batch(config)
    _check_trainable(config)
    _check_skipping(config)
    _check_drop(config)
    _check_rouge(config)
    _check_budget(config)
    if config.model.path is None:
        _check_architecture(config)


def _check_batch(config: Config) -> None:
    train, mesh = config.train, config.mesh
    if train.batch_size % train.microbatches:
        raise ValueError(f"train.microbatches={train.microbatches} does not divide train.batch_size={train.batch_size}")
    rows = train.batch_size // train.microbatches
    shards = mesh.data * mesh.fsdp
    if shards > 0 and rows % shards:
        raise ValueError(
            f"mesh.data={mesh.data} times mesh.fsdp={mesh.fsdp} does not divide the {rows} rows of a microbatch "
            f"(train.batch_size={train.batch_size}, train.microbatches={train.microbatches})"
        )


def _check_drop(config: Config) -> None:
    if config.model.drop.keep < 1 and config.model.path is None and config.experiment.base is None:
        raise ValueError(
            f"model.drop.keep={config.model.drop.keep:g} takes layers out of a parent, and there is none; "
            "allowed: model.path, or 1"
        )


def _check_rouge(config: Config) -> None:
    evaluate, kind = config.evaluate, config.data.kind
    if evaluate.rouge and kind not in ("instruction", "published"):
        raise ValueError(
            f"evaluate.rouge=true compares written responses, which data.kind={kind!r} does not have; "
            "allowed: instruction or published"
        )
    if not evaluate.rouge and evaluate.max_new_tokens != type(evaluate).model_fields["max_new_tokens"].default:
        raise ValueError(
            f"evaluate.max_new_tokens={evaluate.max_new_tokens} would do nothing without evaluate.rouge=true"
        )


def _check_budget(config: Config) -> None:
    objective, asked = config.calibrate.objective, config.budget.asked
    if objective == "budget" and asked is None:
        raise ValueError(
            "calibrate.objective='budget' needs the speed that is asked for; "
            "allowed: budget.tokens_per_second or budget.milliseconds_per_token with it"
        )
    if objective != "budget" and asked is not None:
        raise ValueError(
            f"budget.{asked[0]}={asked[1]:g} would do nothing with calibrate.objective={objective!r}; "
            "allowed: calibrate.objective=budget"
        )


def _check_trainable(config: Config) -> None:
    train, method = config.train, config.routing.method
    if train.parameters == "routers" and method == "dense":
        raise ValueError(
            "train.parameters='routers' does not go with routing.method='dense', which has none; "
            "allowed: 'adapters', 'all', or another routing.method"
        )
    if train.parameters == "adapters" and config.lora is None and method == "dense":
        raise ValueError(
            "train.parameters='adapters' with lora=null and routing.method='dense' leaves nothing to train; "
            "allowed: train.parameters='all', a lora section, or another routing.method"
        )
    if train.distillation.active and config.model.path is None and config.experiment.base is None:
        name = "weight" if train.distillation.weight else "hidden_weight"
        raise ValueError(
            f"train.distillation.{name}={getattr(train.distillation, name):g} needs a dense model to distil from; "
            f"allowed: model.path, or {name} 0"
        )


def _check_skipping(config: Config) -> None:
    share, routing = config.train.skipped_share, config.routing
    if share is None:
        return
    if routing.method in ("dense", "random"):
        raise ValueError(
            f"train.skipped_share={share:g} does not go with routing.method={routing.method!r}, which has no routers "
            "that learn; allowed: dllm, qtale or mod, or train.skipped_share=null"
        )
    if not routing.eviction:
        raise ValueError(
            f"train.skipped_share={share:g} does not go with routing.eviction=false, where every token's keys and "
            "values are seen; allowed: routing.eviction=true, or train.skipped_share=null"
        )


def _check_architecture(config: Config) -> None:
    """Checks against the shape of a model that is initialised here; others are checked when they are loaded."""
    architecture, layers = config.model.architecture, config.model.architecture.num_layers
    always_on = config.routing.always_on_layers
    if config.routing.method != "dense" and always_on >= layers:
        raise ValueError(
            f"routing.always_on_layers={always_on} leaves no routed layer of {layers}; allowed: 0 to {layers - 1}"
        )
    if config.data.length > architecture.max_length:
        raise ValueError(
            f"data.length={config.data.length} is longer than the context; "
            f"allowed: up to model.architecture.max_length={architecture.max_length}"
        )
    head = architecture.head_dim or architecture.hidden_size // architecture.num_heads
    inputs = sorted({architecture.hidden_size, architecture.num_heads * head, architecture.intermediate_size})
    for key, group_size in _group_sizes(config):
        undivided = [size for size in inputs if group_size > 0 and size % group_size]
        if undivided:
            raise ValueError(
                f"{key}={group_size} does not divide the {undivided[0]} inputs of a linear; "
                + mended_group_size(key, group_size, inputs)
            )


def _group_sizes(config: Config) -> Iterator[tuple[str, int]]:
    """Yields (key, group size) of every quantizer that would run on the model initialised here.

    Rules may give single linears another size; the stage checks those when it sees the model.
    """
    if config.quantize.model is None and not config.quantize.rules:
        yield "quantize.group_size", config.quantize.group_size
    for index, format in enumerate(config.train.quantization_aware.formats):
        yield f"train.quantization_aware.formats.{index}.group_size", format.group_size
    for index, quantizer in enumerate(config.experiment.quantizers):
        if quantizer.rules:
            continue
        yield f"experiment.quantizers.{index}.group_size", quantizer.group_size
