"""`python -m qtale_jax.calibrate CONFIG [key=value ...]`: finds the threshold of a (quantized) routed model."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config

if TYPE_CHECKING:
    from qtale_jax.artifact import LoadedModel
    from qtale_jax.calibration.latency import LatencyTable
    from qtale_jax.calibration.threshold import Found


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Reads `calibrate.model`, writes `calibrate.output` with theta stored; returns the new model directory.

    For a budget the latency table of this device is beside the output, and is written there if it has to be measured.

    Raises:
        InputError: bad input, a budget that is out of reach, or the output exists.
    """
    from qtale_jax import paths
    from qtale_jax.artifact import lineage, load_model, refuse_existing, save_model
    from qtale_jax.calibration.calibrate import calibrate
    from qtale_jax.evaluation.loading import load_on_mesh
    from qtale_jax.parallel.processes import is_first

    source, target = Path(config.calibrate.model or paths.quantized(config)), paths.calibrated(config)
    refuse_existing(target)
    settings, table, where = config.calibrate, None, ""
    if settings.objective != "budget":
        loaded = load_on_mesh(source, config.mesh)
    else:  # speed is that of the engine, which decodes on one device
        loaded = load_model(source)
        table, where = _latency_table(loaded, config, target.parent)
    model, found = calibrate(loaded, config, table)
    facts = {} if table is None else {"latency": table.document()}
    provenance = lineage("calibrate", source, model.provenance, **facts)
    save_model(target, model.spec, model.params, tokenizer=model.tokenizer, provenance=provenance)
    if not is_first():
        return target
    if settings.objective == "ratio" and abs(found.ratio - settings.ratio) > settings.tolerance:
        print(
            f"warning: ratio {settings.ratio:.3f} is out of reach; theta {found.theta:.3f} gives {found.ratio:.3f}",
            file=sys.stderr,
        )
    if not quiet:
        speed = "" if table is None else _print_predictions(table, where, found)
        print(f"theta {found.theta:.4f} executes {found.ratio:.4f} of all layers at {model.spec.bits} bits{speed}")
    return target


def _latency_table(model: "LoadedModel", config: Config, folder: Path) -> "tuple[LatencyTable, str]":
    """The table of this device, once model and data are known to be usable; and where it comes from, in words."""
    from qtale_jax.calibration.calibrate import calibration_records, check_calibrated
    from qtale_jax.calibration.stored_table import latency_table

    check_calibrated(model.spec, model.tokenizer)
    calibration_records(config)
    table, file, new = latency_table(model, config, folder)
    return table, f"{file}, measured {'now' if new else 'before'}"


def _print_predictions(table: "LatencyTable", where: str, found: "Found") -> str:
    """Prints the latency table and what it predicts for every theta tried; returns what to say of the one found."""
    from rich.console import Console

    from qtale_jax.reporting.latency import path_table, step_table

    print(f"latency table: {where}")
    for shown in (step_table(table), path_table(table, found)):
        Console().print(shown)
    return f", predicted {table.tokens_per_second(found.step_seconds):.4g} tokens/s"


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
    goal, passes = {
        "ratio": (f"ratio {settings.ratio:g}, within {settings.tolerance:g}", f"at most {2 + BISECTIONS}"),
        "quality": (f"the smallest ratio within {settings.within:g} of the best quality", str(len(GRID))),
        "budget": (_budget_text(config), f"at most {2 + BISECTIONS}"),
    }[settings.objective]
    facts = {"model": str(source), **describe(model.spec), "goal": goal}
    targets = [target]
    if settings.objective == "budget":
        from qtale_jax.calibration.stored_table import table_path

        file = table_path(target.parent, model.spec, config)
        if file.exists() and not config.budget.remeasure:
            facts["latency"] = str(file)
        else:
            facts["latency"] = "to be measured on this device"
            targets = [file, target]
    facts |= {
        "calibration": f"{len(rows):,} rows, {sum(len(row.ids) for row in rows):,} tokens",
        "passes": f"{passes} over them",
    }
    print_dry_run("calibrate", facts, targets)


def _budget_text(config: Config) -> str:
    """`the largest ratio with 50 tokens per second or more, at batch size 8`; nothing without a budget."""
    if config.budget.asked is None:
        return ""
    name, value = config.budget.asked
    unit = "tokens per second or more" if name == "tokens_per_second" else "milliseconds per token or less"
    return f"the largest ratio with {value:g} {unit}, at batch size {config.budget.batch_size}"


def main(argv: Sequence[str] | None = None) -> None:
    """Calibrates as configured and prints where the model is."""
    config = parse("calibrate", STAGES["calibrate"], argv, dry_run)
    from qtale_jax.parallel.processes import is_first, processes

    with processes(config.distributed):
        target = run_stage(config)
        if is_first():
            print(target)


if __name__ == "__main__":
    run(main, repeats=True)
