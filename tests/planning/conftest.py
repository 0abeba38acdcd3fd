"""A tiny model to plan for, as configuration."""

from collections.abc import Callable

import pytest

from qtale_jax.config import load_config
from qtale_jax.config.loading import with_overrides
from qtale_jax.config.schema import Config

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 4, "num_heads": 4}


@pytest.fixture
def tiny() -> Callable[..., Config]:
    """A configuration of 8 rows of 12 tokens, with `section.key=value` laid on it."""
    base = {
        "model": {"architecture": {**SHAPE, "num_kv_heads": 2, "max_length": 64}},
        "routing": {"always_on_layers": 1, "router_hidden": 8},
        "lora": {"rank": 2},
        "data": {"length": 12},
        "train": {"batch_size": 8, "steps": 2},
        "mesh": {"data": 1, "fsdp": -1},
        "quantize": {"group_size": 16},
    }
    return lambda *overrides: with_overrides(Config.model_validate(base), overrides)


@pytest.fixture
def shipped() -> Callable[..., Config]:
    """A configuration file of the repository."""
    return lambda name, *overrides: load_config(f"configs/{name}.yaml", overrides)
