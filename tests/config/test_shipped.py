"""The configuration files of the repository: all load, and say what they are."""

from pathlib import Path

import pytest

from qtale_jax.config.loading import load_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_has_a_header(path):
    load_config(path)
    assert path.read_text(encoding="utf-8").startswith("# ")
