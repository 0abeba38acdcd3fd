"""Files of a checkpoint: damaged ones, missing and wrong tensors; what is written is read by others."""

import json
import shutil
import struct
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from qtale_jax import artifact
from qtale_jax.errors import InputError
from qtale_jax.models.huggingface import files, read_huggingface, to_huggingface
from qtale_jax.models.specification import RoutingSpecification


def rewrite(directory, change):
    """Changes the tensors of a single-file checkpoint."""
    tensors = dict(safetensors.numpy.load_file(directory / "model.safetensors"))
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def test_missing_and_damaged_files_are_named(checkpoint, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such directory"):
        read_huggingface(tmp_path / "nowhere")
    (checkpoint / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is damaged or truncated"):
        read_huggingface(checkpoint)
    (checkpoint / "config.json").write_text("[]")
    with pytest.raises(InputError, match="config.json: expected a JSON object, found list"):
        read_huggingface(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(InputError, match="config.json is missing"):
        read_huggingface(checkpoint)


def test_checkpoints_without_safetensors_are_refused(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(InputError, match="neither model.safetensors nor model.safetensors.index.json is there$"):
        read_huggingface(checkpoint)
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pytorch_model.bin is a pickle"):
        read_huggingface(checkpoint)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:4], "is truncated or not a safetensors file"),
        (lambda content: content[:100], "is truncated or not a safetensors file"),
        (lambda content: content[:-4], "is truncated: .* ends at byte"),
        (lambda content: content[:8] + b"x" + content[9:], "its header cannot be read"),
        (lambda content: content.replace(b'"F32"', b'"F64"', 1), "has type F64; allowed: F32, F16, BF16"),
        (lambda content: content.replace(b'"F32"', b'"F16"', 1), "is damaged: .* takes .* bytes"),
    ],
)
def test_damaged_safetensors_are_named(checkpoint, change, message):
    file = checkpoint / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        read_huggingface(checkpoint)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"tensor model.layers.1.mlp.up_proj.weight is missing \(1 in all\), expected shape \(48, 32\)$",
        ),
        (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing .*tie_word_embeddings=true"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["lm_head.weight"]}),
            r"unexpected tensor model.layers.2.mlp.up_proj.weight of shape \(64, 32\) .* a Llama of 2 layers",
        ),
        (
            lambda t: t.update({"model.norm.weight": np.ones((31,), np.float32)}),
            r"tensor model.norm.weight has shape \(31,\), expected \(32,\)",
        ),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, message):
    rewrite(checkpoint, change)
    with pytest.raises(InputError, match=message):
        read_huggingface(checkpoint)


def test_rotary_buffers_of_old_checkpoints_are_ignored(checkpoint, golden):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.ones((4,), np.float32)}))
    assert read_huggingface(checkpoint).spec == read_huggingface(golden / "llama2").spec


def test_a_stored_tied_head_must_be_the_embedding(checkpoint, edit_config):
    edit_config(checkpoint, tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight differs from model.embed_tokens.weight"):
        read_huggingface(checkpoint)
    rewrite(checkpoint, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    assert "head" not in read_huggingface(checkpoint).params


def test_sharded_checkpoints_are_checked(golden, tmp_path):
    directory = Path(shutil.copytree(golden / "tied", tmp_path / "tied"))
    index = json.loads((directory / files.INDEX).read_text())
    shard = index["weight_map"]["model.norm.weight"]
    for content, message in (
        ({"weight_map": index["weight_map"] | {"model.extra": shard}}, f"{shard}: tensor model.extra is missing"),
        ({"weight_map": index["weight_map"] | {"model.extra": "../x"}}, "'../x' is not a file name"),
        ({"metadata": {}}, "weight_map, from tensor names to files, is missing"),
    ):
        (directory / files.INDEX).write_text(json.dumps(content))
        with pytest.raises(InputError, match=message):
            read_huggingface(directory)
    (directory / files.INDEX).write_text(json.dumps(index))
    (directory / shard).unlink()
    with pytest.raises(InputError, match=f"{shard} is missing"):
        read_huggingface(directory)


def test_broken_routing_is_refused(base_spec, filled, tmp_path):
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8)
    spec = base_spec(routing=routing)
    artifact.save_model(tmp_path / "model", spec, filled(spec))
    to_huggingface(tmp_path / "model", tmp_path / "hf")
    file = tmp_path / "hf" / "qtale.json"
    document = json.loads(file.read_text())
    for change, message in (
        ({"routing": ...}, "key 'routing' is missing"),
        ({"thresholds": {"16": [0.1, 0.2]}}, "has 2 values, expected one for each of 1 routed layers"),
        ({"always_on_layers": 2}, "leaves no routed layer"),
        ({"methud": "x"}, "routing.methud"),
        ({"router_hidden": 9}, r"has shape \(.*8.*\), expected \(.*9.*\)"),
    ):
        broken = {} if "routing" in change else document | {"routing": document["routing"] | change}
        file.write_text(json.dumps(broken))
        with pytest.raises(InputError, match=message):
            read_huggingface(tmp_path / "hf")
    file.write_text(json.dumps(document))
    (tmp_path / "hf" / "routers.safetensors").unlink()
    with pytest.raises(InputError, match="routers.safetensors is missing"):
        read_huggingface(tmp_path / "hf")


def test_written_files_are_read_by_the_safetensors_library(raw, tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5, dtype=np.float16),
        "c": np.arange(4, dtype=ml_dtypes.bfloat16).reshape(4, 1),
    }
    new = [files.NewTensor(name, a.dtype, a.shape, partial(np.asarray, a)) for name, a in arrays.items()]
    assert files.write_checkpoint(tmp_path, new) == ["model.safetensors"]
    assert struct.unpack("<Q", (tmp_path / "model.safetensors").read_bytes()[:8])[0] % 8 == 0
    for name, (_, shape, data) in raw(tmp_path).items():
        assert (shape, data) == (arrays[name].shape, arrays[name].tobytes())
    for name, stored in files.read_checkpoint(tmp_path).items():
        assert stored.map().dtype == arrays[name].dtype
        np.testing.assert_array_equal(stored.map(), arrays[name])


def test_shards_follow_the_limit(tmp_path):
    def tensor(size):
        return files.NewTensor(f"t{size}", np.dtype(np.float32), (size,), lambda: np.full((size,), size, np.float32))

    new = [tensor(size) for size in (5, 1, 2, 9)]
    names = files.write_checkpoint(tmp_path, new, shard_bytes=24)
    assert names == [*(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)), files.INDEX]
    index = json.loads((tmp_path / files.INDEX).read_text())
    assert index["metadata"] == {"total_size": 68}
    assert [index["weight_map"][f"t{i}"][10] for i in (5, 1, 2, 9)] == ["1", "1", "2", "3"]
    found = {name: stored.map().tolist() for name, stored in files.read_checkpoint(tmp_path).items()}
    assert found == {f"t{i}": [float(i)] * i for i in (5, 1, 2, 9)}
