"""Checkpoints for resuming: state, data position and metric in one Orbax step directory."""

import json
import logging
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qtale_jax.artifact import saving_context
from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import from_first, wait_for_all
from qtale_jax.training.step import TrainState

# Orbax reports every save and load through absl; what matters here is raised or printed by the loop.
logging.getLogger("absl").setLevel(logging.ERROR)


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
        policies = ocp.training.preservation_policies
        best = policies.BestN(
            n=1, get_metric_fn=lambda metrics: -metrics["validation"], keep_checkpoints_without_metrics=False
        )
        self._checkpointer = ocp.training.Checkpointer(
            str(directory.resolve()),
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
        self._checkpointer.save_checkpointables_async(
            step,
            {"state": state, "data": {"position": json.dumps(data_state)}},
            metrics=None if validation is None else {"validation": validation},
            force=True,
        )

    def restore(self, step: int, like: Any) -> tuple[TrainState, dict]:
        """Loads a checkpoint; `like` is a state whose arrays give shapes, types and shardings."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        loaded = self._checkpointer.load_checkpointables(step, {"state": abstract, "data": {"position": ""}})
        return loaded["state"], json.loads(loaded["data"]["position"])

    def close(self) -> None:
        """Waits for the last save, in all processes."""
        self._checkpointer.close()
        wait_for_all("checkpoints closed")
