"""Writing models as Hugging Face Llama checkpoints, tensor by tensor."""

import json
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qtale_jax.artifact import load_model
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.huggingface import (
    CONFIG,
    INDEX,
    ROUTERS,
    ROUTING,
    ROUTING_FORMAT,
    WEIGHTS,
    Tensor,
    build_config,
    router_tensors,
    tensors,
)
from qtale_jax.models.lora import merged_kernel
from qtale_jax.models.safetensors_file import DTYPES, Planned, write_file
from qtale_jax.models.specification import ModelSpecification, RoutingSpecification
from qtale_jax.quantization.storage import unstore

SHARD_BYTES = 5 * 10**9
"""Largest weight file; bigger models are written in parts with an index."""

_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def export(model_dir: str | Path, out_dir: str | Path, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model directory as a Hugging Face checkpoint.

    Adapters are merged and quantized weights restored to floating point, one tensor at a time. A checkpoint that was
    imported gets its configuration and the types of its tensors back; others are written in the type of the model.
    Routers and thresholds, which Hugging Face does not know, go to `routers.safetensors` and `qtale.json`.

    Args:
        model_dir: what to write.
        out_dir: a directory that does not exist yet; it appears when it is whole.
        shard_bytes: largest weight file.

    Raises:
        InputError: `out_dir` exists, or `model_dir` is not a model.
    """
    source, out = Path(model_dir), Path(out_dir)
    if out.exists():
        raise InputError(f"{out} exists already; choose another output or remove it")
    model = load_model(source)
    origin = origin_of(model.provenance)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f".{out.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir()
        config = build_config(model.spec.architecture, model.spec.dtype, origin.get("config"))
        _write_json(temporary / CONFIG, config)
        if "generation_config" in origin:
            _write_json(temporary / "generation_config.json", origin["generation_config"])
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name != "model.json":  # the rest is the tokenizer's
                shutil.copyfile(file, temporary / file.name)
        dtypes = origin.get("dtypes", {"usual": _NAMES[model.spec.dtype], "others": {}})
        _write_weights(temporary, _planned(model.spec, model.params, dtypes), shard_bytes)
        if model.spec.routing is not None:
            _write_routing(temporary, model.spec, model.spec.routing, model.params)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def origin_of(provenance: dict[str, Any]) -> dict[str, Any]:
    """What the import of the model, or of the nearest ancestor that was imported, remembered; empty if none was."""
    found = provenance.get("huggingface")
    if isinstance(found, dict):
        return found
    # Stages nest the provenance of the model they started from, directly or inside a description of that model.
    for key in ("parent", "provenance", "model"):
        value = provenance.get(key)
        if isinstance(value, dict) and (inner := origin_of(value)):
            return inner
    return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def _planned(spec: ModelSpecification, params: Parameters, dtypes: dict[str, Any]) -> list[Planned]:
    return [
        _plan(spec, params, tensor, dtypes["others"].get(tensor.name, dtypes["usual"]))
        for tensor in tensors(spec.architecture)
    ]


def _plan(spec: ModelSpecification, params: Parameters, tensor: Tensor, dtype: str) -> Planned:
    def compute() -> np.ndarray:
        array = np.asarray(_value(spec, params, tensor))
        return (array.T if tensor.transposed else array).astype(DTYPES[dtype])

    return Planned(tensor.name, dtype, tensor.shape, compute)


def _value(spec: ModelSpecification, params: Parameters, tensor: Tensor) -> Float[Array, "..."]:
    """The floating-point value of a tensor, whatever the model keeps instead."""
    *parents, leaf = tensor.path
    node = params
    for key in parents:
        node = node[key]
    if "quantized" in node:
        layer, name = tensor.path[1], str(tensor.path[3])
        entry = spec.quantization.format(int(layer), name) if spec.quantization else None
        if entry is None:
            raise ValueError(f"{tensor.name} is quantized, but the specification has no format for it")
        kernel = unstore(node["quantized"], spec.architecture.linear_shape(name), entry, jnp.dtype(jnp.float32))
        node = {**node, leaf: kernel}
    return jax.jit(merged_kernel)(node) if "lora" in node else node[leaf]


def _write_weights(directory: Path, planned: list[Planned], shard_bytes: int) -> None:
    shards = _shards(planned, shard_bytes)
    if len(shards) == 1:
        return write_file(directory / WEIGHTS, planned)
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard)
        weight_map.update(dict.fromkeys((tensor.name for tensor in shard), name))
    total = sum(tensor.size for tensor in planned)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(planned: Iterable[Planned], limit: int) -> list[list[Planned]]:
    """Fills files in order up to the limit; a tensor above it has a file of its own."""
    shards: list[list[Planned]] = [[]]
    filled = 0
    for tensor in planned:
        if shards[-1] and filled + tensor.size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    return shards


def _write_routing(
    directory: Path, spec: ModelSpecification, routing: RoutingSpecification, params: Parameters
) -> None:
    wanted = router_tensors(spec.architecture, spec.routed_layers, routing.router_hidden)
    write_file(directory / ROUTERS, [_plan(spec, params, tensor, "F32") for tensor in wanted])
    values = routing.model_dump(mode="json")
    if spec.bits != 16:
        # Restored weights are read as 16 bits wide; they are still the ones these thresholds were found for.
        for table in ("thresholds", "calibration"):
            if str(spec.bits) in values[table]:
                values[table]["16"] = values[table][str(spec.bits)]
            else:
                values[table].pop("16", None)
    _write_json(directory / ROUTING, {"format": ROUTING_FORMAT, "routing": values})
