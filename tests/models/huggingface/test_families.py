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

NAMES = ("qwen2", "mistral", "qwen3", "gemma2", "gemma3")

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
    for name in ("gemma2", "gemma3"):
        found = architectures[name]
        assert (found.norm_offset, found.post_norms, found.scaled_embedding) == (1.0, True, True)
        assert (found.activation, found.tied_head) == ("gelu_tanh", True)
    assert [architectures["gemma2"].window(layer) for layer in range(3)] == [7, None, 7]
    assert [architectures["gemma3"].window(layer) for layer in range(4)] == [5, 5, None, 5]
    assert (architectures["gemma2"].attention_softcap, architectures["gemma2"].logit_softcap) == (2.0, 5.0)
    assert (architectures["gemma3"].attention_softcap, architectures["gemma3"].logit_softcap) == (None, None)
    assert (architectures["gemma3"].rope_theta, architectures["gemma3"].local_rope_theta) == (1000.0, 50.0)
    scalars = {name: found.query_pre_attn_scalar for name, found in architectures.items()}
    assert scalars == {"qwen2": None, "mistral": None, "qwen3": None, "gemma2": 18, "gemma3": 10}
    families = {name: found.family for name, found in architectures.items()}
    assert families == {name: name for name in NAMES} | {"gemma3": "gemma3_text"}


