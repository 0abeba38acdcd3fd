"""`python -m qtale_jax`: lists the stages."""

from collections.abc import Sequence

from qtale_jax.command import STAGES, Parser, run


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per stage."""
    Parser(prog="python -m qtale_jax", description="Lists the stages.").parse_args(argv)
    print("python -m qtale_jax.<stage> CONFIG.yaml [key=value ...]\n")
    for stage, description in STAGES.items():
        print(f"  {stage:<12}{description}")
    print(
        "\n--help shows the arguments and configuration keys of a stage, --print-config the complete configuration,\n"
        "--dry-run what would be done; all stages have them, convert takes SOURCE and OUT instead of a configuration."
    )


if __name__ == "__main__":
    run(main)
