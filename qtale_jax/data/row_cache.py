"""Rows of the generated suites, kept on disk: the many short trainings of an experiment read and tokenize once."""

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from qtale_jax.config.schema import DataConfig
from qtale_jax.data import reasoning, sources
from qtale_jax.data.rows import NAMES, Rows
from qtale_jax.data.tokens import Counts

LAYOUT = 1
"""Changes with what rows hold, so that files of another version are not taken."""


def row_file(config: DataConfig, tokenizer: Any, split: str) -> Path | None:
    """Where the rows of a split are kept; None for data that is not generated, as its files may change.

    The name covers all that rows depend on: the data section but for its place, the suite's version and the tokenizer.
    """
    if config.kind != "reasoning":
        return None
    folder, name = sources.reasoning_folder(config), sources.STORED[config.suite]
    asked = [LAYOUT, str(reasoning.Reasoning.VERSION), name, split, config.model_dump(mode="json", exclude={"path"})]
    text = json.dumps([*asked, tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return folder / "rows" / f"{name}-{split}-{digest[:16]}.npz"


def read_rows(file: Path) -> tuple[Rows, Counts] | None:
    """Rows and counts that `write_rows` stored; None where there are none, or where the file is damaged."""
    try:
        with file.open("rb") as stream, np.load(stream) as stored:
            arrays = dict(stored)
    except Exception:  # what is damaged may fail in any layer of zip, npy and header: it is made again
        return None
    if arrays.keys() != {"counts", *NAMES}:
        return None
    return arrays, Counts(*arrays.pop("counts").tolist())


def write_rows(file: Path, rows: Rows, counts: Counts) -> None:
    """Stores rows at once: a reader finds all of them or none. A disk that is full or read-only costs time only."""
    scratch = file.with_name(f".{os.getpid()}-{file.name}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # The name has to end in .npz.
        np.savez_compressed(scratch, counts=np.asarray(counts), **rows)  # pyright: ignore[reportArgumentType]
        scratch.replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            scratch.unlink()
