"""safetensors files, read through memory maps and written tensor by tensor.

The format is eight bytes of header length (little endian), a JSON header of types, shapes and offsets, then the data.
Reading it directly costs no copy and covers bfloat16, which NumPy alone does not have.
"""

import json
import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from qtale_jax.errors import InputError
from qtale_jax.models.huggingface.config import read_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types that weights may have; a model is never stored in float64."""
WORDS = {"I32": np.dtype(np.int32)}
"""Types that packed integers and what belongs to them may have."""
PACKED = ("qweight", "qzeros", "g_idx")
"""Last parts of the names of tensors of whole numbers."""
CODES = {dtype: code for code, dtype in (DTYPES | WORDS).items()}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, not yet read."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * self.dtype.itemsize

    def map(self) -> np.ndarray:
        """The tensor as a read-only view of the file; pages are read as they are touched."""
        return np.memmap(self.file, dtype=self.dtype, mode="r", offset=self.offset, shape=self.shape)


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `read` is called when its turn comes and its result is dropped afterwards."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size of its data."""
        return self.size * self.dtype.itemsize


def read_file(file: Path) -> dict[str, StoredTensor]:
    """Reads the header of one file.

    Raises:
        InputError: missing, truncated, damaged, or a tensor of a type that weights do not have.
    """
    if not file.is_file():
        raise InputError(f"{file} is missing")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if 8 + length > size:
            raise InputError(f"{file} is truncated or not a safetensors file: {size} bytes, its header alone says more")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{file} is damaged: its header cannot be read ({error})") from error
    return {name: _stored(file, name, 8 + length, size, *entry) for name, entry in entries.items()}


def _stored(
    file: Path, name: str, data: int, size: int, code: str, shape: tuple[int, ...], begin: int, end: int
) -> StoredTensor:
    allowed = WORDS if name.rsplit(".", 1)[-1] in PACKED else DTYPES
    if code not in allowed:
        raise InputError(f"{file}: {name} has type {code}; allowed: {', '.join(allowed)}")
    if end - begin != math.prod(shape) * allowed[code].itemsize:
        raise InputError(f"{file} is damaged: {name} takes {end - begin} bytes, its shape {shape} in {code} does not")
    if data + end > size:
        raise InputError(f"{file} is truncated: {size} bytes, {name} ends at byte {data + end}")
    return StoredTensor(file, allowed[code], shape, data + begin)


def read_checkpoint(directory: Path) -> dict[str, StoredTensor]:
    """Headers of a checkpoint, one file or sharded; no tensor is read.

    Raises:
        InputError: no safetensors there, or files that are missing or damaged.
    """
    if (directory / SINGLE).is_file():
        return read_file(directory / SINGLE)
    if not (directory / INDEX).is_file():
        other = next(directory.glob("*.bin"), None)
        hint = f"; {other.name} is a pickle: save the model again with safe_serialization=True" if other else ""
        raise InputError(f"{directory}: neither {SINGLE} nor {INDEX} is there{hint}")
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise InputError(f"{directory / INDEX}: weight_map, from tensor names to files, is missing")
    shards = {}
    for name in sorted(set(index.values())):
        if Path(name).name != name:
            raise InputError(f"{directory / INDEX}: {name!r} is not a file name")
        shards[name] = read_file(directory / name)
    for tensor, name in index.items():
        if tensor not in shards[name]:
            raise InputError(f"{directory / name}: tensor {tensor} is missing, {INDEX} says it is there")
    return {tensor: shards[name][tensor] for tensor, name in index.items()}


def write_checkpoint(directory: Path, tensors: Sequence[NewTensor], shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Writes tensors in order, to one file or, above `shard_bytes`, to several with an index; returns their names."""
    shards: list[list[NewTensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(entry.nbytes for entry in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        write_file(directory / SINGLE, tensors)
        return [SINGLE]
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)},
        "weight_map": {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*names, INDEX]


def write_file(file: Path, tensors: Sequence[NewTensor]) -> None:
    """Writes one file, holding one tensor at a time."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)))
        stream.write(text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.read(), dtype=tensor.dtype)
            if array.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {array.shape}, announced as {tensor.shape}")
            stream.write(array.view(np.uint8).data if array.size else b"")
