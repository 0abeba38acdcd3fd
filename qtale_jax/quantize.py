"""`python -m qtale_jax.quantize CONFIG [key=value ...]`: stores the linears of a model in few bits."""

import sys
from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Reads `quantize.model`, writes `quantize.output`; prints a plan, progress and a table.

    A process that was killed goes on where it was when the same command is given again.

    Returns:
        The new model directory.

    Raises:
        InputError: bad input, or the output exists.
    """
    import jax.numpy as jnp
    from rich.console import Console

    from qtale_jax import paths
    from qtale_jax.artifact import refuse_existing, weight_bytes
    from qtale_jax.models.decoder import abstract_parameters
    from qtale_jax.quantization.memory import peak_resident_bytes
    from qtale_jax.quantization.plan import plan
    from qtale_jax.quantization.streaming import QuantizationRun
    from qtale_jax.reporting.console import layer_progress, plan_table, quantization_tables

    source, target = Path(config.quantize.model or paths.trained(config)), paths.quantized(config)
    refuse_existing(target)
    if config.quantize.bits == 16:
        return _copy(source, target)
    job = QuantizationRun(source, config)
    job.check(target)
    shape = None if job.rows is None else (job.rows.tokens.shape[0], job.rows.tokens.shape[1])
    expected = plan(job.spec, job.formats, config.quantize, shape, jnp.dtype(config.train.compute_dtype))
    console = Console(stderr=True)
    if not quiet:
        console.print(plan_table(expected))
    with layer_progress(console, job.spec.architecture.num_layers, quiet) as say:
        reports = job.carry_out(target, say)
    if not quiet:
        sizes = [weight_bytes(abstract_parameters(spec)) for spec in (job.spec, job.quantized_spec)]
        for table in quantization_tables(reports, *sizes):
            # A log file has room for a row in one line; a terminal knows its own width.
            Console(width=None if sys.stdout.isatty() else 150).print(table)
        reached = peak_resident_bytes()
        if reached:
            console.print(f"peak memory of the process {reached / 1e9:.2f} GB, planned {expected.peak / 1e9:.2f} GB")
    return target


def dry_run(config: Config) -> None:
    """Prints the formats, the bytes before and after, and the plan of memory and time."""
    import jax.numpy as jnp

    from qtale_jax import paths
    from qtale_jax.artifact import StoredModel, refuse_existing, weight_bytes
    from qtale_jax.data.scratch import without_writing
    from qtale_jax.models.decoder import abstract_parameters
    from qtale_jax.models.describe import describe, weights_text
    from qtale_jax.quantization.plan import plan
    from qtale_jax.quantization.streaming import QuantizationRun
    from qtale_jax.reporting.dry_run import bytes_text, print_dry_run

    source, target = Path(config.quantize.model or paths.trained(config)), paths.quantized(config)
    refuse_existing(target)
    if config.quantize.bits == 16:
        print_dry_run(
            "quantize", {"model": str(source), **describe(StoredModel(source).spec), "to": "a copy"}, [target]
        )
        return
    with without_writing(config) as readable:
        job = QuantizationRun(source, readable)
    job.check(target)
    rows = None if job.rows is None else (job.rows.tokens.shape[0], job.rows.tokens.shape[1])
    expected = plan(job.spec, job.formats, config.quantize, rows, jnp.dtype(config.train.compute_dtype))
    before, after = (weight_bytes(abstract_parameters(spec))["total"] for spec in (job.spec, job.quantized_spec))
    facts = {"model": str(source), **describe(job.spec), "to": weights_text(job.quantized_spec)}
    facts["bytes"] = f"{bytes_text(before)} now, {bytes_text(after)} then"
    if rows is not None:
        facts["calibration"] = f"{rows[0]:,} rows of {rows[1]:,} tokens"
    facts["peak memory"] = bytes_text(expected.peak)
    facts["time"] = f"about {expected.seconds:.0f} s"
    print_dry_run("quantize", facts, [target])


def _copy(source: Path, target: Path) -> Path:
    """The model as it is, so that 16 bits are one more entry of a grid."""
    from qtale_jax.artifact import lineage, load_model, save_model

    model = load_model(source)
    provenance = lineage("quantize", source, model.provenance)
    save_model(target, model.spec, model.params, tokenizer=model.tokenizer, provenance=provenance)
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """Quantizes as configured and prints where the model is."""
    print(run_stage(parse("quantize", STAGES["quantize"], argv, dry_run)))


if __name__ == "__main__":
    run(main)
