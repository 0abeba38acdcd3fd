"""Reading a Hugging Face checkpoint, tensor by tensor."""

import logging
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from pydantic import ValidationError

from qtale_jax.artifact import Deferred, LoadedModel, load_tokenizer, save_model
from qtale_jax.artifact.arrays import Flat, flatten, nest
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.huggingface.config import architecture_from, read_json
from qtale_jax.models.huggingface.families import family_of
from qtale_jax.models.huggingface.files import StoredTensor, read_checkpoint, read_file
from qtale_jax.models.huggingface.multimodal import text_config, text_tensors
from qtale_jax.models.huggingface.names import Tensor, tensors
from qtale_jax.models.huggingface.quantized import open_matrix, packed_linears, packing_from, specification_of
from qtale_jax.models.specification import (
    Architecture,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROUTERS, ROUTING = "routers.safetensors", "qtale.json"
"""Files beside an exported model that bring its routers back, and what else config.json has no place for."""

Storage = Literal["float32", "bfloat16"]

log = logging.getLogger(__name__)

_STORAGE = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Checkpoint:
    """What a Hugging Face directory holds, as a model of this library; no tensor is read before it is used.

    Attributes:
        spec: architecture, routing if the directory was exported from a routed model, storage type.
        params: one tree per layer; leaves are `artifact.Deferred`.
        tokenizer: the tokenizer in the directory, or None.
        provenance: with the original config, so that nothing of it is lost on the way back; of a checkpoint that takes
            images too, with the config of its text model.
    """

    spec: ModelSpecification
    params: Parameters
    tokenizer: "PreTrainedTokenizerBase | None"
    provenance: dict[str, Any]


def from_huggingface(
    source: str | Path, path: str | Path, *, dtype: Storage | None = None, overwrite: bool = False
) -> Checkpoint:
    """Converts a Hugging Face directory into a model directory; see `read_huggingface`."""
    checkpoint = read_huggingface(source, dtype=dtype)
    save_model(
        path,
        checkpoint.spec,
        checkpoint.params,
        tokenizer=checkpoint.tokenizer,
        provenance=checkpoint.provenance,
        overwrite=overwrite,
    )
    return checkpoint


def load_huggingface(source: str | Path) -> LoadedModel:
    """A checkpoint in Hugging Face layout as a model in memory; its routers are read where it was exported with some.

    Raises:
        InputError: as `read_huggingface`.
    """
    found = read_huggingface(source)
    arrays = {name: jnp.asarray(leaf.read()) for name, leaf in flatten(found.params).items()}
    return LoadedModel(found.spec, nest(arrays), found.tokenizer, found.provenance)


def read_huggingface(source: str | Path, *, dtype: Storage | None = None) -> Checkpoint:
    """Opens a checkpoint in Hugging Face layout: config.json, safetensors (one file or sharded), tokenizer.

    Linears that AutoAWQ or GPTQ packed in 4 bits keep their integers, scales and zero points; zero points that are all
    in the middle are left out (symmetric), and inputs whose groups are scattered are sorted by group (permuted). Of
    checkpoints that take images too the text model is read; what is left out is logged and recorded.

    Args:
        source: the directory.
        dtype: storage type of embedding, head and linears that are not packed. Default: bfloat16 if all of them are
            bfloat16, else float32, which holds float32, bfloat16 and float16 exactly. Norms and routers are always
            float32, scales of packed linears stay what they are.

    Raises:
        InputError: not a supported family or packing; tensors missing, unexpected or of another shape; damaged files.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such directory")
    where = str(source / "config.json")
    whole = read_json(source / "config.json")
    config, _ = text_config(whole, where)
    architecture, packing = architecture_from(whole, where), packing_from(config, where)
    stored, left_out = text_tensors(whole, read_checkpoint(source))
    stored = _without_buffers(stored)
    if architecture.tied_head:
        _drop_tied_head(stored)
    wanted = tensors(architecture)
    packed = packed_linears(packing, stored, wanted, where)
    floats = [tensor for tensor in wanted if tensor not in {linear.tensor for linear in packed}]
    shapes = {tensor.name: tensor.shape for tensor in floats}
    for linear in packed:
        shapes |= linear.shapes
    _check(source, architecture, stored, shapes)
    matrices = {linear.tensor: open_matrix(linear, stored) for linear in packed}
    quantization = specification_of({tensor.key: matrix for tensor, matrix in matrices.items()})
    storage = dtype or _lossless(stored[tensor.name] for tensor in floats if len(tensor.shape) == 2)
    beyond = _read_beyond_config(source)
    spec = _specification(architecture, beyond, quantization, storage, source)
    flat = {tensor.parameter: _defer(tensor, stored[tensor.name], storage) for tensor in floats}
    for tensor, matrix in matrices.items():
        flat |= {f"{tensor.node}/quantized/{name}": leaf for name, leaf in matrix.leaves().items()}
    flat |= _read_routers(source, spec)
    types = _source_types(floats, stored, flat)
    original = {"name": source.resolve().name, "config": config, **types, **_generation_config(source)}
    if left_out is not None:
        original["left_out"] = asdict(left_out)
        log.warning("%s: %s are left out; the model takes text alone", source, left_out)
    provenance = {"stage": "convert", "huggingface": original}
    if beyond.exported:
        provenance["dequantized_from" if quantization is None else "packed_from"] = beyond.exported
    return Checkpoint(spec, nest(flat), load_tokenizer(source), provenance)


def _without_buffers(stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Leaves out rotary frequencies, which early Llama checkpoints store although the config defines them."""
    return {name: tensor for name, tensor in stored.items() if not name.endswith(".rotary_emb.inv_freq")}


def _drop_tied_head(stored: dict[str, StoredTensor]) -> None:
    """Some tied checkpoints store the head too; it may go if it really is the embedding."""
    head, table = stored.pop("lm_head.weight", None), stored.get("model.embed_tokens.weight")
    if head is None or table is None:
        return
    same = head.dtype == table.dtype and head.shape == table.shape and head.map().tobytes() == table.map().tobytes()
    if not same:
        raise InputError(
            f"{head.file}: lm_head.weight differs from model.embed_tokens.weight, but config.json has "
            "tie_word_embeddings=true; set it to false if the head is meant to be free"
        )


def _check(
    source: Path, architecture: Architecture, stored: dict[str, StoredTensor], wanted: dict[str, tuple[int, ...]]
) -> None:
    """Every tensor is there, in the shape that config.json implies, and no other."""
    if missing := [name for name in wanted if name not in stored]:
        name, free_head = missing[0], missing == ["lm_head.weight"]
        hint = "; is this a tied model whose config.json lacks tie_word_embeddings=true?" if free_head else ""
        raise InputError(
            f"{source}: tensor {name} is missing ({len(missing)} in all), expected shape {wanted[name]}{hint}"
        )
    if extra := [name for name in stored if name not in wanted]:
        first = stored[extra[0]]
        raise InputError(
            f"{first.file}: unexpected tensor {extra[0]} of shape {first.shape} ({len(extra)} in all); a "
            f"{family_of(architecture).name} of {architecture.num_layers} layers as config.json describes it does not "
            "have it"
        )
    for name, shape in wanted.items():
        if stored[name].shape != shape:
            raise InputError(f"{stored[name].file}: tensor {name} has shape {stored[name].shape}, expected {shape}")


def _lossless(stored) -> Storage:
    return "bfloat16" if all(tensor.dtype == _STORAGE["bfloat16"] for tensor in stored) else "float32"


def _defer(tensor: Tensor, stored: StoredTensor, storage: Storage) -> Deferred:
    dtype = _STORAGE[storage if len(tensor.shape) == 2 else "float32"]
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    return Deferred(shape, dtype, partial(_read, stored, dtype, tensor.transposed))


def _read(stored: StoredTensor, dtype: np.dtype, transposed: bool) -> np.ndarray:
    view = stored.map()
    return np.array(view.T if transposed else view, dtype=dtype, order="C")


def _source_types(wanted: list[Tensor], stored: dict[str, StoredTensor], flat: Flat) -> dict[str, Any]:
    """Types in the source, for the way back: the common one, exceptions, and None where storing it rounded."""
    found = {}
    for tensor in wanted:
        here, there = stored[tensor.name].dtype, flat[tensor.parameter].dtype
        found[tensor.name] = here.name if there in (here, _STORAGE["float32"]) else None
    common = Counter(found.values()).most_common(1)[0][0]
    return {"dtype": common, "dtypes": {name: dtype for name, dtype in found.items() if dtype != common}}


def _generation_config(source: Path) -> dict[str, Any]:
    file = source / "generation_config.json"
    return {"generation_config": read_json(file)} if file.is_file() else {}


@dataclass(frozen=True)
class _BeyondConfig:
    """What an exported model has besides its config.json: routing, quantization that was undone, layers taken out."""

    routing: RoutingSpecification | None = None
    exported: dict[str, Any] | None = None
    dropped_layers: tuple[int, ...] = ()


def _read_beyond_config(source: Path) -> _BeyondConfig:
    file = source / ROUTING
    if not file.is_file():
        return _BeyondConfig()
    document = read_json(file)
    try:
        given = document["routing"]
        dropped = document.get("dropped_layers", [])
        if not isinstance(dropped, list) or not all(type(layer) is int for layer in dropped):
            raise InputError(f"{file}: dropped_layers: found {dropped!r:.80}, allowed: a list of numbers")
        routing = None if given is None else RoutingSpecification.model_validate(given)
        return _BeyondConfig(routing, document.get("quantization"), tuple(dropped))
    except KeyError as error:
        raise InputError(f"{file}: key {error} is missing") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("routing", *first["loc"])))
        raise InputError(f"{file}: {key}: {first['msg']}, found {first['input']!r:.80}") from error


