"""`python -m qtale_jax`: lists the stages."""

from collections.abc import Sequence

from qtale_jax.command import STAGES, Parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per stage."""
    Parser(prog="python -m qtale_jax", description="Lists the stages.").parse_args(argv)
    print("python -m qtale_jax.<stage> --help shows the arguments and configuration keys of a stage:\n")
    for stage, description in STAGES.items():
        print(f"  {stage:<12}{description}")


if __name__ == "__main__":
    run(main)
