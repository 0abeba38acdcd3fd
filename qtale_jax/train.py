"""`python -m qtale_jax.train CONFIG [key=value ...]`: trains a base, or fine-tunes routers and adapters."""

import sys
from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Trains, or goes on with a run that was interrupted; returns the new model directory, OUTPUT/trained.

    Raises:
        InputError: bad input, another run's output, or a loss that is not finite.
        training.loop.Interrupted: SIGTERM; the state has been saved.
    """
    from qtale_jax.training.loop import train

    return train(config, quiet=quiet)


def dry_run(config: Config) -> None:
    """Prints model, data, sizes and steps of the run."""
    from qtale_jax.reporting.dry_run import print_dry_run
    from qtale_jax.training import plan

    print_dry_run("train", plan.facts(config, plan.plan(config)), [Path(config.output) / "trained"])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as configured; the same command continues a run that was interrupted."""
    config = parse("train", STAGES["train"], argv, dry_run)
    from qtale_jax.training.loop import Interrupted

    try:
        path = run_stage(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return
    print(path)


if __name__ == "__main__":
    run(main)
