"""Published tasks as TensorFlow Datasets (TFDS) prepares them: rows of ArrayRecord files, read without TensorFlow.

A data set is opened by what its folder says of itself, not by the code that prepared it: part of that code imports
TensorFlow.
"""

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import constants

from qtale_jax.errors import InputError


def find(name: str, folder: str | None) -> Path | None:
    """The newest version of a data set that is prepared.

    Args:
        name: "builder", or "builder/config".
        folder: TFDS's `data_dir`; None: its default, TFDS_DATA_DIR or tensorflow_datasets in the home folder.

    Returns:
        The folder of the version; None if there is none.
    """
    root = Path(constants.DATA_DIR if folder is None else folder) / name
    # What a killed preparation has left is named "incomplete.XXXXXX_VERSION".
    versions = [
        path.parent for path in root.glob("*/dataset_info.json") if tfds.core.Version.is_valid(path.parent.name)
    ]
    return max(versions, key=lambda path: tfds.core.Version(path.name), default=None)


def is_readable(directory: Path) -> bool:
    """Whether a prepared data set is in a format that is read without TensorFlow.

    Raises:
        InputError: what describes the data set is damaged.
    """
    return _is_readable(_open(directory))


def rows(directory: Path, split: str) -> list[dict[str, Any]]:
    """All rows of a split, as Python objects: texts, numbers, and lists and dictionaries of them.

    Args:
        directory: what `find` returned.
        split: a split that the data set has.

    Raises:
        InputError: the format needs TensorFlow, or the files are damaged.
    """
    builder = _open(directory)
    if not _is_readable(builder):
        format = builder.info.file_format
        raise InputError(
            f"{directory} is stored as {format.value if format else 'an unknown format'}, which only TensorFlow reads; "
            f"{how_to_prepare(_name(builder), None)} (another folder: TFDS keeps to the format that it finds)"
        )
    try:
        # The decorators of TFDS hide the method's parameters from type checkers.
        source: Any = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
        found = [_plain(row) for row in source.__getitems__(range(len(source)))]
    except Exception as error:  # readers of shards, of records and of text fail each in their own way
        raise _damaged(directory, f"split {split!r} cannot be read ({_reason(error)})") from error
    for number, row in enumerate(found, 1):
        # Of a shard that was cut off, ArrayRecord gives empty records.
        if None in row.values():
            raise _damaged(directory, f"split {split!r}, row {number} is empty")
    return found


def how_to_prepare(name: str, folder: str | None) -> str:
    """What to run, and where, to have a data set that can be read here; `folder` as in `find`."""
    place = folder or "FOLDER"
    return (
        'prepare it where there are a network and TensorFlow, with python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{name}', data_dir='{place}', file_format='array_record').download_and_prepare()\", "
        f"and set data.path={place}"
    )


def _open(directory: Path) -> tfds.core.DatasetBuilder:
    try:
        return tfds.builder_from_directory(str(directory))
    except Exception as error:  # two JSON files, of which each may be missing, cut off, or of something else
        raise _damaged(directory, f"cannot be opened ({_reason(error)})") from error


def _is_readable(builder: tfds.core.DatasetBuilder) -> bool:
    return bool(builder.info.available_file_formats() & tfds.core.FileFormat.with_random_access())


def _name(builder: tfds.core.DatasetBuilder) -> str:
    return f"{builder.name}/{builder.builder_config.name}" if builder.builder_config else builder.name


def _damaged(directory: Path, what: str) -> InputError:
    return InputError(f"{directory}: {what}; remove that folder and prepare it again, or set data.source=datasets")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"


def _plain(value: Any) -> Any:
    """A value as Python has it: TFDS gives text as bytes, and numbers and lists as NumPy's."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | np.ndarray):
        return [_plain(each) for each in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value
