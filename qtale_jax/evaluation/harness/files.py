"""Which of `harness.tasks` are files, and whether they are there; works without lm-evaluation-harness."""

from pathlib import Path

from qtale_jax.config.schema import HarnessConfig
from qtale_jax.errors import InputError

ROWS = (".json", ".jsonl")
"""Suffixes of files of rows."""

FILES = (".yaml", ".yml", *ROWS)
"""Suffixes of files; names of registered tasks have dots too."""


def check_files(config: HarnessConfig) -> None:
    """Refuses files that are not there, and examples in prompts where only a file of rows is read.

    Raises:
        InputError: names the file.
    """
    for name in config.tasks:
        suffix = Path(name).suffix
        if suffix in FILES and not Path(name).is_file():
            raise InputError(f"harness.tasks: {name}: no such file")
        if suffix in ROWS and config.num_fewshot:
            raise InputError(f"harness.num_fewshot={config.num_fewshot}: {name} has no other rows to show; allowed: 0")
