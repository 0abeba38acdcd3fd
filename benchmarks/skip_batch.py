"""Decode speed by executed ratio at batch 8, rows routed independently: a random Llama of about 134 million parameters.

    python benchmarks/skip_batch.py --output benchmarks/results/skip_batch_cpu.json

Tokens per second of all rows together, after short prompts, where reading the weights is all, and after long ones,
where attention reads the KV cache too, in which skipped tokens leave nothing; see `skip_decode`. With `--like
NAME=FILE`, FILE of the evaluation stage of a routed model, also with layers that execute as unlike shares of
the tokens as there.
"""

from dataclasses import replace
from pathlib import Path

from harness import Row, parser, report
from random_llama import choice
from skip_decode import measure

PROMPTS = (16, 512)
RATIOS = (0.9, 0.75, 0.5, 0.25)
NAMES = ("name", "baseline")


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--batch", type=int, default=8, help="rows (default 8)")
    arguments.add_argument("--prompts", type=int, nargs="+", default=PROMPTS, help="their lengths (default 16 512)")
    arguments.add_argument("--like", action="append", default=[], metavar="NAME=FILE", help="evaluation of a model")
    found = arguments.parse_args()
    likes = {name: Path(path) for name, _, path in (like.partition("=") for like in found.like)}

    def after(length: int) -> list[Row]:
        rows = measure(found.batch, RATIOS, found.layers, found.rounds, False, found.model, likes, length)
        return [replace(row, **{key: f"prompts of {length}, {getattr(row, key)}" for key in NAMES}) for row in rows]

    report("skip_batch", [row for length in found.prompts for row in after(length)], found.output)


if __name__ == "__main__":
    main()
