"""Saving and loading a model directory."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Sharding, SingleDeviceSharding

from qtale_jax.artifact.arrays import Flat, flatten, nest, read_arrays, write_arrays
from qtale_jax.artifact.atomic import new_directory
from qtale_jax.artifact.document import ModelDocument, read_model_json, versions
from qtale_jax.artifact.integrity import check_contents, check_files, record_files
from qtale_jax.artifact.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.specification import ModelSpecification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedModel:
    """A whole model directory; parameters have one tree per layer."""

    spec: ModelSpecification
    params: Parameters
    tokenizer: "PreTrainedTokenizerBase | None"
    provenance: dict[str, Any]


def save_model(
    path: str | Path,
    spec: ModelSpecification,
    params: Parameters,
    *,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model directory under a temporary name and renames it when it is whole.

    Args:
        path: a directory that does not exist yet.
        spec: the static half.
        params: one tree per layer, matching `abstract_parameters(spec)` in names, shapes and types; leaves may be
            `Deferred`. With several processes every process calls this with its shards.
        tokenizer: a transformers tokenizer to store beside, or None.
        provenance: where the model comes from; JSON.
        overwrite: replace `path` if it is a model directory.

    Raises:
        InputError: `path` exists, or the tokenizer knows more tokens than the embedding has rows.
        ValueError: the parameters do not match the specification.
    """
    if tokenizer is not None:
        check_tokenizer(tokenizer, spec.architecture.vocab_size, str(path))
    flat, expected = flatten(params), flatten(abstract_parameters(spec))
    _check_parameters(flat, expected)
    with new_directory(path, overwrite=overwrite, replaceable=lambda old: (old / "model.json").is_file()) as directory:
        write_arrays(directory / "arrays", {name: flat[name] for name in expected})
        if jax.process_index() == 0:
            if tokenizer is not None:
                save_tokenizer(tokenizer, directory)
            files = record_files(directory / "arrays")
            ModelDocument(spec, dict(provenance or {}), versions(), files).write(directory)


def _check_parameters(flat: Flat, expected: dict[str, jax.ShapeDtypeStruct]) -> None:
    if wrong := sorted(flat.keys() ^ expected.keys()):
        raise ValueError(f"parameters do not match the specification: {wrong[:4]} ({len(wrong)} in all)")
    for name, leaf in expected.items():
        if flat[name].shape != leaf.shape or flat[name].dtype != leaf.dtype:
            raise ValueError(f"{name} is {flat[name].dtype}{flat[name].shape}, expected {leaf.dtype}{leaf.shape}")


def load_model(path: str | Path, *, shardings: Parameters | Sharding | None = None) -> LoadedModel:
    """Loads a model directory.

    Args:
        path: the model directory.
        shardings: a sharding per parameter (a tree like the parameters), or one for all; arrays go from disk straight
            into their shards. Default: all on the first device.

    Raises:
        InputError: missing, truncated or damaged (with the file), or arrays that do not match model.json.
    """
    path = Path(path)
    document = read_model_json(path)
    check_files(path / "arrays", document.files)
    check_contents(path / "arrays", document.files)
    abstract = flatten(abstract_parameters(document.spec))
    if shardings is None:
        shardings = SingleDeviceSharding(jax.local_devices()[0])
    placed = dict.fromkeys(abstract, shardings) if isinstance(shardings, Sharding) else flatten(shardings)
    expected = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name]) for name, leaf in abstract.items()
    }
    tokenizer = load_tokenizer(path)
    if tokenizer is not None:
        check_tokenizer(tokenizer, document.spec.architecture.vocab_size, str(path))
    params = nest(read_arrays(path / "arrays", expected))
    return LoadedModel(document.spec, params, tokenizer, document.provenance)


def fingerprint(path: str | Path) -> str:
    """SHA-256 over model.json and the contents of every array file: equal fingerprints, equal models.

    Raises:
        InputError: not a model directory, or incomplete.
    """
    path = Path(path)
    files = read_model_json(path).files
    check_files(path / "arrays", files)
    digest = hashlib.sha256((path / "model.json").read_bytes())
    for name in sorted(files):
        digest.update(name.encode())
        with (path / "arrays" / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
