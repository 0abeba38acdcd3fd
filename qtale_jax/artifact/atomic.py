"""A directory that appears whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import from_first, is_first, wait_for_all


def refuse_existing(path: str | Path) -> None:
    """Raises what `new_directory` would; stages call it before they work, so that nothing is computed for nothing.

    Raises:
        InputError: `path` exists and is not an empty directory.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise InputError(f"{path} exists already; choose another output or remove it")


@contextmanager
def new_directory(
    path: str | Path, *, overwrite: bool = False, replaceable: Callable[[Path], bool] = lambda _: False
) -> Iterator[Path]:
    """Yields a temporary sibling of `path`; when the block ends well, flushes it to disk and renames it to `path`.

    When the block raises, the temporary directory is removed and `path` is as it was. With several processes, which
    must share the file system, all enter the block with the same temporary directory and process 0 renames.

    Args:
        path: a directory that does not exist yet, or an empty one.
        overwrite: allow `path` to exist if `replaceable(path)`; the old directory is moved aside, then deleted.
        replaceable: says whether an existing directory is of the kind that may be overwritten.

    Raises:
        InputError: `path` exists and may not be overwritten, or cannot be created.
    """
    path = Path(path).absolute()
    if not (overwrite and replaceable(path)):
        refuse_existing(path)
    token = from_first(f"name of {path.name}", uuid.uuid4().hex[:8])
    temporary = path.with_name(f".{path.name}.{token}.tmp")
    first = is_first()
    try:
        if first:
            _create(temporary)
        wait_for_all(f"{path.name} created")
        yield temporary
        wait_for_all(f"{path.name} written")
        if first:
            flush(temporary)
            _replace(path, temporary, token)
        wait_for_all(f"{path.name} renamed")
    finally:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)


def _create(directory: Path) -> None:
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir()
    except OSError as error:
        raise InputError(f"{directory.parent}: cannot create a directory there ({error.strerror})") from error


def _replace(path: Path, temporary: Path, token: str) -> None:
    old = path.with_name(f".{path.name}.{token}.old")
    if path.exists():
        path.rename(old)
    temporary.rename(path)
    _flush_directory(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def flush(root: Path) -> None:
    """Writes all files below `root` through: a rename is only safe after a power cut when what it names is on disk."""
    for directory, _, files in os.walk(root):
        for name in files:
            with open(os.path.join(directory, name), "rb") as file:
                os.fsync(file.fileno())
        _flush_directory(Path(directory))


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