def _specification(
    architecture: Architecture,
    beyond: _BeyondConfig,
    quantization: QuantizationSpecification | None,
    storage: Storage,
    source: Path,
) -> ModelSpecification:
    routing = beyond.routing
    try:
        spec = ModelSpecification(
            architecture=architecture,
            routing=routing,
            quantization=quantization,
            dtype=storage,
            dropped_layers=beyond.dropped_layers,
        )
    except ValidationError as error:
        raise InputError(f"{source / ROUTING}: {error.errors()[0]['msg']}") from error
    for bits, thresholds in (routing.thresholds if routing else {}).items():
        if len(thresholds) != len(spec.routed_layers):
            raise InputError(
                f"{source / ROUTING}: routing.thresholds[{bits!r}] has {len(thresholds)} values, "
                f"expected one for each of {len(spec.routed_layers)} routed layers"
            )
    return spec


def _read_routers(source: Path, spec: ModelSpecification) -> Flat:
    if spec.routing is None:
        return {}
    file = source / ROUTERS
    stored = read_file(file)
    abstract = flatten(abstract_parameters(spec))
    wanted = {path.replace("/", "."): (path, leaf) for path, leaf in abstract.items() if "/router/" in path}
    _check(source, spec.architecture, stored, {name: leaf.shape for name, (_, leaf) in wanted.items()})
    return {
        path: Deferred(leaf.shape, leaf.dtype, partial(_read, stored[name], leaf.dtype, False))
        for name, (path, leaf) in wanted.items()
    }
