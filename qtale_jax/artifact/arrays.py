"""Parameters on disk: Orbax checkpoints ("parts") of half a gigabyte each, written and read one after the other.

Orbax keeps its own copies of what it is writing until it commits. Parts bound that to a part, whatever the size of the
model, and let a checkpoint be converted while no more than one part of it is in memory.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from orbax.checkpoint import v1 as ocp

from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.quantization.storage import array_bytes

# Orbax reports every save and load through absl, and failures of its threads, which it raises as well, with tracebacks.
logging.getLogger("absl").setLevel(logging.CRITICAL)

PART_BYTES = 2**29
"""A part takes parameters as long as it holds at most this many bytes; a larger parameter is a part of its own."""

Flat = dict[str, Any]
"""Leaves by path, "layers/0/attention/query/kernel"."""


@dataclass(frozen=True)
class Deferred:
    """Stands for an array that is read (as NumPy) only when its part is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


def flatten(params: Parameters) -> Flat:
    """Nested parameters with one tree per layer -> leaves by path."""
    named = {**params, "layers": {str(index): layer for index, layer in params["layers"].items()}}
    return traverse_util.flatten_dict(named, sep="/")


def nest(flat: Flat) -> Parameters:
    """Inverse of `flatten`; layer indices become ints again, in order."""
    params = traverse_util.unflatten_dict(flat, sep="/")
    params["layers"] = {index: params["layers"][str(index)] for index in sorted(map(int, params["layers"]))}
    return params


def saving_context() -> ocp.Context:
    """How Orbax saves: only large arrays are cut into slices that replicas write in parallel.

    Left to itself, Orbax cuts every replicated array, and every slice is one more program to compile: minutes for a
    model of many small arrays.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = 2**26
    return context


def write_arrays(directory: Path, flat: Flat, first_part: int = 0, part_bytes: float | None = None) -> int:
    """Writes leaves (JAX or NumPy arrays, or `Deferred`) below `directory`, as parts from `first_part` on.

    A part takes leaves as long as it holds at most `part_bytes` (default: PART_BYTES).

    float32, bfloat16, float16, int8, int4, uint8 and uint32 come back bit for bit; Orbax cannot store uint4.

    Returns:
        The number of the next part.
    """
    parts = list(_parts(flat, PART_BYTES if part_bytes is None else part_bytes))
    for index, names in enumerate(parts, first_part):
        leaves = {}
        for name in names:
            leaf = flat[name]
            leaves[name] = leaf.read() if isinstance(leaf, Deferred) else leaf
        with saving_context():
            part = (directory / f"part-{index:05d}").resolve()
            ocp.save(str(part), traverse_util.unflatten_dict(leaves, sep="/"))
    return first_part + len(parts)


def _parts(flat: Flat, most: float) -> Iterator[list[str]]:
    names, held = [], 0
    for name, leaf in flat.items():
        size = array_bytes(leaf)
        if names and held + size > most:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    if names:
        yield names


def read_arrays(directory: Path, expected: dict[str, jax.ShapeDtypeStruct]) -> Flat:
    """Reads all parts straight into the shardings of `expected`.

    Raises:
        InputError: names, shapes or types differ from what is expected, or the files are damaged.
    """
    return ArrayFiles(directory, expected).read(expected)


class ArrayFiles:
    """The parts below a directory, of which leaves are read when they are wanted."""

    def __init__(self, directory: Path, expected: dict[str, jax.ShapeDtypeStruct], only: str = "part-*"):
        """Reads what the parts hold, but no array.

        Args:
            directory: where the parts are.
            expected: all that they hold, with the sharding in which it is wanted.
            only: pattern of the parts that count.

        Raises:
            InputError: names, shapes or types differ from what is expected, or the files are damaged.
        """
        stored = {part: _metadata(part) for part in sorted(directory.glob(only))}
        _check_contents(
            directory, {name: leaf for leaves in stored.values() for name, leaf in leaves.items()}, expected
        )
        self._expected = expected
        self._parts = {part: tuple(leaves) for part, leaves in stored.items()}

    def read(self, names: Iterable[str]) -> Flat:
        """Reads some leaves, in the order of `names`.

        Raises:
            InputError: the files are damaged.
        """
        wanted, flat = dict.fromkeys(names), {}
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        for part, leaves in self._parts.items():
            chosen = {name: self._expected[name] for name in leaves if name in wanted}
            if not chosen:
                continue
            try:
                with context:
                    loaded = ocp.load(str(part.resolve()), traverse_util.unflatten_dict(chosen, sep="/"))
            except Exception as error:  # whatever Orbax and TensorStore find wrong with the files
                raise InputError(f"{part} is damaged: {_first_line(error)}") from error
            flat |= traverse_util.flatten_dict(loaded, sep="/")
        return {name: flat[name] for name in wanted}


def _metadata(part: Path) -> Flat:
    try:
        return traverse_util.flatten_dict(ocp.metadata(str(part.resolve())).metadata, sep="/")
    except Exception as error:  # as above
        raise InputError(f"{part} is damaged: {_first_line(error)}") from error


def _check_contents(directory: Path, stored: Flat, expected: dict[str, jax.ShapeDtypeStruct]) -> None:
    if missing := sorted(expected.keys() - stored.keys()):
        raise InputError(f"{directory}: {missing[0]} is missing ({len(missing)} in all)")
    if extra := sorted(stored.keys() - expected.keys()):
        raise InputError(f"{directory}: {extra[0]} is not part of the model that model.json describes")
    for name, want in expected.items():
        found = stored[name]
        if tuple(found.shape) != want.shape or np.dtype(found.dtype) != want.dtype:
            raise InputError(
                f"{directory}: {name} is {np.dtype(found.dtype)}{tuple(found.shape)}, "
                f"model.json says {want.dtype}{want.shape}"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
