"""Size and checksum of every array file: a truncated or damaged file is found, and named, before it is used.

Orbax itself notices truncation, but stores what does not compress without a checksum.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path

import jax

from qtale_jax.errors import InputError

_BLOCK = 2**22


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    crc32: int


def record_files(directory: Path) -> dict[str, FileRecord]:
    """Records every file below `directory`, by relative path."""
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): FileRecord(file.stat().st_size, _crc32(file)) for file in files}


def check_files(directory: Path, records: dict[str, FileRecord]) -> None:
    """Compares the sizes of the files below `directory` with what was recorded.

    Raises:
        InputError: a file is missing or has another size, with its name.
    """
    for name, record in records.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{file} is missing: the model directory is incomplete")
        if (found := file.stat().st_size) != record.bytes:
            raise InputError(f"{file} has {found} bytes, expected {record.bytes}: it is truncated or damaged")


def check_contents(directory: Path, records: dict[str, FileRecord]) -> None:
    """Compares checksums; of several processes, each reads its share of the files.

    Raises:
        InputError: a file has other contents, with its name.
    """
    for name in sorted(records)[jax.process_index() :: jax.process_count()]:
        if _crc32(directory / name) != records[name].crc32:
            raise InputError(f"{directory / name} is damaged: its contents changed since it was written")


def _crc32(file: Path) -> int:
    total = 0
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            total = zlib.crc32(block, total)
    return total
