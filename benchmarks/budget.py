"""The predicted decoding speed, which θ is calibrated by for a budget, against the speed that is reached.

    python benchmarks/budget.py --output benchmarks/results/budget_cpu.json

A random Llama of about 134 million parameters with routes by a hash; the prediction is that of the table of measured
parts that `calibrate.objective=budget` makes, for the shares of the layers that the generation executes. The ratio is
predicted over real speed.
"""

import jax.numpy as jnp
import numpy as np
from harness import Row, each_round, parser, report
from random_llama import choice, generation, model

from qtale_jax.calibration.measuring import measure
from qtale_jax.config.budget import BudgetConfig

SHORT, LONG, PROMPT = 8, 72, 16
RATIOS = (1.0, 0.75, 0.5, 0.25)


def compare(rows: int, layers: int | None, rounds: int, name: str) -> list[Row]:
    """Predicted and real tokens per second of all rows together at every ratio."""
    spec, params = model(layers, name=name)
    # In the middle of the tokens that are timed.
    context = PROMPT + (SHORT + LONG) // 2
    settings = BudgetConfig(tokens_per_second=1, batch_size=rows, prompt_length=context, repeats=rounds)
    table = measure(spec, params, settings, jnp.dtype(spec.dtype))
    runs = {(r, new): generation(spec, params, r, rows, PROMPT, new) for r in RATIOS for new in (SHORT, LONG)}
    times = each_round({f"{r}/{new}": lambda run=run: run().tokens for (r, new), run in runs.items()}, rounds)
    found = []
    for ratio in RATIOS:
        shares = np.asarray(runs[ratio, LONG]().execute)[:, SHORT : LONG - 1].mean(axis=(0, 1))
        real = rows * (LONG - SHORT) / float(np.median(times[f"{ratio}/{LONG}"] - times[f"{ratio}/{SHORT}"]))
        predicted = table.tokens_per_second(table.step_seconds(shares))
        label = f"batch {rows}, executed {shares.mean():.3f}"
        found.append(Row(f"{label}, real", real, "tokens/s"))
        found.append(Row(f"{label}, predicted", predicted, "tokens/s", f"{label}, real", predicted / real))
    return found


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="rows (default 1 8)")
    found = arguments.parse_args()
    rows = [row for batch in found.batches for row in compare(batch, found.layers, found.rounds, found.model)]
    report("budget", rows, found.output)


if __name__ == "__main__":
    main()
