"""What a training run would be, before it starts: everything is checked, nothing is allocated or written."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qtale_jax.artifact import StoredModel, weight_bytes
from qtale_jax.artifact.arrays import flatten
from qtale_jax.config.schema import Config
from qtale_jax.data.pipeline import load_rows
from qtale_jax.data.published import origin
from qtale_jax.data.rows import Rows, digest
from qtale_jax.data.scratch import without_writing
from qtale_jax.data.tokens import load_tokenizer
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters, abstract_parameters
from qtale_jax.models.describe import describe
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.reporting.dry_run import bytes_text
from qtale_jax.training.dropping import drop_layers, even_layers, number_to_keep
from qtale_jax.training.identity import check_claim
from qtale_jax.training.loop import check, total_steps
from qtale_jax.training.optimizer import is_trainable
from qtale_jax.training.start import architecture_from, check_quantized, extended


@dataclass(frozen=True)
class TrainingPlan:
    """A run: the model with its routers and adapters, sizes, rows by split, steps."""

    spec: ModelSpecification
    parameters: int
    trainable: int
    model_bytes: int
    rows: dict[str, Rows]
    steps: int
    done: int
    finished: bool
    mesh: dict[str, int]


def plan(config: Config) -> TrainingPlan:
    """Checks everything that training would check, on shapes.

    Raises:
        InputError: bad input, or another run's output.
    """
    mesh = build_mesh(config.mesh)
    check(config, mesh)
    spec, params, tokenizer = _abstract_start(config)
    flat = flatten(params)
    with without_writing(config) as readable:
        rows = {"train": load_rows(readable, tokenizer, "train")}
        if config.data.held_out or config.data.evaluation_path is not None:
            rows["validation"] = load_rows(readable, tokenizer, "validation")
    output = Path(config.output)
    check_claim(output, config, digest(rows["train"]))
    trains = {name: math.prod(leaf.shape) for name, leaf in flat.items() if is_trainable(name, config.train.parameters)}
    return TrainingPlan(
        spec=spec,
        parameters=sum(math.prod(leaf.shape) for leaf in flat.values()),
        trainable=sum(trains.values()),
        model_bytes=weight_bytes(params)["total"],
        rows=rows,
        steps=total_steps(config, len(rows["train"]["tokens"])),
        done=_last_checkpoint(output / "checkpoints"),
        finished=(output / "trained").exists(),
        mesh=dict(mesh.shape),
    )


def _abstract_start(config: Config) -> tuple[ModelSpecification, Parameters, Any]:
    """What `start.starting_model` gives, with shapes for arrays."""
    if config.model.path is None:
        tokenizer = load_tokenizer(config.model.tokenizer)
        architecture = architecture_from(config.model.architecture, len(tokenizer))
        spec = ModelSpecification(architecture=architecture, dtype=config.model.dtype)
    else:
        parent = StoredModel(config.model.path)
        spec, tokenizer = parent.spec.model_copy(update={"lora": None}), parent.tokenizer
        if tokenizer is None:
            raise InputError(f"model.path={config.model.path}: the model directory has no tokenizer")
        check_quantized(config, spec)
    return *extended_abstract(config, spec), tokenizer


def extended_abstract(config: Config, spec: ModelSpecification) -> tuple[ModelSpecification, Parameters]:
    """What `start.starting_model` makes of a parent or a random model, with shapes for arrays.

    Raises:
        InputError: as `start.extended`.
    """
    params = abstract_parameters(spec)
    if config.model.drop.keep < 1:
        # Which layers go is measured when it runs; the shapes are those of any choice.
        keep = even_layers(spec.architecture.num_layers, number_to_keep(config, spec), config.routing.always_on_layers)
        spec, params = drop_layers(spec, params, keep)
    found = {}

    def extend(existing: Parameters) -> Parameters:
        found["spec"], extended_params = extended(config, spec, existing, jax.random.key(0))
        return extended_params

    abstract = jax.eval_shape(extend, params)
    return found["spec"], abstract


def _last_checkpoint(folder: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return max((int(name) for name in names if name.isdecimal()), default=0)


def facts(config: Config, found: TrainingPlan) -> dict[str, str]:
    """The plan in words."""
    start = config.model.path or "random initialisation"
    moments = 2 * 4 * found.trainable  # AdamW keeps two float32 numbers for each
    rows = {name: len(each["tokens"]) for name, each in found.rows.items()}
    train = found.rows["train"]
    tokens, learned = np.count_nonzero(train["segment_ids"]), int(train["weights"].sum())
    epochs = found.steps * config.train.batch_size / rows["train"]
    counts = ", ".join(f"{count:,} for {name}" for name, count in rows.items())
    words = {"start": start, **describe(found.spec)}
    words |= {
        "parameters": f"{found.parameters:,}, {found.trainable:,} of them train",
        "memory": f"{bytes_text(found.model_bytes)} of parameters, {bytes_text(moments)} of optimizer state",
        "devices": ", ".join(f"{axis} {size}" for axis, size in found.mesh.items()),
    }
    if config.data.kind == "published":
        words["data"] = origin(config.data.tasks, config.data.path, config.data.source)
    words |= {
        "rows": f"{counts}, {config.data.length} tokens long",
        "tokens": f"{tokens:,} in the training rows, {learned:,} of them count in the loss",
        "steps": f"{found.steps:,} of {config.train.batch_size} rows, {epochs:.2f} passes over the training rows",
    }
    if found.finished:
        words["state"] = "finished before: nothing would be done"
    elif found.done:
        words["state"] = f"would go on after step {found.done:,}"
    return words
