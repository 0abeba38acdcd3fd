"""Writing a model directory as a Hugging Face Llama checkpoint."""

import json
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from qtale_jax.artifact import LoadedModel, load_model, new_directory, save_tokenizer
from qtale_jax.artifact.arrays import flatten
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.huggingface.config import config_for
from qtale_jax.models.huggingface.files import SHARD_BYTES, NewTensor, write_checkpoint, write_file
from qtale_jax.models.huggingface.importing import ROUTERS, ROUTING, Storage
from qtale_jax.models.huggingface.names import Tensor, tensors
from qtale_jax.models.specification import LINEARS, ModelSpecification, RoutingSpecification
from qtale_jax.quantization.storage import unstore

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    Attributes:
        spec: the model that was exported.
        tensors: the tensors of the checkpoint.
        routers: the tensors of the routers.
        files: files that hold them.
    """

    spec: ModelSpecification
    tensors: list[NewTensor]
    routers: list[NewTensor]
    files: list[str]


def to_huggingface(
    path: str | Path, out: str | Path, *, dtype: Storage | None = None, shard_bytes: int = SHARD_BYTES
) -> Written:
    """Writes the model directory `path` as a directory that `LlamaForCausalLM.from_pretrained` reads.

    Adapters are merged and quantized weights restored on the way. Tied models have no `lm_head.weight`. Routed models
    get `routers.safetensors` and `qtale.json` beside, from which `read_huggingface` brings the routers back; to
    transformers they are dense. A model that came from Hugging Face keeps its own config.json and tensor types.

    Args:
        path: a model directory.
        out: a directory that does not exist yet.
        dtype: type of all tensors. Default: the type that the tensor had in the checkpoint the model came from if its
            values fit exactly, else the type in which the model holds it (merged and restored weights: `spec.dtype`).
        shard_bytes: larger checkpoints are split into files of at most this size.

    Raises:
        InputError: `path` is not a whole model directory, or `out` exists.
    """
    with new_directory(out) as directory:
        model = load_model(path, shardings=SingleDeviceSharding(_host()))
        original = model.provenance.get("huggingface", {})
        news = [_tensor(model, tensor, original, dtype) for tensor in tensors(model.spec.architecture)]
        files = write_checkpoint(directory, news, shard_bytes)
        common = Counter[str]()
        for new in news:
            common[new.dtype.name] += new.nbytes
        tokens = _special_tokens(model.tokenizer)
        config = config_for(model.spec, original.get("config"), common.most_common(1)[0][0], tokens)
        _write_json(directory / "config.json", config)
        generation = original.get("generation_config") or {"_from_model_config": True, **tokens}
        _write_json(directory / "generation_config.json", generation)
        if model.tokenizer is not None:
            save_tokenizer(model.tokenizer, directory)
        routers = _write_routers(directory, model)
    return Written(model.spec, news, routers, files + ([ROUTERS] if routers else []))


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


def _weight(spec: ModelSpecification, params: Parameters, tensor: Tensor) -> np.ndarray:
    """One tensor in the layout of the checkpoint, as a plain array."""
    keys = tensor.parameter.split("/")
    node: Any = params
    for key in keys[:-1]:
        node = node[int(key) if key.isdigit() else key]
    if keys[-2] in LINEARS and ("lora" in node or "quantized" in node):
        array = _plain_kernel(spec, node, int(keys[1]), keys[-2])
    else:
        array = np.asarray(node[keys[-1]])
    return array.T if tensor.transposed else array


def _plain_kernel(spec: ModelSpecification, linear: Parameters, layer: int, name: str) -> np.ndarray:
    """The weight of a linear with its integers restored and its adapter merged, computed in float32."""
    if "quantized" in linear:
        form = spec.quantization.format(layer, name) if spec.quantization else None
        assert form is not None  # the arrays were checked against the specification
        kernel = unstore(linear["quantized"], spec.architecture.linear_shape(name), form, jnp.float32)
    else:
        kernel = linear["kernel"].astype(jnp.float32)
    if "lora" in linear:
        kernel += jnp.matmul(linear["lora"]["down"], linear["lora"]["up"], precision="float32")
    return np.asarray(kernel.astype(spec.dtype))


def _special_tokens(tokenizer: "PreTrainedTokenizerBase | None") -> dict[str, int]:
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found = {name: getattr(tokenizer, name, None) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _write_routers(directory: Path, model: LoadedModel) -> list[NewTensor]:
    if model.spec.routing is None:
        return []
    news = [
        NewTensor(path.replace("/", "."), np.dtype(leaf.dtype), leaf.shape, partial(np.asarray, leaf))
        for path, leaf in flatten(model.params).items()
        if "/router/" in path
    ]
    write_file(directory / ROUTERS, news)
    quantization = model.spec.quantization
    document = {
        "format": FORMAT,
        "routing": _exported_routing(model.spec, model.spec.routing).model_dump(mode="json"),
        "quantization": None if quantization is None else quantization.model_dump(mode="json"),
    }
    _write_json(directory / ROUTING, document)
    return news


def _exported_routing(spec: ModelSpecification, routing: RoutingSpecification) -> RoutingSpecification:
    """The thresholds of a restored model stand under 16 bits, which is what it has become; it decides as before."""
    if spec.quantization is None:
        return routing
    width = str(spec.bits)
    calibration = {"16": routing.calibration[width]} if width in routing.calibration else {}
    return routing.model_copy(update={"thresholds": {"16": spec.thresholds}, "calibration": calibration})


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
