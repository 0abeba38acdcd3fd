"""Decode speed by executed ratio at batch 1, and what a router costs: a random Llama of about 134 million parameters.

    python benchmarks/skip_decode.py --output benchmarks/results/skip_decode_cpu.json
    python benchmarks/skip_decode.py --model 7b --layers 8 --no-router --output FILE   on a GPU or TPU

The time of a token is the difference of a long and a short decode, so that prefill and dispatch drop out. Learned
routers are of the published width, 512, which is two thirds of this model's and an eighth of LLaMA-2-7B's, and of an
eighth of this one's.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
from harness import Row, each_round, parser, report
from random_llama import choice, executed, generation, like_trained, model, settled

from qtale_jax.models.specification import RoutingSpecification

SHORT, LONG, PROMPT = 8, 72, 16
WIDTHS = (512, 96)
UNLIKE = (0.9, 0.1)
"""Half of the layers execute for nine rows in ten, the other half for one."""


def learned(width: int) -> RoutingSpecification:
    """Routers with parameters, in every layer."""
    return RoutingSpecification(method="qtale", always_on_layers=0, always_on_tokens=0, router_hidden=width)


def measure(
    rows: int,
    ratios: tuple[float, ...],
    layers: int | None,
    rounds: int,
    router: bool,
    name: str = "134m",
    evaluations: Mapping[str, Path] = MappingProxyType({}),
    prompt: int = PROMPT,
) -> list[Row]:
    """Tokens per second of all rows together, at each ratio and with a learned router that executes everything.

    With more than one row also at a ratio of .5 where layers are unlike: every other one, and as in `evaluations`.
    """
    hashed = model(layers, name=name)
    cases = {"ratio 1": (*hashed, 1.0)}
    for ratio in ratios:  # the draws of a single row are few
        asked = settled(*hashed, ratio, rows, prompt, LONG) if rows == 1 else ratio
        cases[f"ratio {ratio:g}"] = (*hashed, asked)
    if rows > 1:
        depth = hashed[0].architecture.num_layers
        cases["ratio 0.5, layers unlike"] = (*hashed, np.resize(UNLIKE, depth))
        for label, path in evaluations.items():
            cases[f"ratio 0.5, layers as in {label}"] = (*hashed, like_trained(path, depth, 0.5))
    if router:
        widths = WIDTHS if name == "134m" else WIDTHS[:1]
        cases |= {f"ratio 1, learned routers of {size}": (*model(layers, learned(size), name), 1.0) for size in widths}
        cases["no router"] = (*model(layers, None, name), 1.0)
    runs = {
        f"{name}/{new}": generation(*case, rows, prompt, new) for name, case in cases.items() for new in (SHORT, LONG)
    }
    shares = {name: executed(runs[f"{name}/{LONG}"]()) for name in cases}
    times = each_round({name: lambda run=run: run().tokens for name, run in runs.items()}, rounds)
    seconds = {name: times[f"{name}/{LONG}"] - times[f"{name}/{SHORT}"] for name in cases}
    baseline = {name: "no router" if "learned" in name else "ratio 1" for name in cases}
    # Ratios within a round, then their median: a slow spell of the machine hits both sides of a ratio.
    ratio = {name: float(np.median(seconds[baseline[name]] / seconds[name])) for name in cases}
    speed = {name: rows * (LONG - SHORT) / float(np.median(seconds[name])) for name in cases}
    return [
        Row(
            f"{name}, executed {shares[name]:.3f}",
            speed[name],
            "tokens/s",
            baseline[name],
            ratio[name],
        )
        for name in cases
    ]


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--no-router", dest="router", action="store_false", help="leave learned routers out")
    found = arguments.parse_args()
    rows = measure(1, (0.75, 0.5, 0.25), found.layers, found.rounds, found.router, found.model)
    report("skip_decode", rows, found.output)


if __name__ == "__main__":
    main()
