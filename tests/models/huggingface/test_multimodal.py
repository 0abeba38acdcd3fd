"""Gemma 3 from 4B on: the text model in a checkpoint that takes images too."""

import json
import logging
import shutil

import numpy as np
import pytest
import safetensors.numpy
import transformers

import qtale_jax
from qtale_jax import artifact, convert
from qtale_jax.artifact.arrays import flatten
from qtale_jax.config import Config, with_overrides
from qtale_jax.errors import InputError
from qtale_jax.models.huggingface import read_huggingface, to_huggingface
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.huggingface.families import FULL, SLIDING
from qtale_jax.models.specification import LinearScaling
from qtale_jax.planning.subject import planned_model

NAME = "gemma3_images"
RELEASED = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
RELEASED |= {"model_type": "gemma3_text", "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
"""All that the text_config of gemma-3-4b says."""


@pytest.fixture
def checkpoint(golden, tmp_path):
    """A copy of the golden checkpoint, to be changed."""
    return shutil.copytree(golden / NAME, tmp_path / "checkpoint")


@pytest.fixture
def rename(checkpoint):
    """Renames the tensors of the copy, or removes those without a name."""

    def apply(change):
        tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
        renamed = {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}
        safetensors.numpy.save_file(renamed, checkpoint / "model.safetensors")

    return apply


def newer(name: str) -> str:
    """The other layout in which Gemma 3 is stored."""
    inner = name.removeprefix("language_model.model.")
    return f"model.{name}" if inner == name else f"model.language_model.{inner}"


def same(one, other) -> None:
    """Two checkpoints hold the same model."""
    assert one.spec == other.spec
    first, second = flatten(one.params), flatten(other.params)
    assert first.keys() == second.keys()
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf.read(), second[path].read())


def test_the_golden_model_is_scaled_where_it_is_global(golden):
    found = read_huggingface(golden / NAME).spec.architecture
    assert (found.family, found.rope_scaling) == ("gemma3_text", LinearScaling(factor=4.0))
    assert (found.rope_theta, found.local_rope_theta) == (100.0, 50.0)
    assert [found.window(layer) for layer in range(3)] == [5, None, 5]


def test_both_layouts_are_the_same_model(golden, checkpoint, rename):
    rename(newer)
    assert "model.language_model.norm.weight" in safetensors.numpy.load_file(checkpoint / "model.safetensors")
    same(read_huggingface(checkpoint), read_huggingface(golden / NAME))


def test_the_config_of_released_checkpoints_is_the_same_model(golden, checkpoint, edit_config):
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    text |= {"rope_scaling": {"factor": 4.0, "rope_type": "linear"}, "rope_theta": 100.0, "rope_local_base_freq": 50.0}
    for key in ("rope_parameters", "layer_types", "tie_word_embeddings"):
        text.pop(key)
    edit_config(checkpoint, text_config=text, tie_word_embeddings=..., dtype=..., torch_dtype="bfloat16")
    same(read_huggingface(checkpoint), read_huggingface(golden / NAME))


def test_what_is_left_out_is_said(golden, raw, tmp_path, caplog, capsys):
    images = [entry for name, entry in raw(golden / NAME).items() if not name.startswith("language_model.")]
    size = sum(len(data) for _, _, data in images)
    line = (
        f"{golden / NAME}: {len(images)} tensors for images ({size:,} bytes) are left out; the model takes text alone"
    )
    with caplog.at_level(logging.WARNING, "qtale_jax"):
        convert.main([str(golden / NAME), str(tmp_path / "model"), "--dry-run"])
        convert.main([str(golden / NAME), str(tmp_path / "model")])
    assert caplog.messages == [line, line]
    provenance = artifact.read_model_json(tmp_path / "model").provenance
    assert provenance["huggingface"]["left_out"] == {"tensors": len(images), "bytes": size}
    to_huggingface(tmp_path / "model", tmp_path / "back")
    card = (tmp_path / "back" / "README.md").read_text()
    assert f"- left out of that: {len(images)} tensors for images ({size:,} bytes)\n" in card


def test_without_images_nothing_is_left_out(golden, checkpoint, rename, caplog):
    rename(lambda name: name if name.startswith("language_model.") else None)
    found = read_huggingface(checkpoint)
    assert caplog.messages == [] and "left_out" not in found.provenance["huggingface"]
    same(found, read_huggingface(golden / NAME))


