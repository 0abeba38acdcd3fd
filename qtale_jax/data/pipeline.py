"""The Grain pipeline: shuffled, repeated, batched, sharded by process, resumable at any batch.

Rows are tokenized once and held as arrays; Grain orders indices. Indices are batched before rows are gathered, so that
the host's work per batch is one fancy index instead of a Python call per row.
"""

import logging
from typing import Any, Self

import grain
import numpy as np
from jaxtyping import Int

from qtale_jax.config.schema import Config
from qtale_jax.data.row_cache import read_rows, row_file, write_rows
from qtale_jax.data.rows import Rows, build_rows, digest, empty_like
from qtale_jax.data.tokens import examples

log = logging.getLogger(__name__)

Part = Int[np.ndarray, " rows"] | slice
"""Which rows of every global batch."""

WHOLE = slice(None)


class Pipeline:
    """An iterator over this process's part of every global batch.

    `get_state` / `set_state` save and restore the position; the state is JSON, and the same in all processes. The
    training split repeats for ever, reshuffled in every epoch; the others pass once, and the last batch is filled up
    with padding rows.
    """

    def __init__(self, rows: Rows, iterator: Any, part: Part):
        self._rows, self._iterator, self._part = rows, iterator, part

    @property
    def size(self) -> int:
        """Rows of the split, those of all processes together."""
        return len(self._rows["tokens"])

    @property
    def digest(self) -> str:
        """`rows.digest` of the split."""
        return digest(self._rows)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Rows:
        indices = np.asarray(next(self._iterator))[self._part]
        real = indices >= 0
        batch = {name: array[np.where(real, indices, 0)] for name, array in self._rows.items()}
        if not real.all():
            padding = empty_like(self._rows, len(indices))
            batch = {n: np.where(real[:, None], array, padding[n]) for n, array in batch.items()}
        return batch

    def get_state(self) -> dict:
        """Position after the last batch returned."""
        return self._iterator.get_state()

    def set_state(self, state: dict) -> None:
        """Continues after the batch that was last when `state` was taken."""
        self._iterator.set_state(state)


def load_rows(config: Config, tokenizer: Any, split: str, keep: bool = False) -> Rows:
    """Reads, tokenizes and lays out one split.

    Args:
        config: data section.
        tokenizer: of the model.
        split: which one.
        keep: store the rows of a generated suite beside it, for the next process. They are used wherever they are.

    Raises:
        InputError: bad data.
    """
    file = row_file(config.data, tokenizer, split)
    stored = None if file is None else read_rows(file)
    if stored is None:
        found, counts = examples(config, tokenizer, split)
        rows = build_rows(found, config.data.length, config.data.packing)
        if keep and file is not None:
            write_rows(file, rows, counts)
    else:
        rows, counts = stored
    level = logging.WARNING if counts.truncated + counts.dropped else logging.INFO  # what is lost is always said
    log.log(
        level,
        "%s: %d examples read, %d truncated to data.length=%d, %d dropped; %d rows",
        split,
        counts.read,
        counts.truncated,
        config.data.length,
        counts.dropped,
        len(rows["tokens"]),
    )
    return rows


def build_pipeline(
    config: Config,
    tokenizer: Any,
    *,
    split: str,
    batch_size: int,
    part: Part = WHOLE,
    seed: int = 0,
) -> Pipeline:
    """Builds the pipeline of one split.

    Args:
        config: data section and model-independent settings.
        tokenizer: of the model.
        split: "train" repeats and shuffles; "calibration", "validation" and "test" do neither.
        batch_size: rows of the global batch.
        part: which of them this process gets.
        seed: of the order of the training split.

    Raises:
        InputError: bad data.
    """
    return from_rows(load_rows(config, tokenizer, split, keep=True), split, batch_size, seed, part)


def from_rows(rows: Rows, split: str, batch_size: int, seed: int, part: Part = WHOLE) -> Pipeline:
    """The pipeline over rows that are laid out already."""
    count = len(rows["tokens"])
    if split == "train":
        indices = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    else:
        indices = grain.MapDataset.source([i if i < count else -1 for i in range(-(-count // batch_size) * batch_size)])
    batched = indices.batch(batch_size, drop_remainder=True)
    iterator = iter(batched.to_iter_dataset(grain.ReadOptions(num_threads=0)))
    return Pipeline(rows, iterator, part)
