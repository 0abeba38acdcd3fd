"""Latency tables on disk: measured once for a device and a shape of model, then read."""

import hashlib
import json
import os
from pathlib import Path

import jax.numpy as jnp

from qtale_jax.artifact import LoadedModel, versions
from qtale_jax.calibration.latency import LatencyTable
from qtale_jax.calibration.measuring import hardware, measure, measured_context, model_digest
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.models.specification import ModelSpecification

FOLDER = "latency"
"""Where tables are, beside the model directory that is written."""

TIMED = ("qtale_jax", "jax")
"""Packages whose version a table has to share to be used again: those that make the programs."""


def table_path(folder: Path, spec: ModelSpecification, config: Config) -> Path:
    """The file of the table for this device, the shape of a model, batch size and prompt length.

    Args:
        folder: the one in which the model directory is.
        spec: a routed model.
        config: its budget and compute type.

    Raises:
        InputError: the prompt does not fit the model's context.
    """
    found, dtype = versions(), jnp.dtype(config.train.compute_dtype)
    parts = [hardware(), {name: found[name] for name in TIMED}, model_digest(spec, dtype)]
    rows, context = config.budget.batch_size, measured_context(spec, config.budget)
    digest = hashlib.sha256(json.dumps([*parts, rows, context]).encode()).hexdigest()
    return folder / FOLDER / f"rows{rows}-context{context}-{digest[:12]}.json"


def latency_table(model: LoadedModel, config: Config, folder: Path) -> tuple[LatencyTable, Path, bool]:
    """Reads the table for this device and model, or measures it and writes it.

    Returns:
        The table, its file, and whether it was measured now.

    Raises:
        InputError: a damaged file, or a prompt that does not fit the model's context.
    """
    path = table_path(folder, model.spec, config)
    if path.exists() and not config.budget.remeasure:
        return _read(path), path, False
    table = measure(model.spec, model.params, config.budget, jnp.dtype(config.train.compute_dtype))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table.document(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return table, path, True


def _read(path: Path) -> LatencyTable:
    try:
        return LatencyTable.of(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, or give budget.remeasure=true") from error
