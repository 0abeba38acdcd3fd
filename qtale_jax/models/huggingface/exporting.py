"""Writing a model directory as a Hugging Face checkpoint, in floating point or in AutoAWQ's 4-bit layout."""

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from qtale_jax.artifact import LoadedModel, load_model, new_directory, read_model_json, save_tokenizer
from qtale_jax.artifact.arrays import flatten
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.huggingface.card import checkpoint_card
from qtale_jax.models.huggingface.config import config_for
from qtale_jax.models.huggingface.exporting_awq import (
    FLOAT16,
    check_fits,
    packed_tensors,
    quantization_config,
    to_float16,
)
from qtale_jax.models.huggingface.files import SHARD_BYTES, NewTensor, write_checkpoint, write_file
from qtale_jax.models.huggingface.importing import ROUTERS, ROUTING, Storage
from qtale_jax.models.huggingface.names import Tensor, tensors
from qtale_jax.models.specification import ModelSpecification, RoutingSpecification, TensorFormat
from qtale_jax.quantization.storage import unstore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        spec: the model that was exported.
        tensors: the tensors of the checkpoint.
        routers: the tensors of the routers.
        files: files that hold them.
        changed: for packed checkpoints, how many values of what float16 changed, of how many: "scales" and "others".
    """

    spec: ModelSpecification
    tensors: list[NewTensor]
    routers: list[NewTensor]
    files: list[str]
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)


def to_huggingface(
    path: str | Path,
    out: str | Path,
    *,
    dtype: Storage | None = None,
    quantized: Literal["awq"] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Written:
    """Writes the model directory `path` as a directory that `AutoModelForCausalLM.from_pretrained` reads.

    Adapters are merged and quantized weights restored on the way. Tied models have no `lm_head.weight`. Routed models
    get `routers.safetensors` and `qtale.json` beside, from which `read_huggingface` brings the routers back; to
    transformers they are dense. What layers were taken out is in `qtale.json` too. README.md says what the model is and
    how both are opened. A model that came from Hugging Face keeps its own config.json and tensor types.

    With `quantized="awq"` the linears keep their integers and zero points, packed as AutoAWQ (version gemm) does;
    symmetric ones get zero points in the middle. Everything else is written in float16, quantized embeddings, heads and
    routers restored (routers stay float32). Scales and weights that float16 does not hold exactly are rounded to it;
    `Written.changed` says how many.

    Args:
        path: a model directory.
        out: a directory that does not exist yet.
        dtype: type of all tensors. Default: the type that the tensor had in the checkpoint the model came from if its
            values fit exactly, else the type in which the model holds it (merged and restored weights: `spec.dtype`).
        quantized: keep the 4-bit integers of the linears, in this layout; excludes `dtype`.
        shard_bytes: larger checkpoints are split into files of at most this size.

    Raises:
        InputError: `path` is not a whole model directory, or `out` exists; with `quantized`, a model that the layout
            cannot hold.
    """
    form = _form(path, dtype, quantized)
    with new_directory(out) as directory:
        model = load_model(path, shardings=SingleDeviceSharding(_host()))
        original = model.provenance.get("huggingface", {})
        news, changed = _tensors(model, str(path), form, dtype)
        files = write_checkpoint(directory, news, shard_bytes)
        common = Counter[str]()
        for new in news:
            common[new.dtype.name] += new.nbytes
        tokens = _special_tokens(model.tokenizer)
        written = FLOAT16.name if form else common.most_common(1)[0][0]
        packing = quantization_config(form) if form else None
        config = config_for(model.spec, original.get("config"), written, tokens, packing)
        _write_json(directory / "config.json", config)
        # Without this file it is config.json that ends a turn, with tokens that the tokenizer may not name.
        given = {name: config[name] for name in SPECIAL_TOKENS if config.get(name) is not None}
        generation = original.get("generation_config") or {"_from_model_config": True, **tokens, **given}
        _write_json(directory / "generation_config.json", generation)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, directory)
        routers = _router_tensors(model)
        if model.spec.routing is not None:
            write_file(directory / ROUTERS, routers)  # hashed routers have no tensors, but a way to decide
        if model.spec.routing is not None or model.spec.dropped_layers:
            _write_json(directory / ROUTING, _beyond_config(model.spec, restored=form is None))
        card = checkpoint_card(Path(out).name, model.spec, model.provenance, packed=form is not None)
        (directory / "README.md").write_text(card, encoding="utf-8")
    return Written(model.spec, news, routers, files + ([ROUTERS] if routers else []), changed)


def would_write(path: str | Path, *, dtype: Storage | None = None, quantized: Literal["awq"] | None = None) -> Written:
    """What `to_huggingface` would write, all of it checked, without writing it; `files` is empty.

    Raises:
        InputError: as `to_huggingface`.
    """
    form = _form(path, dtype, quantized)
    model = load_model(path, shardings=SingleDeviceSharding(_host()))
    news, changed = _tensors(model, str(path), form, dtype)
    return Written(model.spec, news, _router_tensors(model), [], changed)


def _form(path: str | Path, dtype: Storage | None, quantized: Literal["awq"] | None) -> TensorFormat | None:
    """The packed format of the linears; None: floating point."""
    if quantized is None:
        return None
    if dtype is not None:
        raise InputError(f"dtype={dtype!r} does not go with quantized={quantized!r}, which is stored in float16")
    return check_fits(read_model_json(path).spec, str(path))


def _tensors(
    model: LoadedModel, where: str, form: TensorFormat | None, dtype: Storage | None
) -> tuple[list[NewTensor], dict[str, tuple[int, int]]]:
    """The tensors of the checkpoint, and what float16 changed, of how much."""
    if form is not None:
        return _packed(model, where)
    original = model.provenance.get("huggingface", {})
    return [_tensor(model, tensor, original, dtype) for tensor in tensors(model.spec.architecture)], {}


def _host() -> jax.Device:
    """The host as a device, so that a model larger than an accelerator can be written."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX_PLATFORMS names accelerators only
        return jax.local_devices()[0]


