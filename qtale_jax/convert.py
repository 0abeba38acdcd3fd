"""`python -m qtale_jax.convert SOURCE OUT`: Hugging Face Llama checkpoints to model directories; `--to-hf`: back."""

from collections.abc import Iterable, Sequence
from typing import Any

from qtale_jax.command import STAGES, Parser, run


def _parser() -> Parser:
    parser = Parser(prog="python -m qtale_jax.convert", description=STAGES["convert"])
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face directory; with --to-hf: model directory")
    parser.add_argument("output", metavar="OUT", help="directory to write; it must not exist yet")
    parser.add_argument("--to-hf", action="store_true", help="write a model directory as a Hugging Face checkpoint")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="type of the weights; default: the one they are stored in"
    )
    return parser


def _row(part: str, arrays: Iterable[Any]) -> tuple[str, str, str, str]:
    """Parameters, bytes and types of arrays, of which only shape and type are looked at."""
    import math

    import numpy as np

    found = [(math.prod(array.shape), np.dtype(array.dtype)) for array in arrays]
    size = sum(count * dtype.itemsize for count, dtype in found)
    types = sorted({dtype.name for _, dtype in found})
    return part, f"{sum(count for count, _ in found):,}", f"{size:,}", ", ".join(types)


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, prints parameters, bytes and types, then where the result is."""
    arguments = _parser().parse_args(argv)
    from rich.console import Console

    from qtale_jax.artifact import refuse_existing
    from qtale_jax.artifact.arrays import flatten
    from qtale_jax.models.huggingface import from_huggingface, to_huggingface
    from qtale_jax.reporting.console import table

    refuse_existing(arguments.output)
    if arguments.to_hf:
        written = to_huggingface(arguments.source, arguments.output, dtype=arguments.dtype)
        model, routers = written.tensors, written.routers
    else:
        flat = flatten(from_huggingface(arguments.source, arguments.output, dtype=arguments.dtype).params)
        model = [leaf for path, leaf in flat.items() if "/router/" not in path]
        routers = [leaf for path, leaf in flat.items() if "/router/" in path]
    rows = [_row("model", model)] + ([_row("routers", routers)] if routers else [])
    Console().print(table("converted", ("part", "parameters", "bytes", "type"), rows))
    print(arguments.output)


if __name__ == "__main__":
    run(main)
