"""Reading Hugging Face Llama checkpoints: one or several safetensors files, tensor by tensor."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from pydantic import ValidationError

from qtale_jax.errors import InputError, nearest
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.huggingface import (
    CONFIG,
    INDEX,
    ROUTERS,
    ROUTING,
    ROUTING_FORMAT,
    WEIGHTS,
    Tensor,
    parse_config,
    router_tensors,
    tensors,
)
from qtale_jax.models.safetensors_file import DTYPES, Entry, read_header, read_tensor
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

Listing = dict[str, tuple[Path, Entry]]
"""Tensor name -> its file and place."""


@dataclass(frozen=True)
class Imported:
    """A checkpoint as specification, parameters (one tree per layer) and what is needed to write it back."""

    spec: ModelSpecification
    params: Parameters
    provenance: dict[str, Any]


def read(directory: str | Path, dtype: str | None = None) -> Imported:
    """Reads a checkpoint into one parameter tree; beside it, at most one tensor is held at a time.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards with their index; routed models written by
            this package also `routers.safetensors` and `qtale.json`.
        dtype: type of kernels and embedding, "float32" or "bfloat16"; None: bfloat16 if most are stored so, else
            float32. Norms and routers are float32.

    Returns:
        The model; `provenance["huggingface"]` keeps the configuration and the types of all tensors.

    Raises:
        InputError: an unsupported model; missing, unexpected, misshaped or damaged tensors or files.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory}: no such directory")
    config = read_json(directory / CONFIG)
    architecture = parse_config(config, str(directory / CONFIG))
    listing = _listing(directory)
    wanted = list(tensors(architecture))
    _check(directory, listing, wanted, {"lm_head.weight"} if architecture.tied_head else set())
    stored = {tensor.name: listing[tensor.name][1].dtype for tensor in wanted}
    routing, routers = _read_routing(directory, architecture)
    kernels = dtype or _kernel_dtype(stored.values())
    spec = ModelSpecification(architecture=architecture, routing=routing, dtype=kernels)
    params: Parameters = {"layers": {layer: {} for layer in range(architecture.num_layers)}}
    _fill(params, wanted, listing, kernels)
    _fill(params, routers[1], routers[0], "float32")
    if architecture.tied_head and "lm_head.weight" in listing:
        _check_tied(listing)
    return Imported(spec, params, {"huggingface": _remembered(directory, config, stored)})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        InputError: not there, or something else.
    """
    if not path.is_file():
        raise InputError(f"{path.parent} is not a Hugging Face checkpoint: {path.name} is missing")
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: found {type(value).__name__}, expected a mapping")
    return value


def _listing(directory: Path) -> Listing:
    """All tensors of a directory; tables that older versions stored beside the weights are left out."""
    single, index = directory / WEIGHTS, directory / INDEX
    if single.is_file() or not index.is_file():
        if not single.is_file():
            old = next((p.name for p in sorted(directory.glob("*.bin"))), None)
            hint = f"; {old} is a pickle: save the model with safetensors" if old else ""
            raise InputError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there{hint}")
        listing = {name: (single, entry) for name, entry in read_header(single).items()}
    else:
        listing = _sharded(index)
    return {name: place for name, place in listing.items() if not name.endswith("rotary_emb.inv_freq")}


def _sharded(index: Path) -> Listing:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map is missing or not a mapping from tensors to files")
    headers = {}
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            raise InputError(f"{index}: {name!r} is not the name of a file in this directory")
        headers[name] = read_header(index.parent / name)
    listing = {}
    for tensor, name in weight_map.items():
        if tensor not in headers[name]:
            raise InputError(f"{index.parent / name}: {tensor} is missing, although {INDEX} says it is there")
        listing[tensor] = (index.parent / name, headers[name][tensor])
    for name, header in headers.items():
        for tensor in header:
            if tensor not in listing:
                raise InputError(f"{index.parent / name}: unexpected tensor {tensor}, which {INDEX} does not list")
    return listing


def _check(directory: Path, listing: Listing, wanted: list[Tensor], optional: set[str]) -> None:
    """Compares names, shapes and types with what the configuration asks for, before anything is read."""
    expected = {tensor.name: tensor for tensor in wanted}
    for name, tensor in expected.items():
        if name not in listing:
            files = ", ".join(sorted({file.name for file, _ in listing.values()})) or WEIGHTS
            raise InputError(f"{directory / files}: {name} is missing; expected shape {list(tensor.shape)}")
        file, entry = listing[name]
        if entry.shape != tensor.shape:
            raise InputError(
                f"{file}: {name} has shape {list(entry.shape)}, expected {list(tensor.shape)} by the configuration"
            )
        if entry.dtype not in DTYPES:
            raise InputError(f"{file}: {name} has type {entry.dtype}; supported: {', '.join(DTYPES)}")
    for name in listing:
        if name not in expected and name not in optional:
            raise InputError(f"{listing[name][0]}: unexpected tensor {name}{nearest(name, expected)}")


def _check_tied(listing: Listing) -> None:
    """Some tied checkpoints store the head nevertheless; it must then be the embedding."""
    (file, head), (other, embedding) = listing["lm_head.weight"], listing["model.embed_tokens.weight"]
    same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape) and np.array_equal(
        read_tensor(file, "lm_head.weight", head), read_tensor(other, "model.embed_tokens.weight", embedding)
    )
    if not same:
        raise InputError(f"{file}: lm_head.weight differs from the embedding, but tie_word_embeddings is true")


def _kernel_dtype(stored: Iterable[str]) -> str:
    found = list(stored)
    return "bfloat16" if found.count("BF16") * 2 > len(found) else "float32"


def _fill(params: Parameters, wanted: Iterable[Tensor], listing: Listing, dtype: str) -> None:
    for tensor in wanted:
        file, entry = listing[tensor.name]
        *parents, leaf = tensor.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        kind = "float32" if tensor.is_norm else dtype
        node[leaf] = _convert(read_tensor(file, tensor.name, entry), tensor.transposed, kind)


def _convert(view: np.ndarray, transposed: bool, dtype: str) -> Array:
    # Typed and laid out in one pass over the mapped file; an array of its own, as the mapping ends with this function.
    array = np.array(view.T if transposed else view, dtype=jnp.dtype(dtype), order="C", copy=True)
    return jax.device_put(array)


def _read_routing(
    directory: Path, architecture: Architecture
) -> tuple[RoutingSpecification | None, tuple[Listing, list[Tensor]]]:
    """Routing specification and routers of a checkpoint that this package wrote; nothing for any other."""
    document, file = directory / ROUTING, directory / ROUTERS
    if not document.is_file():
        if file.is_file():
            raise InputError(f"{directory}: {ROUTERS} is there, but {ROUTING} is missing")
        return None, ({}, [])
    values = read_json(document)
    if values.get("format") != ROUTING_FORMAT:
        raise InputError(f"{document}: format is {values.get('format')!r}; supported: {ROUTING_FORMAT}")
    try:
        routing = RoutingSpecification.model_validate(values.get("routing"))
        spec = ModelSpecification(architecture=architecture, routing=routing)
    except ValidationError as error:
        raise InputError(f"{document}: {error.errors()[0]['msg']}") from error
    for bits, thresholds in routing.thresholds.items():
        if len(thresholds) != len(spec.routed_layers):
            raise InputError(
                f"{document}: thresholds.{bits} has {len(thresholds)} values, expected {len(spec.routed_layers)}"
            )
    wanted = list(router_tensors(architecture, spec.routed_layers, routing.router_hidden))
    listing = {name: (file, entry) for name, entry in read_header(file).items()}
    _check(directory, listing, wanted, set())
    return routing, (listing, wanted)


def _remembered(directory: Path, config: dict[str, Any], stored: dict[str, str]) -> dict[str, Any]:
    """What the parameters do not say but writing back needs; types as the most frequent one and the exceptions."""
    types = list(stored.values())
    usual = max(sorted(set(types)), key=types.count)
    others = {name: dtype for name, dtype in stored.items() if dtype != usual}
    remembered: dict[str, Any] = {"config": config, "dtypes": {"usual": usual, "others": others}}
    generation = directory / "generation_config.json"
    if generation.is_file():
        remembered["generation_config"] = read_json(generation)
    return remembered
