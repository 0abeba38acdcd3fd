"""Saving and loading a model directory."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import traverse_util
from jax.sharding import Sharding, SingleDeviceSharding

from qtale_jax.artifact.arrays import ArrayFiles, Flat, flatten, nest, write_arrays
from qtale_jax.artifact.atomic import new_directory
from qtale_jax.artifact.document import ModelDocument, read_model_json, versions
from qtale_jax.artifact.integrity import check_contents, check_files, record_files
from qtale_jax.artifact.tokenizer import check_tokenizer, load_tokenizer, save_tokenizer
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.processes import is_first

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
        if is_first():
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
    stored = StoredModel(path, shardings=shardings)
    return LoadedModel(stored.spec, nest(stored.read()), stored.tokenizer, stored.provenance)


class StoredModel:
    """A model directory that is open: what it is, and its arrays when they are asked for."""

    def __init__(self, path: str | Path, *, shardings: Parameters | Sharding | None = None):
        """Checks the files and reads everything but the arrays.

        Args:
            path: the model directory.
            shardings: as in `load_model`.

        Raises:
            InputError: missing, truncated or damaged (with the file), or arrays that do not match model.json.
        """
        path = Path(path)
        document = read_model_json(path)
        check_files(path / "arrays", document.files)
        check_contents(path / "arrays", document.files)
        self.spec, self.provenance = document.spec, document.provenance
        self.abstract = flatten(abstract_parameters(document.spec))
        if shardings is None:
            shardings = SingleDeviceSharding(jax.local_devices()[0])
        placed = dict.fromkeys(self.abstract, shardings) if isinstance(shardings, Sharding) else flatten(shardings)
        expected = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed[name])
            for name, leaf in self.abstract.items()
        }
        self.tokenizer = load_tokenizer(path)
        if self.tokenizer is not None:
            check_tokenizer(self.tokenizer, document.spec.architecture.vocab_size, str(path))
        self._files = ArrayFiles(path / "arrays", expected)

    def read(self, names: Iterable[str] | None = None) -> Flat:
        """Arrays by path; all of them by default."""
        return self._files.read(self.abstract if names is None else names)

    def layer(self, index: int) -> Parameters:
        """The parameters of one layer."""
        prefix = f"layers/{index}/"
        flat = self.read(name for name in self.abstract if name.startswith(prefix))
        return traverse_util.unflatten_dict({name.removeprefix(prefix): leaf for name, leaf in flat.items()}, sep="/")

    def part(self, name: str) -> Parameters:
        """The parameters outside the layers: embedding, head (absent in tied models: empty) or final_norm."""
        flat = self.read(path for path in self.abstract if path.startswith(f"{name}/"))
        return {path.split("/", 1)[1]: leaf for path, leaf in flat.items()}


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
