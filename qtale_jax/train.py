"""`python -m qtale_jax.train CONFIG [key=value ...]`: trains a base, or fine-tunes routers and adapters."""

import sys

from qtale_jax.command import parse, run


def main() -> None:
    """Trains as configured; the same command continues a run that was interrupted."""
    config = parse("train", "Train a model, or fine-tune routers and adapters on one.")
    from qtale_jax.training.loop import Interrupted, train

    try:
        path = train(config)
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        return
    print(path)


if __name__ == "__main__":
    run(main)