@pytest.mark.slow
@pytest.mark.parametrize("name", (*NAMES, "gemma3_images"))
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
    rope = theirs.rope_parameters
    assert found.rope_theta == rope.get(FULL, rope)["rope_theta"]
    assert found.local_rope_theta == rope.get(SLIDING, {}).get("rope_theta")
    assert found.tied_head == theirs.tie_word_embeddings
    for theirs_name, ours in FAMILIES[family].numbers.items():
        if theirs_name != "rope_local_base_freq":
            assert getattr(found, ours) == getattr(theirs, theirs_name)
    if FAMILIES[family].window == "pattern":
        assert [SLIDING if found.is_local(layer) else FULL for layer in range(3)] == theirs.layer_types
        assert found.sliding_window == theirs.sliding_window
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
        ("mistral", {"sliding_window": 0}, "sliding_window=0; allowed: null or a positive integer"),
        ("mistral", {"sliding_window": True}, "sliding_window=True; allowed: null or a positive integer"),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers=-1; allowed: an integer"),
        ("qwen2", {"layer_types": [FULL]}, "for each of 3 layers"),
        ("qwen2", {"layer_types": [SLIDING] * 3}, "'sliding_attention' with sliding_window=None are not supported"),
        ("qwen2", {"layer_types": ["linear_attention"] * 3}, "layer_types=.*linear_attention.* is not supported"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True is not supported; allowed: false"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ("gemma2", {"hidden_activation": "silu"}, "supported: .gelu_pytorch_tanh."),
        ("gemma2", {"final_logit_softcapping": -1}, "final_logit_softcapping=-1; allowed: a positive number"),
        ("gemma2", {"sliding_window_pattern": 0}, "sliding_window_pattern=0; allowed: an integer from 1 on"),
        (
            "gemma3_text",
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=50.0 is not supported; allowed: null",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {SLIDING: {"rope_type": "linear", "factor": 8.0}}},
            "rope_parameters.sliding_attention: rope_type=.linear. is not supported",
        ),
        ("gemma3_text", {"rope_parameters": {FULL: [1]}}, r"rope_parameters: full_attention=\[1\] is not an object"),
    ],
)
def test_unsupported_configs_are_refused(family, changes, message):
    with pytest.raises(InputError, match=message):
        architecture_from({"model_type": family, **SIZES, **changes}, "config.json")


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 5}


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("llama", {"sliding_window": 5}, [None, None, None]),
        ("mistral", {}, [4096, 4096, 4096]),
        ("mistral", {"sliding_window": 5}, [5, 5, 5]),
        ("mistral", {"sliding_window": None}, [None, None, None]),
        ("qwen2", {"sliding_window": 5}, [None, None, None]),
        ("qwen2", QWEN_WINDOW, [None, None, None]),  # only from layer 28 on
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 3}, [None, None, None]),
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 2}, [None, None, 5]),
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 0}, [5, 5, 5]),
        ("qwen2", {**QWEN_WINDOW, "layer_types": [SLIDING] * 3}, [5, 5, 5]),
        ("qwen2", {**QWEN_WINDOW, "layer_types": [FULL] * 3}, [None, None, None]),
        ("qwen3", {**QWEN_WINDOW, "layer_types": [SLIDING, FULL, SLIDING]}, [5, None, 5]),
        ("qwen2", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, [None, None, None]),
        ("qwen3", {**QWEN_WINDOW, "max_window_layers": 0}, [5, 5, 5]),
        ("gemma2", {"sliding_window": 5}, [5, None, 5]),
        ("gemma2", {"layer_types": [FULL, SLIDING, FULL]}, [None, 4096, None]),
        ("gemma2", {"layer_types": [FULL] * 3}, [None, None, None]),
        ("gemma3_text", {"sliding_window": 5}, [5, 5, 5]),
        ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}, [5, None, 5]),
        ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 1}, [None, None, None]),
    ],
)
def test_windows_are_read_and_written(family, changes, windows):
    import transformers

    found = architecture_from({"model_type": family, **SIZES, **changes}, "config.json")
    assert [found.window(layer) for layer in range(3)] == windows
    config = config_for(ModelSpecification(architecture=found), None, "float32", {})
    assert architecture_from(config, "config.json") == found
    if family not in ("llama", "mistral"):
        theirs = transformers.AutoConfig.for_model(**config)
        assert theirs.layer_types == [FULL if window is None else SLIDING for window in windows]
        assert theirs.sliding_window == found.sliding_window


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
    for name, changes, message in (
        ("gemma2", {"family": "gemma3_text"}, "a Gemma 3 checkpoint cannot hold a model with query_key_norm=False"),
        ("gemma2", {"local_rope_theta": 9.0}, "a Gemma 2 checkpoint cannot hold a model with local_rope_theta=9.0"),
        ("gemma2", {"norm_offset": 0.0}, "with norm_offset=0.0; allowed: 1.0"),
        ("mistral", {"global_layers": (1,)}, "with global_layers=\\(1,\\); allowed: \\(\\)"),
        (
            "qwen3",
            {"logit_softcap": 30.0},
            "a Qwen3 checkpoint cannot hold a model with logit_softcap=30.0; allowed: None",
        ),
    ):
        changed = architectures[name].model_copy(update=changes)
        with pytest.raises(InputError, match=message):
            config_for(ModelSpecification(architecture=changed), None, "float32", {})


@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_a_past_and_fewer_layers(architectures, filled, raw, golden, tmp_path, name):
    spec = ModelSpecification(architecture=architectures[name].with_layers((0,)))
    original = {"huggingface": {"config": json.loads((golden / name / "config.json").read_text())}}
    for label, provenance in (("new", {}), ("dropped", original)):
        artifact.save_model(tmp_path / label, spec, filled(spec), provenance=provenance)
        to_huggingface(tmp_path / label, tmp_path / f"{label}-hf")
        assert read_huggingface(tmp_path / f"{label}-hf").spec == spec
    assert raw(tmp_path / "new-hf") == raw(tmp_path / "dropped-hf")
    config = json.loads((tmp_path / "dropped-hf" / "config.json").read_text())
    assert len(config.get("layer_types", [0])) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ("qwen2", "qwen3", "gemma2"))
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
    added, size = {
        "qwen2": ("self_attn.k_proj.bias", 16),
        "qwen3": ("self_attn.k_norm.weight", 16),
        "gemma2": ("post_feedforward_layernorm.weight", 32),
    }[name]
    stored = raw(tmp_path / "hf")[f"model.layers.1.{added}"]
    assert stored[:2] == ("F16" if quantized else "F32", (size,))
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
