"""Checkpoints for resuming: state, data position and metric in one Orbax step directory."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32
from orbax.checkpoint import v1 as ocp

from qtale_jax.artifact import saving_context
from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import from_first, is_first, wait_for_all
from qtale_jax.training.step import TrainState

log = logging.getLogger(__name__)


class DamagedCheckpoint(Exception):
    """A checkpoint cannot be read, or holds other values than were saved."""


@jax.jit
def checksum(state: Any) -> UInt32[Array, ""]:
    """A number that changes if any bit of any array does, whatever the sharding.

    Every word is weighted with an odd number, its place, which is invertible modulo 2^32: no single word is missed.
    """
    total = jnp.zeros((), jnp.uint32)
    for number, leaf in enumerate(jax.tree.leaves(state)):
        total += jnp.uint32(2 * number + 1) * _weighted_sum(leaf)
    return total


@jax.jit  # traced once for each shape
def _weighted_sum(array: Array) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).astype(jnp.uint32)
    places = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(bits.shape):  # row-major, without reshaping what is sharded
        places = places * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * places + 1), dtype=jnp.uint32)


class Checkpoints:
    """Numbered checkpoints in one directory: the newest `keep`, and the best by validation metric (lower is better).

    A checkpoint that was being written when the process died has a temporary name; it is removed on opening. All
    processes of a run open, save, restore and close together.
    """

    def __init__(self, directory: Path, keep: int):
        """Opens the directory, which is made if need be.

        Raises:
            InputError: the processes of a run do not see the same checkpoints.
        """
        self._directory = directory.resolve()
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=1, get_metric_fn=lambda metrics: -metrics["validation"], keep_checkpoints_without_metrics=False
        )
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory),
            # Orbax annotates its policies and the argument that takes them with different types.
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), best]),  # pyright: ignore[reportArgumentType]
            cleanup_tmp_directories=True,
            context=saving_context(),
        )
        newest = from_first("the newest checkpoint", self.latest)
        if newest != self.latest:
            raise InputError(
                f"{directory}: the newest checkpoint is {self.latest} here and {newest} in the first process; "
                "allowed: an output folder on a file system that all processes share"
            )

    @property
    def latest(self) -> int | None:
        """Number of finished steps of the newest checkpoint; None if there is none."""
        return self._checkpointer.latest.step if self._checkpointer.latest else None

    def save(self, step: int, state: TrainState, data_state: dict, validation: float | None) -> None:
        """Starts saving in the background; waits first for an earlier save."""
        self._checkpointer.wait()
        self._record_sizes()
        position = {"data": data_state, "checksum": int(checksum(state))}
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": state, "data": {"position": json.dumps(position)}},
            metrics=None if validation is None else {"validation": validation},
            force=True,
        )

    def restore(self, step: int, like: Any) -> tuple[TrainState, dict]:
        """Loads a checkpoint; `like` is a state whose arrays give shapes, types and shardings.

        Raises:
            DamagedCheckpoint: it cannot be read, or its checksum is another.
        """
        where = self._directory / str(step)
        for name, size in self._sizes().get(str(step), {}).items():
            found = (where / name).stat().st_size if (where / name).is_file() else None
            if found != size:
                raise DamagedCheckpoint(f"{where / name} {'is missing' if found is None else f'has {found} bytes'}")
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            loaded = self._checkpointer.load_checkpointables(step, {"state": abstract, "data": {"position": ""}})
            position = json.loads(loaded["data"]["position"])
            found, expected = int(checksum(loaded["state"])), position["checksum"]
        except Exception as error:  # Orbax and TensorStore raise what the damage happens to break
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DamagedCheckpoint(f"{where} cannot be read: {reason[:200]}") from error
        if found != expected:
            raise DamagedCheckpoint(f"{where} holds other values than were saved")
        return loaded["state"], position["data"]

    def restore_newest(self, like: Any) -> tuple[TrainState, dict] | None:
        """Loads the newest checkpoint that is whole; None if there are no checkpoints.

        Damaged ones are named and moved out of the way, to `damaged` beside the directory.

        Raises:
            InputError: all are damaged, or the newest one is and there are several processes.
        """
        damaged = []
        for step in sorted((c.step for c in self._checkpointer.checkpoints), reverse=True):
            try:
                found = self.restore(step, like)
            except DamagedCheckpoint as error:
                if jax.process_count() > 1:  # the others may have read it well
                    raise InputError(f"{error}; allowed: move it away, and the one before it is used") from error
                log.warning("warning: %s; the checkpoint before it is used", error)
                damaged.append(step)
                continue
            if damaged:
                self._move_away(damaged)
            return found
        if damaged:
            raise InputError(
                f"{self._directory}: all checkpoints are damaged ({', '.join(map(str, damaged))}); "
                "allowed: another output, or remove the folder to start again"
            )
        return None

    def _move_away(self, steps: list[int]) -> None:
        for step in steps:
            target = self._directory.with_name("damaged") / str(step)
            target.parent.mkdir(exist_ok=True)
            number = 1
            while target.exists():  # it happens again
                number += 1
                target = target.with_name(f"{step}-{number}")
            (self._directory / str(step)).rename(target)
        self._record_sizes()
        self._checkpointer.reload()

    @property
    def _size_file(self) -> Path:
        return self._directory.with_name("checkpoint_sizes.json")

    def _sizes(self) -> dict[str, dict[str, int]]:
        """Sizes of the files of finished checkpoints, by step: what a load would fail at is found before it starts.

        A checkpoint that was finished just before the process was killed is not among them.
        """
        try:
            return json.loads(self._size_file.read_text())
        except (OSError, ValueError):
            return {}

    def _record_sizes(self) -> None:
        if not is_first():
            return
        known, sizes = self._sizes(), {}
        for folder in (path for path in self._directory.iterdir() if path.name.isdigit()):
            files = [file for file in folder.rglob("*") if file.is_file()] if folder.name not in known else []
            found = {str(file.relative_to(folder)): file.stat().st_size for file in files}
            sizes[folder.name] = known.get(folder.name, found)
        temporary = self._size_file.with_suffix(".tmp")
        temporary.write_text(json.dumps(sizes))
        temporary.replace(self._size_file)

    def close(self) -> None:
        """Waits for the last save, in all processes."""
        self._checkpointer.close()
        self._record_sizes()
        wait_for_all("checkpoints closed")
