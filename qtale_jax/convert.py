"""`python -m qtale_jax.convert SOURCE OUT`: Hugging Face checkpoints to model directories; `--to-hf`: back.

Checkpoints whose linears AutoAWQ or GPTQ packed in 4 bits stay quantized; `--to-hf --quantized awq` writes such models.
"""

from collections.abc import Mapping, Sequence
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
    parser.add_argument(
        "--quantized",
        choices=("awq",),
        help="with --to-hf: keep the integers of a model whose linears are all 4-bit with one group size, in AutoAWQ's "
        "layout (version gemm); everything else is written in float16, scales included, and a table says how many "
        "values that changed; default: restore all weights",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check input and output, print what would be written, and write nothing"
    )
    return parser


SCALES = ("scales", "zero_points", "order", "qzeros")
"""Last parts of the names of arrays that are no parameters: they say what the integers of quantized ones mean."""


def _rows(arrays: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Parameters, bytes and types of arrays by name, of which only shape and type are looked at, by part of the model.

    In packed checkpoints eight parameters make one int32.
    """
    import math

    import numpy as np

    from qtale_jax.quantization.storage import array_bytes

    parts: dict[str, list[Any]] = {"model": [], "scales": [], "routers": []}
    for name, array in arrays.items():
        keys = name.replace("/", ".").split(".")
        parts["routers" if "router" in keys else "scales" if keys[-1] in SCALES else "model"].append((keys[-1], array))
    rows = []
    for part, found in parts.items():
        count = sum(math.prod(array.shape) * (8 if last == "qweight" else 1) for last, array in found)
        size = sum(array_bytes(array) for _, array in found)
        types = sorted({np.dtype(array.dtype).name for _, array in found})
        if found:
            rows.append((part, f"{count:,}" if part != "scales" else "", f"{size:,}", ", ".join(types)))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Converts, prints parameters, bytes and types, then where the result is."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.quantized and not arguments.to_hf:
        parser.error("--quantized needs --to-hf")
    if arguments.quantized and arguments.dtype:
        parser.error("--dtype does not go with --quantized, which is stored in float16")

    from rich.console import Console

    from qtale_jax.artifact import refuse_existing
    from qtale_jax.artifact.arrays import flatten
    from qtale_jax.models.describe import describe
    from qtale_jax.models.huggingface import from_huggingface, read_huggingface, to_huggingface, would_write
    from qtale_jax.reporting.console import table
    from qtale_jax.reporting.dry_run import print_dry_run

    refuse_existing(arguments.output)
    changed = {}
    if arguments.to_hf:
        form = {"dtype": arguments.dtype, "quantized": arguments.quantized}
        if arguments.dry_run:
            result = would_write(arguments.source, **form)
        else:
            result = to_huggingface(arguments.source, arguments.output, **form)
        arrays = {tensor.name: tensor for tensor in (*result.tensors, *result.routers)}
        changed = result.changed
    else:
        if arguments.dry_run:
            result = read_huggingface(arguments.source, dtype=arguments.dtype)
        else:
            result = from_huggingface(arguments.source, arguments.output, dtype=arguments.dtype)
        arrays = flatten(result.params)
    if arguments.dry_run:
        facts = {"source": arguments.source, **describe(result.spec)}
        for part, count, size, types in _rows(arrays):
            facts[part] = ", ".join(filter(None, (f"{count} parameters" if count else "", f"{size} bytes", types)))
        facts |= {f"{what} changed": f"{count:,} of {of:,} values" for what, (count, of) in changed.items()}
        print_dry_run("convert", facts, [arguments.output])
        return
    Console().print(table("converted", ("part", "parameters", "bytes", "type"), _rows(arrays)))
    if changed:
        rows = [(what, f"{of:,}", f"{count:,}") for what, (count, of) in changed.items()]
        Console().print(table("rounded to float16", ("what", "values", "changed"), rows))
    print(arguments.output)


if __name__ == "__main__":
    run(main)