def test_the_export_is_a_checkpoint_of_text_alone(converted, golden, raw, tmp_path):
    to_huggingface(converted / NAME, tmp_path / "back")
    before, after = raw(golden / NAME), raw(tmp_path / "back")
    text = {name: entry for name, entry in before.items() if name.startswith("language_model.")}
    assert after == {name.removeprefix("language_model."): entry for name, entry in text.items()}
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForCausalLM"] and config["model_type"] == "gemma3_text"
    assert not {"text_config", "vision_config", "image_token_index"} & config.keys()
    assert config["dtype"] == "bfloat16"
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "back")
    assert isinstance(theirs, transformers.Gemma3TextConfig)
    assert theirs.rope_parameters[FULL] == {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}
    assert theirs.rope_parameters[SLIDING] == {"rope_type": "default", "rope_theta": 50.0}
    same(read_huggingface(tmp_path / "back"), read_huggingface(golden / NAME))


def test_keys_of_the_whole_that_concern_text_are_kept(checkpoint, edit_config):
    edit_config(checkpoint, eos_token_id=[1, 106], boi_token_index=3)
    config = read_huggingface(checkpoint).provenance["huggingface"]["config"]
    assert (config["eos_token_id"], config["bos_token_id"]) == ([1, 106], 2)
    assert "boi_token_index" not in config


def test_a_head_of_its_own(checkpoint, edit_config, rename, tmp_path):
    edit_config(checkpoint, tie_word_embeddings=False)
    with pytest.raises(InputError, match="tensor lm_head.weight is missing"):
        read_huggingface(checkpoint)
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    tensors["language_model.lm_head.weight"] = 2 * tensors["language_model.model.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, checkpoint / "model.safetensors")
    found = read_huggingface(shutil.copytree(checkpoint, tmp_path / "released"))
    kernel = flatten(found.params)["head/kernel"].read()
    assert not found.spec.architecture.tied_head
    np.testing.assert_array_equal(kernel.T, tensors["language_model.lm_head.weight"])
    rename(lambda name: name.removeprefix("language_model.") if "lm_head" in name else newer(name))
    same(read_huggingface(checkpoint), found)


def test_published_configs_leave_the_rest_to_transformers(tmp_path):
    config = {"model_type": "gemma3", "text_config": RELEASED, "vision_config": {"model_type": "siglip_vision_model"}}
    found = architecture_from(config, "config.json")
    theirs = transformers.AutoConfig.for_model(**RELEASED)
    assert found == architecture_from(theirs.to_dict(), "config.json")
    assert found.vocab_size == theirs.vocab_size == 262208
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (8, 4, 256)
    assert (found.num_heads, found.num_kv_heads, found.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert found.query_pre_attn_scalar == theirs.query_pre_attn_scalar
    assert (found.rope_scaling, found.tied_head, found.max_length) == (LinearScaling(factor=8.0), True, 131072)
    (tmp_path / "config.json").write_text(json.dumps(config))
    _, planned = planned_model(with_overrides(Config(), [f"plan.model={tmp_path}"]))
    assert planned.architecture == found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": ...}, "config.json: text_config=None is not an object; a 'gemma3' has one"),
        ({"text_config": [1]}, r"config.json: text_config=\[1\] is not an object"),
        (
            {"text_config": RELEASED | {"model_type": "llama"}},
            "text_config.model_type='llama' is not supported; supported: 'gemma3_text'",
        ),
        ({"text_config": {"model_type": "gemma3_text"}}, "config.json: text_config: hidden_size is missing"),
        (
            {"text_config": RELEASED | {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}}},
            "config.json: text_config: rope_scaling: rope_type='yarn' is not supported; supported: ",
        ),
        ({"quantization_config": {"quant_method": "hqq"}}, "config.json: quantization_config: quant_method='hqq'"),
    ],
)
def test_unsupported_configs_are_refused(checkpoint, edit_config, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(InputError, match=message):
        read_huggingface(checkpoint)


def test_tensors_of_both_layouts_are_refused(checkpoint, rename):
    tensors = safetensors.numpy.load_file(checkpoint / "model.safetensors")
    both = tensors | {"model.language_model.norm.weight": tensors["language_model.model.norm.weight"]}
    safetensors.numpy.save_file(both, checkpoint / "model.safetensors")
    with pytest.raises(InputError, match="model.language_model.norm.weight is there twice, under two prefixes"):
        read_huggingface(checkpoint)


def test_a_tensor_that_belongs_to_neither_is_refused(checkpoint, rename):
    rename(lambda name: name.replace("multi_modal_projector", "audio_projector"))
    with pytest.raises(InputError, match=r"unexpected tensor audio_projector\.mm_.* \(2 in all\); a Gemma 3 of 3"):
        read_huggingface(checkpoint)


def test_the_folder_opens_as_a_model(golden):
    assert qtale_jax.load(golden / NAME).spec == read_huggingface(golden / NAME).spec
