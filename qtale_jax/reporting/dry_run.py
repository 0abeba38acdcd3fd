"""What a dry run prints: one fact per line, in columns, the path that would be written last."""

from collections.abc import Iterable, Mapping
from pathlib import Path


def print_dry_run(stage: str, facts: Mapping[str, str], targets: Iterable[str | Path]) -> None:
    """Prints what a stage would do.

    Args:
        stage: its name.
        facts: what was found and what would be done, by name.
        targets: files and folders that would be written.
    """
    print(f"{stage}: dry run, nothing is written")
    for name, text in facts.items():
        print(f"  {name:<15} {text}")
    for target in targets:
        print(f"  {'would write':<15} {target}")


def bytes_text(count: float) -> str:
    """Bytes in the decimal unit that suits them."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
