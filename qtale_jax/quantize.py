"""`python -m qtale_jax.quantize CONFIG [key=value ...]`: rounds the linears of a model to few bits."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def run_stage(config: Config, *, quiet: bool = False) -> Path:
    """Reads `quantize.model`, writes `quantize.output`, prints a table; returns the new model directory.

    Raises:
        InputError: bad input, or the output exists.
    """
    from rich.console import Console
    from rich.progress import Progress

    from qtale_jax import paths
    from qtale_jax.artifact import lineage, load_model, refuse_existing, save_model, weight_bytes
    from qtale_jax.quantization.pipeline import quantize_parameters
    from qtale_jax.reporting.console import quantization_table

    source, target = Path(config.quantize.model or paths.trained(config)), paths.quantized(config)
    refuse_existing(target)
    loaded = load_model(source)
    before = weight_bytes(loaded.params)
    console = Console(stderr=True)
    with Progress(console=console, disable=quiet or not console.is_terminal) as progress:
        task = progress.add_task("quantizing", total=loaded.spec.architecture.num_layers)
        spec, params, report = quantize_parameters(
            loaded.spec, loaded.params, config.quantize, lambda _: progress.advance(task)
        )
    quantizer = config.quantize.model_dump(exclude={"model", "output"})
    layers = [asdict(layer) for layer in report]
    provenance = lineage("quantize", source, loaded.provenance, quantizer=quantizer, layers=layers)
    save_model(target, spec, params, tokenizer=loaded.tokenizer, provenance=provenance)
    if not quiet:
        Console().print(quantization_table(report, before, weight_bytes(params)))
    return target


def main(argv: Sequence[str] | None = None) -> None:
    """Quantizes as configured and prints where the model is."""
    print(run_stage(parse("quantize", STAGES["quantize"], argv)))


if __name__ == "__main__":
    run(main)
