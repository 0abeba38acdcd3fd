"""Entry point: `python -m qtale_jax.convert` reads Hugging Face Llama checkpoints, and writes them with `--to-hf`."""

from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, Parser, run
from qtale_jax.errors import InputError


def import_checkpoint(source: str | Path, output: str | Path, dtype: str | None = None) -> None:
    """Makes a model directory of a Hugging Face checkpoint.

    Args:
        source: the checkpoint, with its tokenizer if it has one.
        output: a directory that does not exist yet.
        dtype: "float32" or "bfloat16" for kernels and embedding; None: as stored (float16 becomes float32).

    Raises:
        InputError: `output` exists, or the checkpoint is damaged or not supported.
    """
    from qtale_jax.artifact import load_tokenizer, save_model
    from qtale_jax.models.huggingface_import import read

    if Path(output).exists():
        raise InputError(f"{output} exists already; choose another output or remove it")
    imported = read(source, dtype)
    provenance = {"stage": "convert", **imported.provenance}
    save_model(output, imported.spec, imported.params, tokenizer=load_tokenizer(source), provenance=provenance)


def _print_summary(path: str | Path) -> None:
    import math

    import jax
    from rich.console import Console
    from rich.table import Table

    from qtale_jax.artifact import read_model_json
    from qtale_jax.models.decoder import abstract_parameters
    from qtale_jax.quantization.storage import array_bytes

    spec = read_model_json(path).spec
    leaves = jax.tree.leaves(abstract_parameters(spec))
    table = Table("model", "layers", "parameters", "bytes", "type")
    stored = f"{spec.bits}-bit" if spec.quantization else spec.dtype
    table.add_row(
        "llama, routed" if spec.routing else "llama",
        str(spec.architecture.num_layers),
        f"{sum(math.prod(leaf.shape) for leaf in leaves):,}",
        f"{sum(map(array_bytes, leaves)):,}",
        stored,
    )
    Console(highlight=False).print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts in one direction or the other and prints what was converted."""
    parser = Parser(prog="python -m qtale_jax.convert", description=STAGES["convert"])
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face checkpoint; a model directory with --to-hf")
    parser.add_argument("output", metavar="OUT", help="directory to write; it must not exist")
    parser.add_argument("--to-hf", action="store_true", help="write a Hugging Face checkpoint of a model directory")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="type of the kernels; default: as stored")
    arguments = parser.parse_args(argv)
    if arguments.to_hf:
        if arguments.dtype:
            raise InputError("command line: --dtype does not apply with --to-hf, which restores the original types")
        from qtale_jax.models.huggingface_export import export

        export(arguments.source, arguments.output)
        _print_summary(arguments.source)
    else:
        import_checkpoint(arguments.source, arguments.output, arguments.dtype)
        _print_summary(arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    run(main)
