"""Time of a prompt of 512 tokens by executed ratio: a random Llama of about 134 million parameters.

python benchmarks/skip_prefill.py --output benchmarks/results/skip_prefill_cpu.json

One chunk, from an empty cache.
"""

from harness import Row, in_turns, parser, report
from random_llama import at_ratio, choice, inference_options, model, prompts

from qtale_jax.inference.streaming import run_prompts


def main() -> None:
    """Measures, prints and writes."""
    arguments = parser(__doc__.splitlines()[0])
    choice(arguments)
    arguments.add_argument("--length", type=int, default=512, help="tokens of the prompt (default 512)")
    found = arguments.parse_args()
    spec, params = model(found.layers, name=found.model)
    tokens, lengths = prompts(1, found.length)

    def run(ratio: float):
        policy = at_ratio(spec, ratio)
        return run_prompts(spec.structure, params, tokens, lengths, policy, found.length, inference_options(spec))

    ratios = (1.0, 0.75, 0.5, 0.25)
    shares = {ratio: float(run(ratio).execute.mean()) for ratio in ratios}
    times = in_turns({str(ratio): lambda ratio=ratio: run(ratio).last for ratio in ratios}, found.rounds)
    rows = [
        Row(
            f"ratio {ratio:g}, executed {shares[ratio]:.3f}",
            times[str(ratio)],
            "s",
            "ratio 1",
            times["1.0"] / times[str(ratio)],
        )
        for ratio in ratios
    ]
    report("skip_prefill", rows, found.output)


if __name__ == "__main__":
    main()
