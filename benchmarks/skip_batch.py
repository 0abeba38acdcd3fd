"""Decode speed by executed ratio at batch 8, rows routed independently: a random Llama of about 134 million parameters.

    python benchmarks/skip_batch.py --output benchmarks/results/skip_batch_cpu.json

Tokens per second of all rows together; see `skip_decode`. With `--like NAME=FILE`, FILE of the evaluation stage of a
routed model, also with layers that execute as unlike shares of the tokens as there.
"""

from pathlib import Path

from harness import parser, report
from random_llama import choice
from skip_decode import measure


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--batch", type=int, default=8, help="rows (default 8)")
    arguments.add_argument("--like", action="append", default=[], metavar="NAME=FILE", help="evaluation of a model")
    found = arguments.parse_args()
    likes = {name: Path(path) for name, _, path in (like.partition("=") for like in found.like)}
    rows = measure(found.batch, (0.9, 0.75, 0.5, 0.25), found.layers, found.rounds, False, found.model, likes)
    report("skip_batch", rows, found.output)


if __name__ == "__main__":
    main()
