"""An exported folder: `transformers` sees the dense model, `qtale_jax.load` the routed one, README.md says both."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoTokenizer

import qtale_jax
from qtale_jax.artifact import save_model
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import initialize
from qtale_jax.models.huggingface import to_huggingface, would_write
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.quantization.pipeline import quantize_parameters

TEXT = " ".join(list(reasoning.WORDS)[3:12])
SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A routed model with one theta per layer, the same in 4 bits, and one without routers. Read only."""
    folder = tmp_path_factory.mktemp("models")
    architecture = Architecture(**SHAPE, num_kv_heads=2, head_dim=8, max_length=32)
    routing = RoutingSpecification(
        method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.83, 0.9), "4": (0.85, 0.88)}
    )
    for name, routed in (("routed", routing), ("dense", None)):
        spec = ModelSpecification(architecture=architecture, routing=routed)
        params = initialize(spec, jax.random.key(2))
        saved = {"tokenizer": reasoning.tokenizer(), "provenance": {"stage": "train", "seed": 2}}
        save_model(folder / name, spec, params, **saved)
        if routed:
            small, rounded, _ = quantize_parameters(spec, params, QuantizeConfig(bits=4))
            save_model(folder / "quantized", small, rounded, **saved)
    return folder


def same(one: qtale_jax.Model, other: qtale_jax.Model, tolerance: float) -> None:
    """Both execute the same, with the same logits."""
    a, b = one.routing(TEXT), other.routing(TEXT)
    assert a.words == b.words
    np.testing.assert_array_equal(a.execute, b.execute)
    np.testing.assert_allclose(a.probability, b.probability, rtol=0, atol=tolerance)
    tokens = np.array([[1, 5, 6, 7, 9, 11]])
    np.testing.assert_allclose(one.forward(tokens).logits, other.forward(tokens).logits, rtol=0, atol=tolerance)


@pytest.mark.slow
def test_the_folder_is_routed_here_and_dense_there(models, tmp_path):
    to_huggingface(models / "routed", tmp_path / "hf")
    model, again = qtale_jax.load(models / "routed"), qtale_jax.load(tmp_path / "hf")
    assert again.spec == model.spec and again.spec.thresholds == (0.83, 0.9)
    same(model, again, 0)
    assert 1 / 3 < model.routing(TEXT).executed_ratio < 1  # something is skipped, or this would show nothing
    assert again.generate([TEXT], max_new_tokens=3) == model.generate([TEXT], max_new_tokens=3)
    assert AutoConfig.from_pretrained(tmp_path / "hf").architectures == ["LlamaForCausalLM"]
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXT)["input_ids"]


def stored(model: qtale_jax.Model) -> qtale_jax.Model:
    """The model as AWQ's layout stores it: integers and routers as they are, everything else in float16."""

    def leaf(path, value):
        kept = "router" in jax.tree_util.keystr(path) or not jnp.issubdtype(value.dtype, jnp.floating)
        return value if kept else value.astype(jnp.float16).astype(value.dtype)

    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(leaf, model.params))


@pytest.mark.slow
@pytest.mark.parametrize("packed", ["awq", None])
def test_quantized_models_decide_as_before(models, tmp_path, packed):
    to_huggingface(models / "quantized", tmp_path / "hf", quantized=packed)
    model, again = qtale_jax.load(models / "quantized"), qtale_jax.load(tmp_path / "hf")
    assert again.spec.thresholds == (0.85, 0.88) and again.spec.bits == (4 if packed else 16)
    if packed:
        model = stored(model)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), model.params, again.params)
    same(model, again, 1e-5 if packed else 1e-6)  # scales of float16 multiply in another order


def test_the_card_says_what_it_is(models, tmp_path):
    to_huggingface(models / "quantized", tmp_path / "hf")
    text = (tmp_path / "hf" / "README.md").read_text()
    data = ModelCard(text).data
    assert data.library_name == "transformers" and "qtale" in data.tags and "awq" not in data.tags
    assert 'qtale_jax.load("FOLDER")' in text and "4-bit rtn, asymmetric" in text
    assert "| 4 | 0.85 to 0.88, one per layer |" in text and "seed: 2" in text
    to_huggingface(models / "dense", tmp_path / "plain")
    plain = (tmp_path / "plain" / "README.md").read_text()
    assert "qtale_jax.load" not in plain and "every token executes every layer" in plain
    assert qtale_jax.load(tmp_path / "plain").spec.routing is None


def test_what_would_be_written_is_what_is_written(models, tmp_path):
    planned = would_write(models / "routed")
    written = to_huggingface(models / "routed", tmp_path / "hf")
    assert [(t.name, t.shape, t.dtype) for t in planned.tensors] == [
        (t.name, t.shape, t.dtype) for t in written.tensors
    ]
    assert [t.name for t in planned.routers] == [t.name for t in written.routers] != []
    assert planned.files == [] and written.files


def test_a_folder_that_is_neither_is_refused(tmp_path):
    with pytest.raises(InputError, match="model.json is missing"):
        qtale_jax.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config\.json"):
        qtale_jax.load(tmp_path)
