"""A small routed model with the reasoning tokenizer, and rows to score."""

import jax
import numpy as np
import pytest

from qtale_jax.artifact import LoadedModel
from qtale_jax.data import reasoning
from qtale_jax.data.sources import Choice
from qtale_jax.evaluation.likelihood import Row
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

VOCABULARY = 64


def specification(routed: bool) -> ModelSpecification:
    architecture = Architecture(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        max_length=40,
    )
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.85, 0.85)})
    return ModelSpecification(architecture=architecture, routing=routing if routed else None)


@pytest.fixture(scope="session", params=["dense", "routed"])
def either(request) -> tuple[ModelSpecification, dict]:
    spec = specification(request.param == "routed")
    return spec, initialize(spec, jax.random.key(2))


@pytest.fixture(scope="session")
def routed() -> tuple[ModelSpecification, dict]:
    spec = specification(True)
    return spec, initialize(spec, jax.random.key(2))


@pytest.fixture(scope="session")
def loaded(routed) -> LoadedModel:
    return LoadedModel(*routed, reasoning.tokenizer(), {"seed": 7})


@pytest.fixture(scope="session")
def rows() -> list[Row]:
    """Rows of 2 to 30 tokens, of two length classes, in no order."""
    draw = np.random.default_rng(3)
    sizes = [5, 30, 2, 17, 24, 25, 9, 3, 28, 11]
    return [Row(draw.integers(0, VOCABULARY, n).tolist(), int(draw.integers(1, n))) for n in sizes]


@pytest.fixture(scope="session")
def choices(tmp_path_factory) -> tuple[list[Choice], str]:
    """Questions of the reasoning suite's own making, and a file with them."""
    import json

    found, lines = [], []
    for task in ("count", "rank"):
        stream = reasoning.stream(task, 0)
        for _, example in zip(range(6), stream, strict=False):
            lines.append(json.dumps(dict(example)))
            found.append(Choice(example["task"], example["query"], tuple(example["choices"]), example["gold"]))
    file = tmp_path_factory.mktemp("data") / "choices.jsonl"
    file.write_text("\n".join(lines))
    return found, str(file)