def _tensor(model: LoadedModel, tensor: Tensor, original: dict[str, Any], dtype: Storage | None) -> NewTensor:
    read = partial(_weight, model.spec, model.params, tensor)
    if dtype is not None:
        target = np.dtype(jnp.dtype(dtype))
    else:
        source = original.get("dtypes", {}).get(tensor.name, original.get("dtype"))
        target = _type(read, None if source is None else np.dtype(jnp.dtype(source)))
    return NewTensor(tensor.name, target, tensor.shape, read)


def _type(read, source: np.dtype | None) -> np.dtype:
    held = read()
    if source is None or source == held.dtype:
        return held.dtype
    with np.errstate(over="ignore"):
        fits = np.array_equal(held.astype(source).astype(held.dtype), held)
    return source if fits else held.dtype


def _packed(model: LoadedModel, where: str) -> tuple[list[NewTensor], dict[str, tuple[int, int]]]:
    """The tensors of a checkpoint whose linears are packed, and what float16 changed, of how much."""
    found: list[NewTensor] = []
    changed, total = Counter[str](), Counter[str]()

    def count(kind: str, changes: int, size: int) -> None:
        changed[kind] += changes
        total[kind] += size

    for tensor in tensors(model.spec.architecture):
        if tensor.is_linear:
            form = _format(model.spec, tensor.key)
            packed, changes = packed_tensors(tensor, _node(model.params, tensor.node)["quantized"], form, where)
            found += packed
            count("scales", changes, packed[-1].size)
        else:
            read = partial(_weight, model.spec, model.params, tensor, "float32")
            found.append(NewTensor(tensor.name, FLOAT16, tensor.shape, read))
            count("others", to_float16(read(), f"{where}: a value of {tensor.name}")[1], math.prod(tensor.shape))
    return found, {kind: (changed[kind], total[kind]) for kind in total}


def _weight(
    spec: ModelSpecification, params: Parameters, tensor: Tensor, computed: Storage | None = None
) -> np.ndarray:
    """One tensor in the layout of the checkpoint, as a plain array.

    What has to be computed, restored or merged, comes as `computed` (default: `spec.dtype`).
    """
    node, leaf = _node(params, tensor.node), tensor.parameter.rsplit("/", 1)[1]
    if leaf != "bias" and ("lora" in node or "quantized" in node):
        return np.asarray(_plain_kernel(spec, node, tensor).astype(computed or spec.dtype)).T
    array = np.asarray(node[leaf])
    return array.T if tensor.transposed else array


def _node(params: Parameters, path: str) -> Parameters:
    node: Any = params
    for key in path.split("/"):
        node = node[int(key) if key.isdigit() else key]
    return node


def _plain_kernel(spec: ModelSpecification, node: Parameters, tensor: Tensor) -> jax.Array:
    """A weight (inputs, outputs) with its integers restored and its adapter merged, in float32.

    A quantized embedding is such a weight too: its outputs are the tokens.
    """
    if "quantized" in node:
        outputs, inputs = tensor.shape
        kernel = unstore(node["quantized"], (inputs, outputs), _format(spec, tensor.key), jnp.float32)
    else:
        kernel = node["kernel"].astype(jnp.float32)
    if "lora" in node:
        kernel += jnp.matmul(node["lora"]["down"], node["lora"]["up"], precision="float32")
    return kernel


def _format(spec: ModelSpecification, key: str) -> TensorFormat:
    assert spec.quantization is not None  # the arrays were checked against the specification
    return spec.quantization.formats[key]


def _special_tokens(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, int]:
    found = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    return {name: value for name, value in found.items() if value is not None}


def _router_tensors(model: LoadedModel) -> list[NewTensor]:
    """The routers, in floating point."""
    plain = flatten(abstract_parameters(model.spec.model_copy(update={"quantization": None})))
    return [
        NewTensor(path.replace("/", "."), np.dtype(leaf.dtype), leaf.shape, partial(_router, model, path, leaf.shape))
        for path, leaf in plain.items()
        if "/router/" in path
    ]


def _beyond_config(spec: ModelSpecification, *, restored: bool) -> dict[str, Any]:
    """What config.json has no place for: how routers decide, what was `restored` or packed, layers taken out."""
    routing, quantization = spec.routing, spec.quantization
    if routing is not None and restored:
        routing = _restored_routing(spec, routing)
    return {
        "format": FORMAT,
        "routing": None if routing is None else routing.model_dump(mode="json"),
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
        "dropped_layers": list(spec.dropped_layers),
    }


def _router(model: LoadedModel, path: str, shape: tuple[int, ...]) -> np.ndarray:
    parent, name = path.rsplit("/", 1)
    node = _node(model.params, parent)
    if name in node:
        return np.asarray(node[name])
    form = _format(model.spec, f"{path.split('/')[1]}/router")
    return np.asarray(unstore(node["quantized"], (shape[0], shape[1]), form, jnp.float32))


def _restored_routing(spec: ModelSpecification, routing: RoutingSpecification) -> RoutingSpecification:
    """The thresholds of a restored model stand under 16 bits, which is what it has become; it decides as before."""
    if spec.quantization is None:
        return routing
    width = str(spec.bits)
    calibration = {"16": routing.calibration[width]} if width in routing.calibration else {}
    return routing.model_copy(update={"thresholds": {"16": spec.thresholds}, "calibration": calibration})


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
