"""Decode speed by executed ratio at batch 1, and what a router costs: a random Llama of about 134 million parameters.

    python benchmarks/skip_decode.py --output benchmarks/results/skip_decode_cpu.json

The time of a token is the difference of a long and a short decode, so that prefill and dispatch drop out. Learned
routers are of the published width, 512, which is two thirds of this model's and an eighth of LLaMA-2-7B's, and of an
eighth of this one's.
"""

from harness import Row, in_turns, parser, report
from random_llama import executed, generation, model

from qtale_jax.models.specification import RoutingSpecification

SHORT, LONG, PROMPT = 8, 40, 16
WIDTHS = (512, 96)


def learned(width: int) -> RoutingSpecification:
    """Routers with parameters, in every layer."""
    return RoutingSpecification(method="qtale", always_on_layers=0, always_on_tokens=0, router_hidden=width)


def measure(rows: int, ratios: tuple[float, ...], layers: int, rounds: int, router: bool) -> list[Row]:
    """Tokens per second of all rows together, at each ratio and with a learned router that executes everything."""
    hashed = model(layers)
    cases = {f"ratio {ratio:g}": (*hashed, ratio) for ratio in (1.0, *ratios)}
    if router:
        cases |= {f"ratio 1, learned routers of {width}": (*model(layers, learned(width)), 1.0) for width in WIDTHS}
        cases["no router"] = (*model(layers, None), 1.0)
    runs = {
        f"{name}/{new}": generation(*case, rows, PROMPT, new) for name, case in cases.items() for new in (SHORT, LONG)
    }
    shares = {name: executed(runs[f"{name}/{LONG}"]()) for name in cases}
    times = in_turns({name: lambda run=run: run().tokens for name, run in runs.items()}, rounds)
    speed = {name: rows * (LONG - SHORT) / (times[f"{name}/{LONG}"] - times[f"{name}/{SHORT}"]) for name in cases}
    baseline = {name: "no router" if "learned" in name else "ratio 1" for name in cases}
    return [
        Row(
            f"{name}, executed {shares[name]:.3f}",
            speed[name],
            "tokens/s",
            baseline[name],
            speed[name] / speed[baseline[name]],
        )
        for name in cases
    ]


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--layers", type=int, default=12, help="layers of the model (default 12)")
    found = arguments.parse_args()
    rows = measure(1, (0.75, 0.5, 0.25), found.layers, found.rounds, router=True)
    report("skip_decode", rows, found.output)


if __name__ == "__main__":
    main()
