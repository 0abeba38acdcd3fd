"""Reading data without leaving anything behind."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qtale_jax.config.schema import Config
from qtale_jax.data import reasoning
from qtale_jax.data.sources import STORED, reasoning_folder


@contextlib.contextmanager
def without_writing(config: Config) -> Iterator[Config]:
    """Yields a configuration to read from: a suite that was not generated yet is generated in a temporary folder."""
    data = config.data
    if data.kind != "reasoning" or reasoning.is_prepared(reasoning_folder(data), STORED[data.suite]):
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="qtale-jax-") as folder:
        yield config.model_copy(update={"data": data.model_copy(update={"path": str(Path(folder) / "data")})})
