"""A model directory that is written layer by layer over a long time, and goes on where it was when it was killed.

    .NAME.partial/identity.json          what is being made; another identity is refused
    .NAME.partial/layers/00007.json      notes on a finished layer, written after its arrays
    .NAME.partial/arrays/part-00007/     its arrays

When all is there, model.json and the tokenizer are added, the directory is renamed to NAME, and the notes go. A part is
itself written under a temporary name (Orbax does that) and counts only with its note.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from qtale_jax.artifact.arrays import ArrayFiles, Flat, flatten, write_arrays
from qtale_jax.artifact.atomic import flush, refuse_existing
from qtale_jax.artifact.document import ModelDocument, versions
from qtale_jax.artifact.integrity import record_files
from qtale_jax.artifact.tokenizer import check_tokenizer, save_tokenizer
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.specification import ModelSpecification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class GrowingModel:
    """Writes a model directory layer by layer; see the module."""

    def __init__(self, path: str | Path, spec: ModelSpecification, identity: Mapping[str, Any]):
        """Starts, or finds what an earlier process left.

        Args:
            path: the directory to make; it does not exist yet.
            spec: of the finished model.
            identity: everything that decides what is written, as JSON.

        Raises:
            InputError: `path` exists, cannot be created, or something else was begun under this name.
        """
        self.path = Path(path).absolute()
        refuse_existing(self.path)
        self._spec = spec
        self._partial = self.path.with_name(f".{self.path.name}.partial")
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        try:
            (self._partial / "layers").mkdir(parents=True, exist_ok=True)
            (self._partial / "arrays").mkdir(exist_ok=True)
            file = self._partial / "identity.json"
            if not file.exists():
                _write(file, text)
        except OSError as error:
            raise InputError(f"{self._partial}: cannot be written ({error.strerror})") from error
        if (found := file.read_text(encoding="utf-8")) != text:
            raise InputError(
                f"{self._partial} holds the beginning of another run ({_difference(found, identity)}); "
                "remove it or choose another output"
            )

    def finished(self) -> dict[int, dict[str, Any]]:
        """Notes of the layers that are done, by layer."""
        notes = sorted((self._partial / "layers").glob("*.json"))
        return {int(note.stem): json.loads(note.read_text(encoding="utf-8")) for note in notes}

    def add_layer(self, index: int, layer: Parameters, note: Mapping[str, Any]) -> None:
        """Writes a layer, then its note."""
        part = self._part(index)
        shutil.rmtree(part, ignore_errors=True)  # left by a process that was killed before it wrote the note
        flat = traverse_util.flatten_dict(layer, sep="/")
        with_prefix = {f"layers/{index}/{name}": flat[name] for name in self._names(index)}
        self._write_part(index, with_prefix)
        _write(self._partial / "layers" / f"{index:05d}.json", json.dumps(note) + "\n")

    def layer(self, index: int) -> Parameters:
        """Reads a finished layer back."""
        expected = flatten(abstract_parameters(self._spec))
        here = SingleDeviceSharding(jax.local_devices()[0])
        wanted = {
            f"layers/{index}/{name}": jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for name in self._names(index)
            for leaf in [expected[f"layers/{index}/{name}"]]
        }
        flat = ArrayFiles(self._part(index).parent, wanted, only=self._part(index).name).read(wanted)
        return traverse_util.unflatten_dict({name.split("/", 2)[2]: leaf for name, leaf in flat.items()}, sep="/")

    def finish(self, rest: Flat, *, tokenizer: "PreTrainedTokenizerBase | None", provenance: Mapping[str, Any]) -> None:
        """Writes what is outside the layers and everything else, and renames the directory.

        Args:
            rest: arrays (or `Deferred`) of embedding, head and final norm, by path.
            tokenizer: to store beside, or None.
            provenance: where the model comes from; JSON.

        Raises:
            InputError: the tokenizer does not fit, or the name was taken meanwhile.
            ValueError: a layer is missing.
        """
        layers = self._spec.architecture.num_layers
        if missing := sorted(set(range(layers)) - self.finished().keys()):
            raise ValueError(f"layer {missing[0]} is missing")
        if tokenizer is not None:
            check_tokenizer(tokenizer, self._spec.architecture.vocab_size, str(self.path))
        arrays = self._partial / "arrays"
        for left in arrays.iterdir():  # of a process that was killed while it wrote
            if left not in {self._part(index) for index in range(layers)}:
                shutil.rmtree(left)
        write_arrays(arrays, rest, first_part=layers)
        if tokenizer is not None:
            save_tokenizer(tokenizer, self._partial)
        ModelDocument(self._spec, dict(provenance), versions(), record_files(arrays)).write(self._partial)
        flush(self._partial)
        refuse_existing(self.path)
        if self.path.exists():  # empty: refuse_existing would have raised otherwise
            self.path.rmdir()
        self._partial.rename(self.path)
        shutil.rmtree(self.path / "layers")
        (self.path / "identity.json").unlink()

    def _names(self, index: int) -> list[str]:
        prefix = f"layers/{index}/"
        return [n.removeprefix(prefix) for n in flatten(abstract_parameters(self._spec)) if n.startswith(prefix)]

    def _part(self, index: int) -> Path:
        return self._partial / "arrays" / f"part-{index:05d}"

    def _write_part(self, index: int, flat: Flat) -> None:
        expected = flatten(abstract_parameters(self._spec))
        for name, leaf in flat.items():
            want = expected[name]
            if leaf.shape != want.shape or leaf.dtype != want.dtype:
                raise ValueError(f"{name} is {leaf.dtype}{leaf.shape}, expected {want.dtype}{want.shape}")
        write_arrays(self._part(index).parent, flat, first_part=index, part_bytes=math.inf)


def _write(file: Path, text: str) -> None:
    """Writes a small file whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)


def _difference(found: str, identity: Mapping[str, Any]) -> str:
    try:
        before = json.loads(found)
    except ValueError:
        return "its identity.json is damaged"
    names = [name for name in {**before, **identity} if before.get(name) != json.loads(json.dumps(identity.get(name)))]
    return f"it differs in {', '.join(sorted(names))}"
