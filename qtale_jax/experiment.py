"""`python -m qtale_jax.experiment CONFIG [key=value ...]`: the stages a config names, side by side, then the report."""

from collections.abc import Sequence

from qtale_jax.command import STAGES, parse, run


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing of the grid, reports, and names the page."""
    config = parse("experiment", STAGES["experiment"], argv)
    from qtale_jax import report
    from qtale_jax.experiments.grid import plan
    from qtale_jax.experiments.schedule import execute

    execute(plan(config), config)
    report.run_stage(config)


if __name__ == "__main__":
    run(main)
