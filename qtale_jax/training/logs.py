"""Where a run's numbers go: metrics.jsonl, TensorBoard, a progress bar or plain lines."""

import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from qtale_jax.parallel.processes import is_first
from qtale_jax.training.wandb_log import WandbLog


def memory_bytes() -> int:
    """Peak bytes in use on the first device, or of this process where the device does not tell (CPU)."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    return statistics.get("peak_bytes_in_use") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flat_numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    """Device arrays -> floats and lists of floats; one transfer for all of them."""
    return {name: np.asarray(value).astype(np.float64).tolist() for name, value in jax.device_get(metrics).items()}


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row by name, those of lists by name and index."""
    found = {}
    for name, value in row.items():
        if isinstance(value, (int, float)):
            found[name] = value
        elif isinstance(value, list):
            found |= {f"{name}/{index}": entry for index, entry in enumerate(value)}
    return found


class RunLog:
    """Appends to metrics.jsonl, TensorBoard and W&B and draws progress; on resume, lines after the resumed step go."""

    def __init__(self, directory: Path, total: int, resumed: int, quiet: bool, wandb: WandbLog | None = None):
        self.file = directory / "metrics.jsonl"
        self._drop_after(resumed)
        self._stream = self.file.open("a")
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resumed or None)
        self._wandb = wandb
        self._total, self._quiet = total, quiet
        self._console = Console(file=sys.stderr)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console, disable=quiet or not self._console.is_terminal)
        self._task = self._progress.add_task("training", total=total, completed=resumed, rate="")

    def _drop_after(self, step: int) -> None:
        """What a killed run logged beyond its last checkpoint will be logged again."""
        if not self.file.exists():
            return
        written, kept = self.file.read_text(), []
        for line in written.splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written when the process died
                continue
            if row["step"] <= step:
                kept.append(line + "\n")
        if "".join(kept) != written:
            temporary = self.file.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            temporary.replace(self.file)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, kind, *_exception) -> None:
        self._progress.stop()
        self._stream.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close(failed=kind is not None)

    def advance(self, step: int, rate: str) -> None:
        """Moves the progress bar."""
        self._progress.update(self._task, completed=step, rate=rate)

    def write(self, step: int, row: dict[str, Any], plain: bool = True) -> None:
        """Logs one row; without a terminal also prints a line."""
        # JSON has no NaN or infinity; null keeps the file readable by everything.
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._stream.write(json.dumps({"step": step, **clean}) + "\n")
        self._stream.flush()
        numbers = scalars(row)
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.write(step, numbers)
        if plain and not self._quiet and not self._console.is_terminal:
            shown = ("loss", "cross_entropy", "executed_ratio", "flip_rate", "validation", "steps_per_second")
            text = "  ".join(f"{name} {row[name]:.4g}" for name in shown if isinstance(row.get(name), float))
            print(f"step {step}/{self._total}  {text}", file=sys.stderr, flush=True)


class NoLog:
    """The log of the processes that leave logging to the first."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception) -> None:
        return None

    def advance(self, step: int, rate: str) -> None:
        """Does nothing."""

    def write(self, step: int, row: dict[str, Any], plain: bool = True) -> None:
        """Does nothing."""


def open_log(
    directory: Path, total: int, resumed: int, quiet: bool, wandb: Callable[[], WandbLog | None]
) -> RunLog | NoLog:
    """The log of this process; `wandb` is asked for a W&B run only where there is one."""
    return RunLog(directory, total, resumed, quiet, wandb()) if is_first() else NoLog()
