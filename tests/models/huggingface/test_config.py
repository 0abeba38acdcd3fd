"""config.json: what is read, what is refused, what is written."""

import copy
import json

import pytest
import transformers

from qtale_jax.errors import InputError
from qtale_jax.models.huggingface import read_huggingface
from qtale_jax.models.huggingface.config import architecture_from, config_for
from qtale_jax.models.huggingface.families import FAMILIES, FULL, SLIDING
from qtale_jax.models.specification import LinearScaling, ModelSpecification, RopeScaling

SIZES = {
    "vocab_size": 8,
    "hidden_size": 12,
    "intermediate_size": 4,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("theta_inside", [True, False])
def test_both_spellings_of_rope(golden, spelling, theta_inside):
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = json.loads((golden / "llama2" / "config.json").read_text())
    config.pop("rope_parameters")
    config |= {spelling: scaling | {"rope_theta": 5e5}} if theta_inside else {spelling: scaling, "rope_theta": 5e5}
    found = architecture_from(config, "config.json")
    assert found.rope_theta == 5e5
    assert found.rope_scaling == RopeScaling(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_linear_scaling_is_read_and_written(family, key):
    config = {"model_type": family, **SIZES, "rope_scaling": {key: "linear", "factor": 4}, "rope_theta": 5e5}
    found = architecture_from(config, "config.json")
    assert (found.rope_theta, found.rope_scaling) == (5e5, LinearScaling(factor=4.0))
    written = config_for(ModelSpecification(architecture=found), None, "float32", {})
    assert written["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert architecture_from(written, "config.json") == found
    theirs = transformers.AutoConfig.for_model(**written)
    rope = theirs.rope_parameters
    if family == "gemma3_text":
        assert rope[SLIDING] == {"rope_type": "default", "rope_theta": 1e4}
        rope = rope[FULL]
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4, 5e5)
    assert architecture_from(theirs.to_dict(), "config.json") == found  # as transformers 5 writes it


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0}, SLIDING: {"rope_type": "default"}}},
        {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}, "rope_scaling": None},
        {
            "rope_parameters": {SLIDING: {"rope_theta": 70.0}, FULL: {"rope_theta": 9.0}},
            "rope_scaling": {"type": "linear", "factor": 8.0},
        },
    ],
    ids=["old", "new", "without the local one", "both"],
)
def test_gemma_3_scales_its_global_layers_alone(rope):
    config = {"model_type": "gemma3_text", **SIZES, **rope}
    found = architecture_from(config, "config.json")
    theirs = transformers.AutoConfig.for_model(**copy.deepcopy(config)).rope_parameters
    assert found.rope_scaling == LinearScaling(factor=theirs[FULL]["factor"])
    assert (found.rope_theta, found.local_rope_theta) == tuple(theirs[kind]["rope_theta"] for kind in (FULL, SLIDING))
    assert theirs[SLIDING]["rope_type"] == "default"


def test_scaled_local_layers_are_not_written():
    config = {"model_type": "gemma3_text", **SIZES, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    found = architecture_from(config, "config.json").model_copy(update={"local_rope_theta": None})
    with pytest.raises(InputError, match="a Gemma 3 checkpoint cannot hold a model with rope_scaling in its local"):
        config_for(ModelSpecification(architecture=found), None, "float32", {})
    unscaled = found.model_copy(update={"rope_scaling": None})
    assert config_for(ModelSpecification(architecture=unscaled), None, "float32", {})["rope_local_base_freq"] == 1e6


def test_absent_keys_have_the_defaults_of_llama():
    sizes = {"vocab_size": 8, "hidden_size": 12, "intermediate_size": 4}
    depth = {"num_hidden_layers": 1, "num_attention_heads": 2}
    found = architecture_from({"model_type": "llama", **sizes, **depth}, "config.json")
    assert (found.num_kv_heads, found.head_dim, found.max_length) == (2, 6, 2048)
    assert (found.norm_eps, found.rope_theta, found.rope_scaling, found.tied_head) == (1e-6, 1e4, None, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "lama"},
            r"model_type='lama' is not supported; .* \(did you mean 'llama'\?\)",
        ),
        (
            {"model_type": "gemma3n"},
            r"supported: .*'gemma2', 'gemma3_text', 'gemma3' \(did you mean 'gemma3'\?\)",
        ),
        ({"model_type": ...}, "model_type=None is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; supported: 'silu'"),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quant_method='hqq' is not supported; supported: 'awq', 'gptq'",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_scaling: rope_type='yarn' is not supported; supported: 'default', 'linear', 'llama3'$",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: rope_type='dynamic' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters: rope_type='longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling: factor=0; allowed: a positive number"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope_parameters: low_freq_factor is missing"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_parameters: rope_theta='x'; allowed: a positive number"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported"),
        ({"rope_scaling": [1]}, r"rope_scaling=\[1\] is not an object"),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 1.0,
                    "original_max_position_embeddings": 8,
                }
            },
            "high_freq_factor must be greater than low_freq_factor",
        ),
        ({"hidden_size": ...}, "hidden_size is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0; allowed: a positive integer"),
        ({"vocab_size": True}, "vocab_size=True; allowed: a positive integer"),
        ({"num_attention_heads": 5, "head_dim": ...}, "num_attention_heads=5 does not divide hidden_size=32"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7 is odd"),
    ],
)
def test_unsupported_configs_are_refused(checkpoint, edit_config, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(InputError, match=message) as caught:
        read_huggingface(checkpoint)
    assert str(checkpoint / "config.json") in str(caught.value)


def test_a_changed_architecture_replaces_what_the_original_config_said(base_spec, golden):
    original = json.loads((golden / "llama3_1" / "config.json").read_text()) | {"vendor": 1}
    changed = base_spec().architecture.model_copy(update={"max_length": 99, "rope_theta": 7.0})
    config = config_for(ModelSpecification(architecture=changed), original, "float32", {"bos_token_id": 5})
    assert architecture_from(config, "config.json") == changed
    assert (config["vendor"], config["bos_token_id"]) == (1, 1)


def test_what_a_config_says_about_quantization_is_replaced(base_spec):
    original = {**config_for(base_spec(), None, "float16", {}), "quantization_config": {"quant_method": "gptq"}}
    assert "quantization_config" not in config_for(base_spec(), original, "float16", {})
    config = config_for(base_spec(), original, "float16", {}, {"quant_method": "awq"})
    assert config["quantization_config"] == {"quant_method": "awq"}
