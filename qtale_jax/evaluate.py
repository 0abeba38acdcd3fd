"""`python -m qtale_jax.evaluate CONFIG [key=value ...]`: accuracy, perplexity, executed ratio and cost of a model."""

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config

if TYPE_CHECKING:
    from qtale_jax.artifact import LoadedModel


def run_stage(config: Config, *, theta: float | None = None, point: str | None = None, quiet: bool = False) -> Path:
    """Evaluates `evaluate.model` and writes the JSON that reports are made of; returns its path.

    Raises:
        InputError: bad input.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qtale_jax.evaluation.evaluate import evaluate
    from qtale_jax.parallel.processes import is_first
    from qtale_jax.reporting.console import table
    from qtale_jax.reporting.results import write_text

    source, model = _load(config)
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal or not is_first()) as progress:
        task = progress.add_task("evaluating rows", total=None)
        result = evaluate(model, config, theta=theta, point=point, progress=lambda n: progress.advance(task, n))
    target = _target(config, source, "evaluation")
    if not is_first():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(result, indent=1))
    if not quiet:
        row, written = result["row"], result["written"] or {}
        nats = row["nats_per_token"]
        shown = {
            **(row["accuracy"] or {}),
            "nats per token": nats,
            "standard error": row["standard_error"],
            "perplexity": None if nats is None else math.exp(nats),
            **{name: value for name, value in written.items() if name.startswith("rouge")},
            "prompts too long for ROUGE": written.get("dropped") or None,
        }
        shown |= {"executed ratio": row["executed_ratio"], "FLOPs per token": row["flops_per_token"]}
        cells = [(name, f"{value:,.4f}") for name, value in shown.items() if value is not None]
        Console().print(table(f"{row['model']}, {row['bits']} bits", ("measure", "value"), cells))
    return target


def run_harness(config: Config) -> Path:
    """Runs `harness.tasks` on `evaluate.model`, prints a table and writes a JSON file; returns its path.

    Raises:
        InputError: bad input, or lm-evaluation-harness is not installed.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qtale_jax.errors import InputError

    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the harness's bars, as our own, are for terminals
    try:
        from qtale_jax.evaluation.harness.run import evaluate_harness
    except ModuleNotFoundError as error:
        raise InputError(
            f"harness.tasks needs lm-evaluation-harness, and {error.name!r} is not installed; "
            'install it with: pip install "qtale-jax[eval]"'
        ) from error
    from qtale_jax.parallel.processes import is_first
    from qtale_jax.reporting.console import harness_table
    from qtale_jax.reporting.results import write_text

    source, model = _load(config)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal or not is_first()) as progress:
        task = progress.add_task("answering requests", total=None)
        result = evaluate_harness(model, config, progress=lambda n: progress.advance(task, n))
    target = _target(config, source, "harness")
    if not is_first():  # all have asked the same requests and hold the same answers
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(result, indent=1))
    Console().print(harness_table(result))
    return target


def _load(config: Config) -> tuple[Path, "LoadedModel"]:
    """The model to measure, and its directory."""
    from qtale_jax import paths
    from qtale_jax.errors import InputError
    from qtale_jax.evaluation.loading import load_on_mesh

    source = Path(config.evaluate.model or paths.newest(config))
    model = load_on_mesh(source, config.mesh)
    if model.tokenizer is None:
        raise InputError(f"{source}: the model directory has no tokenizer")
    return source, model


def _target(config: Config, source: Path, folder: str) -> Path:
    return Path(config.evaluate.output or Path(config.output) / folder / f"{source.name}.json")


def dry_run(config: Config) -> None:
    """Prints the model, and the examples and rows that would be run."""
    from qtale_jax import paths
    from qtale_jax.artifact import StoredModel
    from qtale_jax.data.scratch import without_writing
    from qtale_jax.errors import InputError
    from qtale_jax.evaluation.plan import facts
    from qtale_jax.models.describe import describe
    from qtale_jax.reporting.dry_run import print_dry_run

    source = Path(config.evaluate.model or paths.newest(config))
    model = StoredModel(source)
    if model.tokenizer is None:
        raise InputError(f"{source}: the model directory has no tokenizer")
    with without_writing(config) as readable:
        found = {"model": str(source), **describe(model.spec), **facts(readable, model.tokenizer)}
    folder = "harness" if config.harness.tasks else "evaluation"
    print_dry_run("evaluate", found, [_target(config, source, folder)])


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates as configured and prints where the result is."""
    config = parse("evaluate", STAGES["evaluate"], argv, dry_run)
    from qtale_jax.parallel.processes import is_first, processes

    with processes(config.distributed):
        target = run_harness(config) if config.harness.tasks else run_stage(config)
        if is_first():
            print(target)


if __name__ == "__main__":
    run(main, repeats=True)
