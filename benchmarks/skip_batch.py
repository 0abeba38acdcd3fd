"""Decode speed by executed ratio at batch 8, rows routed independently: a random Llama of about 134 million parameters.

python benchmarks/skip_batch.py --output benchmarks/results/skip_batch_cpu.json

Tokens per second of all rows together; see `skip_decode`.
"""

from harness import parser, report
from random_llama import choice
from skip_decode import measure


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--batch", type=int, default=8, help="rows (default 8)")
    found = arguments.parse_args()
    rows = measure(found.batch, (0.9, 0.75, 0.5, 0.25), found.layers, found.rounds, False, found.model)
    report("skip_batch", rows, found.output)


if __name__ == "__main__":
    main()
