"""Families besides Llama: what their config.json may say, what is written, packed checkpoints, cached decoding."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qtale_jax import artifact
from qtale_jax.artifact.arrays import flatten, nest
from qtale_jax.errors import InputError
from qtale_jax.inference.generation import generate
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, read_huggingface, to_huggingface
from qtale_jax.models.huggingface.config import architecture_from, config_for
from qtale_jax.models.huggingface.families import FAMILIES, FULL, SLIDING
from qtale_jax.models.policy import Dense
from qtale_jax.models.specification import LINEARS, ModelSpecification, QuantizationSpecification, TensorFormat

NAMES = ("qwen2", "mistral", "qwen3")

SIZES = {
    "vocab_size": 8,
    "hidden_size": 12,
    "intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

run = jax.jit(forward, static_argnames=("spec",))


@pytest.fixture(scope="module")
def architectures(golden):
    """Of the golden models."""
    configs = {name: json.loads((golden / name / "config.json").read_text()) for name in NAMES}
    return {name: architecture_from(config, "config.json") for name, config in configs.items()}


def test_the_golden_models_have_what_their_family_adds(architectures):
    assert architectures["qwen2"].biases == ("query", "key", "value")
    assert architectures["mistral"].sliding_window == 7
    assert architectures["qwen3"].query_key_norm and architectures["qwen3"].head_dim == 16
    assert all(architecture.family == name for name, architecture in architectures.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_agrees_with_transformers(converted, golden, name):
    model = artifact.load_model(converted / name)
    with np.load(golden / name / "expected.npz") as data:
        prompts, expected = data["tokens"][:, :8], data["greedy"]
    found = generate(
        model.spec,
        model.params,
        jnp.asarray(prompts),
        jnp.full((len(prompts),), 8, jnp.int32),
        Dense(),
        jax.random.key(0),
        jnp.float32(0),
        jnp.float32(1),
        jnp.int32(-1),
        max_new_tokens=expected.shape[1],
    )
    np.testing.assert_array_equal(found.tokens, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(family):
    import transformers

    theirs = transformers.AutoConfig.for_model(family, **SIZES | {"num_key_value_heads": 2})
    found = architecture_from({"model_type": family, **SIZES, "num_key_value_heads": 2}, "config.json")
    assert found.max_length == theirs.max_position_embeddings
    assert found.norm_eps == theirs.rms_norm_eps
    assert found.head_dim == getattr(theirs, "head_dim", SIZES["hidden_size"] // SIZES["num_attention_heads"])
    assert found.rope_theta == theirs.rope_parameters["rope_theta"]
    assert found.tied_head == theirs.tie_word_embeddings
    heads = {"num_attention_heads": 64, "hidden_size": 128, "head_dim": 2}
    config = {"model_type": family, **{k: v for k, v in SIZES.items() if k != "num_key_value_heads"}, **heads}
    theirs = transformers.AutoConfig.for_model(**config)
    assert architecture_from(config, "config.json").num_kv_heads == theirs.num_key_value_heads


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_config_is_read_by_both(family):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = architecture_from({"model_type": family, **SIZES}, "config.json")
    config = config_for(ModelSpecification(architecture=architecture), None, "float32", {})
    assert config["architectures"] == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]]
    assert architecture_from(config, "config.json") == architecture
    theirs = transformers.AutoConfig.for_model(**config).to_dict()
    assert architecture_from(theirs, "config.json") == architecture


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen2", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is not supported"),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1}, "a sliding window to some of 3 layers"),
        ("mistral", {"sliding_window": 0}, "sliding_window=0; allowed: null or a positive integer"),
        ("mistral", {"sliding_window": True}, "sliding_window=True; allowed: null or a positive integer"),
        (
            "qwen2",
            {"use_sliding_window": True, "max_window_layers": 2},
            r"max_window_layers=2 gives a sliding window to some of 3 layers.*; allowed: 0 \(all\) or 3 \(none\)",
        ),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1; allowed: an integer"),
        ("qwen2", {"use_sliding_window": True, "layer_types": [FULL, FULL, SLIDING]}, "one type for all 3 layers"),
        ("qwen2", {"layer_types": [FULL]}, "supported: one type for all 3 layers"),
        ("qwen2", {"layer_types": [SLIDING] * 3}, "'sliding_attention' with sliding_window=None are not supported"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer_types of 'linear_attention'"),
    ],
)
def test_unsupported_configs_are_refused(family, changes, message):
    with pytest.raises(InputError, match=message):
        architecture_from({"model_type": family, **SIZES, **changes}, "config.json")


@pytest.mark.parametrize(
    ("family", "changes", "window"),
    [
        ("llama", {"sliding_window": 5}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 5}, 5),
        ("mistral", {"sliding_window": None}, None),
        ("qwen2", {"sliding_window": 5}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5}, None),  # only from layer 28 on
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 3}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": [SLIDING] * 3}, 5),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "layer_types": [FULL] * 3}, None),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, 5),
    ],
)
def test_windows_are_read_and_written(family, changes, window):
    import transformers

    found = architecture_from({"model_type": family, **SIZES, **changes}, "config.json")
    assert found.sliding_window == window
    config = config_for(ModelSpecification(architecture=found), None, "float32", {})
    assert architecture_from(config, "config.json") == found
    if family.startswith("qwen"):
        theirs = transformers.AutoConfig.for_model(**config)
        assert theirs.layer_types == [FULL if window is None else SLIDING] * 3
        assert theirs.sliding_window == window


def test_parts_that_a_family_does_not_have_are_not_written(architectures):
    changed = architectures["qwen2"].model_copy(update={"family": "llama"})
    with pytest.raises(InputError, match="a Llama checkpoint cannot hold a model with biases="):
        config_for(ModelSpecification(architecture=changed), None, "float32", {})
    changed = architectures["mistral"].model_copy(update={"family": "llama"})
    with pytest.raises(InputError, match="a Llama checkpoint cannot hold a model with sliding_window=7; allowed: None"):
        config_for(ModelSpecification(architecture=changed), None, "float32", {})
    changed = architectures["qwen2"].model_copy(update={"biases": ()})
    with pytest.raises(InputError, match="a Qwen2 checkpoint cannot hold a model with biases="):
        config_for(ModelSpecification(architecture=changed), None, "float32", {})


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_past_and_fewer_layers(architectures, filled, raw, golden, tmp_path, name):
    spec = ModelSpecification(architecture=architectures[name].model_copy(update={"num_layers": 1}))
    original = {"huggingface": {"config": json.loads((golden / name / "config.json").read_text())}}
    for label, provenance in (("new", {}), ("dropped", original)):
        artifact.save_model(tmp_path / label, spec, filled(spec), provenance=provenance)
        to_huggingface(tmp_path / label, tmp_path / f"{label}-hf")
        assert read_huggingface(tmp_path / f"{label}-hf").spec == spec
    assert raw(tmp_path / "new-hf") == raw(tmp_path / "dropped-hf")
    config = json.loads((tmp_path / "dropped-hf" / "config.json").read_text())
    assert len(config.get("layer_types", [0])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ("qwen2", "qwen3"))
@pytest.mark.parametrize("quantized", [None, "awq"])
def test_quantized_models_keep_what_their_family_adds(architectures, filled, raw, tmp_path, name, quantized):
    architecture = architectures[name]
    form = TensorFormat(bits=4, group_size=16)
    formats = {f"{layer}/{linear}": form for layer in range(architecture.num_layers) for linear in LINEARS}
    quantization = QuantizationSpecification(method="awq", formats=formats)
    spec = ModelSpecification(architecture=architecture, quantization=quantization)
    params = filled(spec)
    artifact.save_model(tmp_path / "model", spec, params)
    to_huggingface(tmp_path / "model", tmp_path / "hf", quantized=quantized)
    added = {"qwen2": "k_proj.bias", "qwen3": "k_norm.weight"}[name]
    stored = raw(tmp_path / "hf")[f"model.layers.1.self_attn.{added}"]
    assert stored[:2] == ("F16" if quantized else "F32", (16,))
    again = read_huggingface(tmp_path / "hf")
    assert (again.spec.quantization is None) == (quantized is None)
    read = nest({path: jnp.asarray(leaf.read()) for path, leaf in flatten(again.params).items()})
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 64, (2, 20)), jnp.int32)
    before, after = run(spec, params, tokens).logits, run(again.spec, read, tokens).logits
    scale = float(jnp.abs(before).max())
    np.testing.assert_allclose(after, before, atol=(1e-4 if quantized is None else 2e-2) * scale)


def test_a_missing_bias_is_named(golden, tmp_path):
    checkpoint = shutil.copytree(golden / "qwen2", tmp_path / "checkpoint")
    tensors = dict(safetensors.numpy.load_file(checkpoint / "model.safetensors"))
    tensors.pop("model.layers.0.self_attn.q_proj.bias")
    safetensors.numpy.save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match=r"q_proj.bias is missing \(1 in all\), expected shape \(32,\)"):
        from_huggingface(checkpoint, tmp_path / "model")
