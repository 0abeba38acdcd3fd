"""`python -m qtale_jax.generate CONFIG [key=value ...]`: continues prompts with a model directory."""

from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run
from qtale_jax.config.schema import Config


def dry_run(config: Config) -> None:
    """Prints the model and the lengths of the prompts, which have to fit into its context."""
    from qtale_jax import paths
    from qtale_jax.data.tokens import encode
    from qtale_jax.errors import InputError
    from qtale_jax.model import read_headers
    from qtale_jax.models.describe import describe
    from qtale_jax.reporting.dry_run import print_dry_run

    settings = config.generate
    source = Path(settings.model or paths.newest(config))
    spec, tokenizer = read_headers(source)
    lengths = [len(ids) for ids in encode(tokenizer, settings.prompts or ("",))]
    longest, limit = max(lengths), spec.architecture.max_length
    if min(lengths) == 0:
        raise InputError("generate: an empty prompt needs a tokenizer with a beginning-of-sequence token")
    if longest + settings.max_new_tokens > limit:
        raise InputError(
            f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones exceed the context of {limit}"
        )
    prompts = f"{len(lengths)}, of up to {longest} tokens; {settings.max_new_tokens} new ones at most"
    how = "greedy" if settings.temperature == 0 else f"temperature {settings.temperature:g}, top-p {settings.top_p:g}"
    print_dry_run("generate", {"model": str(source), **describe(spec), "prompts": prompts, "sampling": how}, [])


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each continuation with the executed share of layers and the size of its KV cache."""
    config = parse("generate", STAGES["generate"], argv, dry_run)
    from qtale_jax import paths
    from qtale_jax.model import load

    settings = config.generate
    model = load(Path(settings.model or paths.newest(config)), compute_dtype=config.train.compute_dtype)
    model = model.with_kernels(settings.kernels)
    prompts = settings.prompts or ("",)
    found = model.generate(
        prompts,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        config.seed,
        settings.kv_cache,
        settings.engine,
    )
    for prompt, generation in zip(prompts, found, strict=True):
        print(f"{prompt}{generation.text}")
        executed, held = generation.executed_ratio, generation.kv_bytes / 1e3
        print(f"[{len(generation.tokens)} tokens, {executed:.3f} of all layers executed, {held:,.1f} kB of KV cache]")


if __name__ == "__main__":
    run(main)
