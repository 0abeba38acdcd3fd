"""`python -m qtale_jax.evaluate CONFIG [key=value ...]`: accuracy, perplexity, executed ratio and cost of a model."""

import json
from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, theta: float | None = None, point: str | None = None, quiet: bool = False) -> Path:
    """Evaluates `evaluate.model` and writes the JSON that reports are made of; returns its path.

    Raises:
        InputError: bad input.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qtale_jax import paths
    from qtale_jax.artifact import load_model
    from qtale_jax.errors import InputError
    from qtale_jax.evaluation.evaluate import evaluate
    from qtale_jax.reporting.console import table
    from qtale_jax.reporting.results import write_text

    source = Path(config.evaluate.model or paths.newest(config))
    model = load_model(source)
    if model.tokenizer is None:
        raise InputError(f"{source}: the model directory has no tokenizer")
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("evaluating rows", total=None)
        result = evaluate(model, config, theta=theta, point=point, progress=lambda n: progress.advance(task, n))
    target = Path(config.evaluate.output or Path(config.output) / "evaluation" / f"{source.name}.json")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, json.dumps(result, indent=1))
    if not quiet:
        row = result["row"]
        shown = {
            **(row["accuracy"] or {}),
            "nats per token": row["nats_per_token"],
            "standard error": row["standard_error"],
        }
        shown |= {"executed ratio": row["executed_ratio"], "FLOPs per token": row["flops_per_token"]}
        cells = [(name, f"{value:,.4f}") for name, value in shown.items() if value is not None]
        Console().print(table(f"{row['model']}, {row['bits']} bits", ("measure", "value"), cells))
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates as configured and prints where the result is."""
    print(run_stage(parse("evaluate", STAGES["evaluate"], argv)))


if __name__ == "__main__":
    run(main)
