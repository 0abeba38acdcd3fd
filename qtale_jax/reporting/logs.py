"""Training logs: `metrics.jsonl`, one JSON object per logged step."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from qtale_jax.errors import InputError


@dataclass(frozen=True)
class TrainingRun:
    """One run. `model` is the experiment's name for it, if the folder tells; `series` maps a key to (step, value)."""

    name: str
    model: str | None
    series: dict[str, tuple[tuple[int, float], ...]]

    @property
    def routed(self) -> bool:
        """Whether routers were trained: something was skipped or could flip."""
        return any(value < 1.0 for _, value in self.series.get("executed_ratio", ())) or "flip_rate" in self.series


def _lines(path: Path) -> Iterable[dict]:
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # a run that was killed while it wrote leaves half a line
                return
            raise InputError(f"{path}, line {number}: not valid JSON ({error})") from error
        if not isinstance(found, dict) or not isinstance(found.get("step"), int):
            raise InputError(f"{path}, line {number}: found {line[:60]!r}, allowed: an object with an integer 'step'")
        yield found


def _model(parts: Iterable[str], models: Iterable[str]) -> str | None:
    """The longest model name that a folder of the path is, starts with or ends with, at a word boundary."""
    best = None
    for part in parts:
        for model in models:
            name = re.escape(model)
            hit = re.search(rf"^{name}(?![A-Za-z0-9])|(?<![A-Za-z0-9]){name}$", part)
            if hit and (best is None or len(model) > len(best)):
                best = model
    return best


def read_training(folder: Path, models: Iterable[str]) -> list[TrainingRun]:
    """Reads every `metrics.jsonl` under `folder`. A step logged twice (after a resume) counts as logged last.

    Args:
        folder: searched at any depth.
        models: names of the evaluated models, to tell whose run it is.

    Raises:
        InputError: a line is malformed, other than a last one cut short.
    """
    names = {*models, "base", "dense", "dllm", "qtale"}
    runs = []
    for path in sorted(folder.rglob("metrics.jsonl")):
        steps: dict[int, dict] = {}
        for line in _lines(path):
            steps[line["step"]] = {**steps.get(line["step"], {}), **line}
        series: dict[str, list[tuple[int, float]]] = {}
        for step in sorted(steps):
            for key, value in steps[step].items():
                number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
                if number and key != "step":
                    series.setdefault(key, []).append((step, float(value)))
        parts = path.parent.relative_to(folder).parts
        name = "/".join(parts) or folder.name
        runs.append(TrainingRun(name, _model(parts, names), {key: tuple(points) for key, points in series.items()}))
    return runs
