"""`python -m qtale_jax.generate CONFIG [key=value ...]`: continues prompts with a model directory."""

from collections.abc import Sequence
from pathlib import Path

from qtale_jax.command import STAGES, parse, run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints each continuation with the executed share of layers and the size of its KV cache."""
    config = parse("generate", STAGES["generate"], argv)
    from qtale_jax import paths
    from qtale_jax.model import load

    settings = config.generate
    model = load(Path(settings.model or paths.newest(config)), compute_dtype=config.train.compute_dtype)
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
