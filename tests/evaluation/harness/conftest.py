"""The pretrained stories260k as a model directory, and what the harness's own backend gives for it."""

import json
from pathlib import Path

import pytest

from qtale_jax.artifact import LoadedModel, load_model
from qtale_jax.models.huggingface import from_huggingface


@pytest.fixture(scope="session")
def stories_path(shared_data, tmp_path_factory) -> Path:
    """stories260k, converted; skips where it is absent."""
    source = shared_data / "stories260k"
    if not source.is_dir():
        pytest.skip(f"no checkpoint in {source}")
    path = tmp_path_factory.mktemp("stories") / "model"
    from_huggingface(source, path)
    return path


@pytest.fixture(scope="session")
def stories(stories_path) -> LoadedModel:
    return load_model(stories_path)


@pytest.fixture(scope="session")
def expected() -> dict:
    return json.loads((Path(__file__).parent / "golden" / "expected.json").read_text())
