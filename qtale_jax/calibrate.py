"""`python -m qtale_jax.calibrate CONFIG [key=value ...]`: finds the threshold of a (quantized) routed model."""

import sys
from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Reads `calibrate.model`, writes `calibrate.output` with theta stored; returns the new model directory.

    Raises:
        InputError: bad input, or the output exists.
    """
    from qtale_jax import paths
    from qtale_jax.artifact import lineage, load_model, refuse_existing, save_model
    from qtale_jax.calibration.calibrate import calibrate

    source, target = Path(config.calibrate.model or paths.quantized(config)), paths.calibrated(config)
    refuse_existing(target)
    model, found = calibrate(load_model(source), config)
    provenance = lineage("calibrate", source, model.provenance)
    save_model(target, model.spec, model.params, tokenizer=model.tokenizer, provenance=provenance)
    settings = config.calibrate
    if settings.objective == "ratio" and abs(found.ratio - settings.ratio) > settings.tolerance:
        print(
            f"warning: ratio {settings.ratio:.3f} is out of reach; theta {found.theta:.3f} gives {found.ratio:.3f}",
            file=sys.stderr,
        )
    if not quiet:
        print(f"theta {found.theta:.4f} executes {found.ratio:.4f} of all layers at {model.spec.bits} bits")
    return target


def dry_run(config: Config) -> None:
    """Prints the model, the rows that theta would be searched on, and how often they would be run."""
    from qtale_jax import paths
    from qtale_jax.artifact import StoredModel, refuse_existing
    from qtale_jax.calibration.calibrate import calibration_records, calibration_rows, check_calibrated
    from qtale_jax.calibration.threshold import BISECTIONS, GRID
    from qtale_jax.data.scratch import without_writing
    from qtale_jax.models.describe import describe
    from qtale_jax.reporting.dry_run import print_dry_run

    source, target = Path(config.calibrate.model or paths.quantized(config)), paths.calibrated(config)
    refuse_existing(target)
    model, settings = StoredModel(source), config.calibrate
    check_calibrated(model.spec, model.tokenizer)
    with without_writing(config) as readable:
        rows, _ = calibration_rows(calibration_records(readable), model.tokenizer, config)
    by_ratio = settings.objective == "ratio"
    goal = f"ratio {settings.ratio:g}, within {settings.tolerance:g}" if by_ratio else "the smallest ratio"
    facts = {
        "model": str(source),
        **describe(model.spec),
        "goal": goal if by_ratio else f"{goal} within {settings.within:g} of the best quality",
        "calibration": f"{len(rows):,} rows, {sum(len(row.ids) for row in rows):,} tokens",
        "passes": f"at most {2 + BISECTIONS} over them" if by_ratio else f"{len(GRID)} over them",
    }
    print_dry_run("calibrate", facts, [target])


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrates as configured and prints where the model is."""
    print(run_stage(parse("calibrate", STAGES["calibrate"], argv, dry_run)))


if __name__ == "__main__":
    run(main)
