"""Examples -> rows of one length: padded one by one, or packed several to a row and kept apart by segment ids."""

import hashlib
from collections.abc import Sequence

import numpy as np

from qtale_jax.data.tokens import Tokens

Rows = dict[str, np.ndarray]
"""tokens and targets int32, weights float32, segment_ids int32, all (rows, length).

`targets` is the next token of the same example; `weights` is 1 where that target counts in the loss. `segment_ids` is 0
for padding and numbers the examples of a row from 1; positions restart with each.
"""


NAMES = ("tokens", "targets", "weights", "segment_ids")
"""The arrays of `Rows`."""


def first_fit(lengths: Sequence[int], capacity: int, open_rows: int = 64) -> list[list[int]]:
    """Assigns examples to rows in order: each goes to the oldest of the last `open_rows` rows with room.

    Deterministic in the order of `lengths`; no example is split or lost.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index, length in enumerate(lengths):
        for row in range(max(0, len(rows) - open_rows), len(rows)):
            if room[row] >= length:
                break
        else:
            row = len(rows)
            rows.append([])
            room.append(capacity)
        rows[row].append(index)
        room[row] -= length
    return rows


def build_rows(examples: Sequence[Tokens], length: int, packing: bool) -> Rows:
    """Lays examples out; every example has at most `length` tokens."""
    groups = first_fit([len(e.ids) for e in examples], length) if packing else [[i] for i in range(len(examples))]
    shape = (len(groups), length)
    out: Rows = {name: np.zeros(shape, np.int32) for name in NAMES if name != "weights"}
    out["weights"] = np.zeros(shape, np.float32)
    for row, members in enumerate(groups):
        at = 0
        for segment, member in enumerate(members, 1):
            ids, start = examples[member]
            end = at + len(ids)
            out["tokens"][row, at:end] = ids
            out["targets"][row, at : end - 1] = ids[1:]
            out["weights"][row, at + start - 1 : end - 1] = 1.0
            out["segment_ids"][row, at:end] = segment
            at = end
    return out


def digest(rows: Rows) -> str:
    """SHA-256 of everything that rows hold."""
    found = hashlib.sha256()
    for name in sorted(rows):
        found.update(f"{name} {rows[name].shape}".encode())
        found.update(rows[name].tobytes())
    return found.hexdigest()


def empty_like(rows: Rows, count: int) -> Rows:
    """Rows of padding, which fill a last batch up."""
    return {name: np.zeros((count, *array.shape[1:]), array.dtype) for name, array in rows.items()}
