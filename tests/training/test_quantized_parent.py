"""Only routers train over quantized weights, which stay as they are stored."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from qtale_jax.artifact import load_model
from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.quantize import run_stage as quantize
from qtale_jax.training.loop import train
from qtale_jax.training.start import prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def configured(make_config, tmp_path_factory):
    """Configurations of one folder: a routed parent is trained there for a step."""
    root = tmp_path_factory.mktemp("quantized")

    def of(output: str, **sections) -> Config:
        return make_config(lora=None, **sections).model_copy(update={"output": str(root / output)})

    train(of("parent", train={"steps": 1}), quiet=True)
    return of


@pytest.fixture(scope="module")
def quantized(configured):
    """Quantizes the parent once per setting."""
    done: dict[str, Path] = {}

    def of(**settings) -> Path:
        name = json.dumps(settings)
        if name not in done:
            config = configured("parent", quantize=settings)
            done[name] = Path(config.output).with_name(f"quantized{len(done)}")
            given = config.quantize.model_copy(update={"output": str(done[name])})
            quantize(config.model_copy(update={"quantize": given}), quiet=True)
        return done[name]

    return of


def test_routers_train_and_nothing_else_changes(configured, quantized):
    path = quantized(bits=2, group_size=8)
    routing = {"rate_weight": 5.0, "rate_schedule": "constant", "target": 0.4}
    sections = {"model": {"path": str(path)}, "train": {"parameters": "routers", "steps": 4}, "routing": routing}
    before, after = load_model(path), load_model(train(configured(f"again-{path.name}", **sections), quiet=True))
    assert after.spec.quantization == before.spec.quantization
    assert after.spec.routing is not None and after.spec.routing.thresholds == {}
    changed = []
    for (where, old), (_, new) in zip(
        jax.tree_util.tree_leaves_with_path(before.params),
        jax.tree_util.tree_leaves_with_path(after.params),
        strict=True,
    ):
        assert old.dtype == new.dtype
        if not np.array_equal(old, new):
            changed.append(jax.tree_util.keystr(where))
    assert changed and all("router" in where for where in changed)


def test_training_takes_no_kernels_for_they_have_no_gradients(configured, quantized):
    path = quantized(bits=2, group_size=8)
    config = configured("start", model={"path": str(path)}, train={"parameters": "routers"})
    mesh = build_mesh(config.mesh, jax.devices()[:1])
    assert prepare(config, mesh, jax.random.key(0)).spec.kernels == "xla"


@pytest.mark.parametrize(
    ("storage", "sections", "message"),
    [
        ({"bits": 4}, {"train": {"parameters": "all"}}, r"only its routers.*train\.parameters=routers"),
        (
            {"bits": 4},
            {"train": {"parameters": "routers", "quantization_aware": {"formats": [{"bits": 4}]}}},
            r"already; allowed: train\.quantization_aware\.formats=\[\]",
        ),
        ({"bits": 4, "router_bits": 8}, {"train": {"parameters": "routers"}}, r"quantize\.router_bits=16"),
        (
            {"bits": 4, "rules": [{"match": "2/*", "bits": 8}]},
            {"train": {"parameters": "routers"}},
            "different formats from layer to layer",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(configured, quantized, storage, sections, message):
    config = configured("refused", model={"path": str(quantized(**storage))}, **sections)
    with pytest.raises(InputError, match=message):
        train(config, quiet=True)
    assert not Path(config.output).exists()


def test_groups_to_train_for_have_to_divide_the_linears_of_the_parent(configured):
    parent = Path(configured("parent").output) / "trained"
    train_section = {"quantization_aware": {"formats": [{"bits": 4}, {"bits": 2, "group_size": 7}]}}
    config = configured("undivided", model={"path": str(parent)}, train=train_section)
    with pytest.raises(
        InputError, match=r"^train\.quantization_aware\.formats\.1\.group_size=7 does not divide the 16"
    ):
        train(config, quiet=True)
    assert not Path(config.output).exists()
