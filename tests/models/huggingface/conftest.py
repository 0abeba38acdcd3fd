"""Golden checkpoints, and small tools to look into and to break checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.huggingface import from_huggingface
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.specification import ModelSpecification

NAMES = ("llama2", "llama3_1", "grouped", "tied")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Tiny checkpoints as transformers writes them, and what it computes with them (see golden/generate.py)."""
    return Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def converted(golden, tmp_path_factory) -> Path:
    """Model directories of the golden checkpoints."""
    root = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        from_huggingface(golden / name, root / name)
    return root


@pytest.fixture
def checkpoint(golden, tmp_path) -> Path:
    """A copy of a golden checkpoint, to be broken."""
    return Path(shutil.copytree(golden / "llama2", tmp_path / "checkpoint"))


@pytest.fixture(scope="session")
def raw() -> Callable[[Path], dict]:
    """Every tensor of a checkpoint as (type, shape, bytes), independent of the library's own reader."""

    def read(directory: Path) -> dict:
        found = {}
        for file in sorted(directory.glob("model*.safetensors")):
            for name, tensor in safetensors.deserialize(file.read_bytes()):
                found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
        return found

    return read


@pytest.fixture(scope="session")
def edit_config() -> Callable[..., None]:
    """Changes keys of a directory's config.json; a key set to ... is removed."""

    def edit(directory: Path, **changes) -> None:
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit


@pytest.fixture(scope="session")
def base_spec(golden) -> Callable[..., ModelSpecification]:
    """A specification with the architecture of a golden model; keywords are its other fields."""
    architecture = architecture_from(json.loads((golden / "llama3_1" / "config.json").read_text()), "config.json")
    return lambda **fields: ModelSpecification(architecture=architecture, **fields)


@pytest.fixture(scope="session")
def filled() -> Callable[[ModelSpecification], dict]:
    """Random parameters of any specification, quantized ones included."""

    def fill(spec: ModelSpecification) -> dict:
        generator = np.random.default_rng(0)

        def random(leaf):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                return jnp.asarray((0.3 * generator.normal(size=leaf.shape)).astype(leaf.dtype))
            low, high = int(jnp.iinfo(leaf.dtype).min), int(jnp.iinfo(leaf.dtype).max)
            return jnp.asarray(generator.integers(low, high, leaf.shape, np.int64, endpoint=True).astype(leaf.dtype))

        return jax.tree.map(random, abstract_parameters(spec))

    return fill
