"""Weights & Biases beside TensorBoard: one W&B run per output folder, which goes on when training does."""

import importlib
import secrets
from pathlib import Path
from types import ModuleType
from typing import Any

from qtale_jax.errors import InputError

ID_FILE = "wandb_run"
"""In the output folder: the id of its W&B run."""


def import_wandb() -> ModuleType:
    """The wandb library.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        raise InputError(
            'train.wandb_project needs the wandb library: pip install "qtale-jax[wandb]"; allowed without: null'
        ) from error


def run_id(directory: Path) -> str:
    """The id of the folder's W&B run; made up and written down when it is asked for first."""
    file = directory / ID_FILE
    if not file.exists():
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


class WandbLog:
    """A W&B run under the id of the folder: a resumed training appends to the run that it had.

    Rows that a killed run logged beyond its last checkpoint are there already when they are logged again, with the same
    numbers; W&B keeps the first. Mode, entity and key are wandb's own settings (`WANDB_MODE=offline` needs no network).
    """

    def __init__(self, directory: Path, project: str, config: dict[str, Any]):
        """Starts or resumes the run.

        Args:
            directory: output folder; wandb's files go there as well.
            project: of W&B.
            config: shown with the run.

        Raises:
            InputError: wandb is not installed, or cannot start (no key, no network).
        """
        wandb = import_wandb()
        settings = wandb.Settings(silent=True, console="off")
        try:
            self._run = wandb.init(
                project=project,
                id=run_id(directory),
                name=directory.name,
                dir=str(directory),
                config=config,
                resume="allow",
                settings=settings,
            )
        except wandb.errors.Error as error:
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise InputError(
                f"train.wandb_project={project!r}: W&B cannot start ({reason}); allowed: log in with `wandb login`, or "
                "set WANDB_MODE=offline, which logs into the output folder"
            ) from error

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Logs the numbers of one step."""
        self._run.log(scalars, step=step)

    def close(self, failed: bool = False) -> None:
        """Ends the run; training can still resume it."""
        self._run.finish(exit_code=int(failed))
