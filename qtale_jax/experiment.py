"""`python -m qtale_jax.experiment CONFIG [key=value ...]`: the stages a config names, side by side, then the report."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def dry_run(config: Config) -> None:
    """Prints the jobs with the stages that each would run, and checks the first training that can start."""
    from qtale_jax.experiments.grid import plan
    from qtale_jax.experiments.preflight import check
    from qtale_jax.experiments.schedule import is_done
    from qtale_jax.reporting.dry_run import print_dry_run
    from qtale_jax.training import plan as training

    jobs = plan(config)
    facts, waiting = {}, [step for job in jobs for step in job.steps if not is_done(step)]
    if config.model.path is not None:
        check(waiting, config.model.path, config.experiment.quantizers)
    for job in jobs:
        left = Counter(step.stage for step in job.steps if step in waiting)
        facts[job.name] = ", ".join(f"{count} × {stage}" for stage, count in left.items()) or "done before"
    total = Counter(step.stage for step in waiting)
    facts["in all"] = ", ".join(f"{count} × {stage}" for stage, count in total.items()) or "nothing but the report"
    for step in waiting:
        path = step.config.model.path
        if step.stage == "train" and (path is None or Path(path).exists()):
            facts |= {
                f"first {name}": text for name, text in training.facts(step.config, training.plan(step.config)).items()
            }
            break
    root = Path(config.output)
    print_dry_run(
        "experiment", facts, [*(step.output for step in waiting), root / "results.json", root / "report.html"]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs what is missing of the grid, reports, and names the page."""
    config = parse("experiment", STAGES["experiment"], argv, dry_run)
    from qtale_jax import report
    from qtale_jax.experiments.grid import plan
    from qtale_jax.experiments.preflight import check
    from qtale_jax.experiments.schedule import execute, is_done

    jobs = plan(config)
    if config.model.path is not None:  # a base that is still to be trained is checked with the configuration
        steps = [step for job in jobs for step in job.steps if not is_done(step)]
        check(steps, config.model.path, config.experiment.quantizers)
    execute(jobs, config)
    report.run_stage(config, measured={step.output for job in jobs for step in job.steps if step.stage == "evaluate"})


if __name__ == "__main__":
    run(main, repeats=True)
