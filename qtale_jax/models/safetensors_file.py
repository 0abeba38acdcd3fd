"""The safetensors format, one tensor at a time: 8 bytes of header length, a JSON header, then the bytes of every tensor.

Reading maps the file and writing takes tensors from an iterator, so that neither needs a second copy of a model in
memory; damage is reported with file and tensor.
"""

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from qtale_jax.errors import InputError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
"""Types of the format that models are read from and written in."""

_LIMIT = 100 * 2**20  # what the format allows for a header


class Entry(NamedTuple):
    """Where a tensor lies: its type as the format names it, shape, and bytes [start, stop) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Planned(NamedTuple):
    """A tensor to be written: name, type as the format names it, shape, and what computes it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    compute: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(path: Path) -> dict[str, Entry]:
    """What a file holds, without its tensors.

    Raises:
        InputError: not there, not a safetensors file, or cut short.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LIMIT):
            raise InputError(f"{path} is not a whole safetensors file: {size} bytes, header of {length} bytes expected")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        entries = {
            name: Entry(
                str(value["dtype"]),
                tuple(map(int, value["shape"])),
                8 + length + int(value["data_offsets"][0]),
                8 + length + int(value["data_offsets"][1]),
            )
            for name, value in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path} is not a safetensors file: its header is damaged ({error!r})") from error
    for name, entry in entries.items():
        if entry.stop > size:
            raise InputError(f"{path} is cut short: {name} ends at byte {entry.stop}, but the file has {size} bytes")
    return entries


def read_tensor(path: Path, name: str, entry: Entry) -> np.ndarray:
    """The tensor as a read-only view of the mapped file.

    Raises:
        InputError: of a type that models do not have, or of another size than its shape says.
    """
    if entry.dtype not in DTYPES:
        raise InputError(f"{path}: {name} has type {entry.dtype}; supported: {', '.join(DTYPES)}")
    dtype = DTYPES[entry.dtype]
    found, expected = entry.stop - entry.start, math.prod(entry.shape) * dtype.itemsize
    if found != expected:
        raise InputError(f"{path}: {name} has {found} bytes, expected {expected} for {entry.dtype}{list(entry.shape)}")
    return np.memmap(path, dtype, "r", offset=entry.start, shape=entry.shape)


def write_file(path: Path, tensors: Iterable[Planned]) -> None:
    """Writes tensors one after the other, each computed when its turn comes.

    Raises:
        ValueError: a tensor comes out with another type or shape than planned.
    """
    # Wide types first keeps every tensor aligned to its own width, as the format's own library does.
    planned = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    offset = 0
    for tensor in planned:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little"))
        file.write(raw)
        for tensor in planned:
            array = tensor.compute()
            if array.dtype != DTYPES[tensor.dtype] or array.shape != tensor.shape:
                raise ValueError(f"{tensor.name} is {array.dtype}{array.shape}, planned {tensor.dtype}{tensor.shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
