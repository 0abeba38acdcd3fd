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
        training.stopping.Interrupted: SIGTERM; the state has been saved.
    """
    from qtale_jax.training.loop import train

    return train(config, quiet=quiet)


def dry_run(config: Config) -> None:
    """Prints model, data, sizes and steps of the run; several processes meet first, to know their devices."""
    from qtale_jax.parallel.processes import is_first, processes
    from qtale_jax.reporting.dry_run import print_dry_run
    from qtale_jax.training import plan

    with processes(config.distributed):
        found = plan.plan(config)
        if is_first():
            print_dry_run("train", plan.facts(config, found), [Path(config.output) / "trained"])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as configured; the same command continues a run that was interrupted."""
    config = parse("train", STAGES["train"], argv, dry_run)
    from qtale_jax.parallel.processes import is_first, processes
    from qtale_jax.training.stopping import Interrupted

    with processes(config.distributed):
        try:
            said, stream = run_stage(config), sys.stdout
        except Interrupted as interruption:
            said, stream = interruption, sys.stderr
        if is_first():
            print(said, file=stream)


if __name__ == "__main__":
    run(main, repeats=True)
