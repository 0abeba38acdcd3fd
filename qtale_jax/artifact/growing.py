"""A model directory that is written layer by layer over a long time, and goes on where it was when it was killed.

    .NAME.partial/identity.json          what is being made; another identity is refused
    .NAME.partial/layers/00007.json      notes on a finished layer and the checksums of its files, written after them
    .NAME.partial/arrays/part-00007/     its arrays

When all is there, model.json and the tokenizer are added, the directory is renamed to NAME, and the notes go. A part is
itself written under a temporary name (Orbax does that) and counts only with its note, and while its files are what the
note says.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import traverse_util
from jax.sharding import SingleDeviceSharding

from qtale_jax.artifact.arrays import ArrayFiles, Flat, flatten, write_arrays
from qtale_jax.artifact.atomic import flush, refuse_existing
from qtale_jax.artifact.document import ModelDocument, versions
from qtale_jax.artifact.integrity import FileRecord, record_files
from qtale_jax.artifact.tokenizer import check_tokenizer, save_tokenizer
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.specification import ModelSpecification

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IDENTITY = "identity.json"


@dataclass(frozen=True)
class _Entry:
    """The note of a layer: its files as they were written, and what the caller wants to keep."""

    files: dict[str, FileRecord]
    note: dict[str, Any]


def check_target(path: str | Path, identity: Mapping[str, Any]) -> None:
    """Checks that a model can be grown at `path`, without writing anything.

    Raises:
        InputError: `path` exists, or something else was begun under this name, and in what the two differ.
    """
    refuse_existing(path)
    partial = _partial(path)
    file = partial / IDENTITY
    if file.is_file() and (found := file.read_text(encoding="utf-8", errors="replace")) != _text(identity):
        raise InputError(
            f"{partial} holds the beginning of another run ({_difference(found, identity)}); "
            "remove it or choose another output"
        )


def _partial(path: str | Path) -> Path:
    path = Path(path).absolute()
    return path.with_name(f".{path.name}.partial")


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, indent=1, sort_keys=True) + "\n"


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
        check_target(path, identity)
        self.path = Path(path).absolute()
        self._spec = spec
        self._partial = _partial(path)
        try:
            (self._partial / "layers").mkdir(parents=True, exist_ok=True)
            (self._partial / "arrays").mkdir(exist_ok=True)
            file = self._partial / IDENTITY
            if not file.exists():
                _write(file, _text(identity))
        except OSError as error:
            raise InputError(f"{self._partial}: cannot be written ({error.strerror})") from error

    def finished(self) -> dict[int, dict[str, Any]]:
        """Notes of the layers that are done, by layer; one whose files are not what was written is not done."""
        done = {}
        for index in range(self._spec.architecture.num_layers):
            entry = self._entry(index)
            if entry is not None and record_files(self._part(index)) == entry.files:
                done[index] = entry.note
        return done

    def add_layer(self, index: int, layer: Parameters, note: Mapping[str, Any]) -> None:
        """Writes a layer, then its note."""
        part = self._part(index)
        # Left by a process that was killed before it wrote the note, or damaged since.
        self._note(index).unlink(missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        flat = traverse_util.flatten_dict(layer, sep="/")
        with_prefix = {f"layers/{index}/{name}": flat[name] for name in self._names(index)}
        self._write_part(index, with_prefix)
        files = {name: asdict(record) for name, record in record_files(part).items()}
        _write(self._note(index), json.dumps({"files": files, "note": note}) + "\n")

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
        # What was recorded when a layer was written, rather than what is there now: later damage shows on loading.
        files: dict[str, FileRecord] = {}
        for index in range(layers):
            entry = self._entry(index)
            if entry is None:
                raise ValueError(f"layer {index} is missing")
            files |= {f"{self._part(index).name}/{name}": record for name, record in entry.files.items()}
        if tokenizer is not None:
            check_tokenizer(tokenizer, self._spec.architecture.vocab_size, str(self.path))
        arrays = self._partial / "arrays"
        for left in arrays.iterdir():  # of a process that was killed while it wrote
            if left not in {self._part(index) for index in range(layers)}:
                shutil.rmtree(left)
        for index in range(layers, write_arrays(arrays, rest, first_part=layers)):
            part = self._part(index)
            files |= {f"{part.name}/{name}": record for name, record in record_files(part).items()}
        if tokenizer is not None:
            save_tokenizer(tokenizer, self._partial)
        ModelDocument(self._spec, dict(provenance), versions(), files).write(self._partial)
        flush(self._partial)
        refuse_existing(self.path)
        if self.path.exists():  # empty: refuse_existing would have raised otherwise
            self.path.rmdir()
        self._partial.rename(self.path)
        shutil.rmtree(self.path / "layers")
        (self.path / IDENTITY).unlink()

    def discard(self) -> None:
        """Removes all that was written."""
        shutil.rmtree(self._partial)

    def _names(self, index: int) -> list[str]:
        prefix = f"layers/{index}/"
        return [n.removeprefix(prefix) for n in flatten(abstract_parameters(self._spec)) if n.startswith(prefix)]

    def _entry(self, index: int) -> _Entry | None:
        """What the note of a layer says; None if there is none, or it is damaged."""
        try:
            found = json.loads(self._note(index).read_text(encoding="utf-8"))
            return _Entry({name: FileRecord(**record) for name, record in found["files"].items()}, found["note"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _note(self, index: int) -> Path:
        return self._partial / "layers" / f"{index:05d}.json"

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
        before = _leaves(json.loads(found))
    except (ValueError, AttributeError):
        return f"its {IDENTITY} is damaged"
    now = _leaves(json.loads(_text(identity)))
    return f"it differs in {', '.join(sorted(k for k in before | now if before.get(k) != now.get(k)))}"


def _leaves(identity: dict[str, Any]) -> dict[str, Any]:
    """Two levels of keys, joined by a dot: enough to name a setting."""
    out = {}
    for name, value in identity.items():
        out |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return out
