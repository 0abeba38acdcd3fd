"""What makes two runs the same run: the configuration that matters, and the model it started from."""

import hashlib
import json
from pathlib import Path

from qtale_jax.artifact import read_model_json
from qtale_jax.config import resolve
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import is_first, wait_for_all

SECTIONS = ("seed", "model", "routing", "lora", "data", "train")
FREE = {
    "log_every",
    "evaluate_every",
    "evaluate_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "merge_lora",
    "wandb_project",
}
"""Keys of `train` that change what is written, not what is computed."""

ROWS = "training_rows"
"""Key of run.json: digest of the rows."""


def run_identity(config: Config) -> dict:
    """The part of the configuration that determines the result of training."""
    resolved = resolve(config)
    identity = {name: resolved[name] for name in SECTIONS}
    identity["train"] = {key: value for key, value in identity["train"].items() if key not in FREE}
    if config.model.path is not None:  # the document lists every array file; hashing 13 GB of them would take minutes
        read_model_json(config.model.path)
        document = Path(config.model.path) / "model.json"
        identity["parent"] = hashlib.sha256(document.read_bytes()).hexdigest()
    return identity


def _differences(old: dict | None, new: dict | None, prefix: str = "") -> list[str]:
    old, new, out = old or {}, new or {}, []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) or isinstance(after, dict):
            out += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            out.append(f"{prefix}{key} was {before!r}, now {after!r}")
    return out


def check_claim(directory: Path, config: Config, rows: str | None = None) -> bool:
    """Whether a run has to be recorded in its folder; False if it is recorded there already. Nothing is written.

    Args:
        directory: the run's folder.
        config: of the run.
        rows: digest of the training rows, which files may have changed under their names; None: they are not looked at.

    Raises:
        InputError: the folder holds a run with another configuration or other rows, or checkpoints that nothing tells
            the run of.
    """
    file = directory / "run.json"
    if file.exists():
        identity = json.loads(json.dumps(run_identity(config)))
        recorded = json.loads(file.read_text())
        read_before = recorded.pop(ROWS, None)
        differences = _differences(recorded, identity)
        if differences:
            raise InputError(f"{directory} holds another run: {'; '.join(differences[:3])}; choose another output")
        if rows is not None and read_before not in (None, rows):
            raise InputError(
                f"{directory} holds a run on other training rows: what the data section reads has changed since; "
                "allowed: the data as it was, or another output"
            )
        return False
    if (directory / "checkpoints").exists():
        raise InputError(f"{directory} holds checkpoints, but run.json, which tells of what run, is missing")
    return True


def claim(directory: Path, config: Config, rows: str | None = None) -> None:
    """Records the identity of a run in its folder, or checks that it is the same as the one recorded there.

    Of several processes the first one records, and the others check that they have come for the same run. Arguments as
    in `check_claim`.

    Raises:
        InputError: as `check_claim`, or the processes do not share the folder.
    """
    file = directory / "run.json"
    wait_for_all("run.json")  # nothing is written before all have checked their input
    if not is_first():
        wait_for_all("run.json is written")
        if not file.exists():
            raise InputError(
                f"{file}, which the first process wrote, is not there; "
                "allowed: an output folder on a file system that all processes share"
            )
        check_claim(directory, config, rows)
        return
    if check_claim(directory, config, rows):
        _record(file, config, rows)
    wait_for_all("run.json is written")


def _record(file: Path, config: Config, rows: str | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    identity = run_identity(config) | ({} if rows is None else {ROWS: rows})
    temporary.write_text(json.dumps(identity, indent=1))
    temporary.rename(file)
