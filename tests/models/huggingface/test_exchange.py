"""There and back: bit-equal tensors, and what Hugging Face has no word for."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qtale_jax import artifact
from qtale_jax.artifact.arrays import flatten, nest
from qtale_jax.data.stops import end_ids
from qtale_jax.errors import InputError
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, read_huggingface, to_huggingface
from qtale_jax.models.huggingface.config import architecture_from
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import (
    LINEARS,
    LoraSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)

pytestmark = pytest.mark.slow

NAMES = ("llama2", "llama3_1", "grouped", "tied", "qwen2", "mistral", "qwen3", "gemma2", "gemma3", "linear")
STORED = {"grouped": "float16", "tied": "bfloat16", "gemma3": "bfloat16"}
TIED = ("tied", "qwen2", "gemma2", "gemma3")

run = jax.jit(forward, static_argnames=("spec",))


@pytest.mark.parametrize("name", NAMES)
def test_convert_and_back_is_bit_equal(converted, golden, raw, name, tmp_path):
    to_huggingface(converted / name, tmp_path / "back", shard_bytes=20_000)
    before, after = raw(golden / name), raw(tmp_path / "back")
    assert list(after) != []
    assert after == before
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((golden / name / "config.json").read_text())
    assert config["dtype"] == STORED.get(name, "float32")
    assert ("lm_head.weight" in after) == (name not in TIED)
    generation = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert generation == json.loads((golden / name / "generation_config.json").read_text())


def test_what_ends_a_turn_is_known_after_conversion(checkpoint, tmp_path):
    file = checkpoint / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 9]}))
    from_huggingface(checkpoint, tmp_path / "model")
    to_huggingface(tmp_path / "model", tmp_path / "back")
    for found in (artifact.load_model(tmp_path / "model"), read_huggingface(tmp_path / "back")):
        assert end_ids(SimpleNamespace(eos_token_id=3), found.provenance) == (3, 2, 9)


@pytest.mark.parametrize(("said", "ends"), [([2, 9], (3, 2, 9)), (9, (3, 9)), (None, (3,))])
def test_without_generation_config_config_json_says_what_ends_a_turn(checkpoint, edit_config, tmp_path, said, ends):
    (checkpoint / "generation_config.json").unlink()
    edit_config(checkpoint, eos_token_id=said)
    from_huggingface(checkpoint, tmp_path / "model")
    to_huggingface(tmp_path / "model", tmp_path / "back")
    for found in (artifact.load_model(tmp_path / "model"), read_huggingface(tmp_path / "back")):
        assert end_ids(SimpleNamespace(eos_token_id=3), found.provenance) == ends


def test_a_second_round_is_the_same(converted, tmp_path):
    to_huggingface(converted / "tied", tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "model")
    first, second = artifact.load_model(converted / "tied"), artifact.load_model(tmp_path / "model")
    assert second.spec == first.spec
    for name, leaf in flatten(first.params).items():
        assert np.asarray(flatten(second.params)[name]).tobytes() == np.asarray(leaf).tobytes(), name


def test_unknown_config_keys_survive(checkpoint, edit_config, tmp_path):
    edit_config(checkpoint, vendor={"licence": "x"}, head_dim=..., dtype=..., torch_dtype="float32")
    from_huggingface(checkpoint, tmp_path / "model")
    to_huggingface(tmp_path / "model", tmp_path / "back")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((checkpoint / "config.json").read_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_types_can_be_chosen(converted, golden, raw, tmp_path, dtype):
    imported = read_huggingface(golden / "grouped", dtype=dtype)
    assert imported.spec.dtype == dtype
    kernel = flatten(imported.params)["layers/0/mlp/up/kernel"]
    source = safetensors.numpy.load_file(golden / "grouped" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert kernel.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(kernel.read(), source.T.astype(jnp.dtype(dtype)))
    assert flatten(imported.params)["final_norm/scale"].dtype == np.float32
    to_huggingface(converted / "grouped", tmp_path / "back", dtype=dtype)
    code = {"float32": "F32", "bfloat16": "BF16"}[dtype]
    assert {entry[0] for entry in raw(tmp_path / "back").values()} == {code}
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == dtype


def test_rounded_weights_are_not_written_as_what_they_were(golden, raw, tmp_path):
    """float32 -> bfloat16 loses bits; the way back must not pretend to have them."""
    from_huggingface(golden / "llama2", tmp_path / "model", dtype="bfloat16")
    to_huggingface(tmp_path / "model", tmp_path / "back")
    after = raw(tmp_path / "back")
    assert after["lm_head.weight"][0] == "BF16"
    assert after["model.norm.weight"] == raw(golden / "llama2")["model.norm.weight"]


def test_values_that_do_not_fit_the_original_type_are_not_rounded(converted, raw, tmp_path):
    model = artifact.load_model(converted / "grouped")
    table = model.params["embedding"]["table"].at[0, 0].set(jnp.float32(1e6))
    params = {**model.params, "embedding": {"table": table}}
    artifact.save_model(tmp_path / "model", model.spec, params, provenance=model.provenance)
    to_huggingface(tmp_path / "model", tmp_path / "back")
    after = raw(tmp_path / "back")
    assert after["model.embed_tokens.weight"][0] == "F32"
    assert after["lm_head.weight"][0] == "F16"


ROUTING = RoutingSpecification(
    method="qtale",
    always_on_layers=1,
    router_hidden=8,
    thresholds={"16": (0.4,), "4": (0.3,)},
    calibration={"4": {"rows": 12}},
)


def quantization(bits):
    form = TensorFormat(bits=bits, group_size=16, symmetric=False)
    formats = {f"{layer}/{name}": form for layer in range(2) for name in LINEARS}
    return QuantizationSpecification(method="rtn", formats=formats)


TOKENS = np.random.default_rng(1).integers(0, 64, (2, 20)).astype(np.int32)


def test_routers_come_back(base_spec, filled, raw, tmp_path):
    spec = base_spec(routing=ROUTING)
    params = filled(spec)
    artifact.save_model(tmp_path / "model", spec, params)
    written = to_huggingface(tmp_path / "model", tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "qtale.json",
        "routers.safetensors",
    }
    assert len(written.routers) == 5
    assert not any("router" in name for name in raw(tmp_path / "hf"))
    from_huggingface(tmp_path / "hf", tmp_path / "again")
    again = artifact.load_model(tmp_path / "again")
    assert again.spec == spec
    for name, leaf in flatten(params).items():
        assert np.asarray(flatten(again.params)[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.mark.parametrize("bits", [4, 3])
def test_quantized_models_are_restored(base_spec, filled, tmp_path, bits):
    """The restored model computes what the stored integers do, and decides as they did."""
    spec = base_spec(routing=ROUTING, quantization=quantization(bits))
    params = filled(spec)
    artifact.save_model(tmp_path / "model", spec, params)
    to_huggingface(tmp_path / "model", tmp_path / "hf")
    from_huggingface(tmp_path / "hf", tmp_path / "again")
    again = artifact.load_model(tmp_path / "again")
    assert again.spec.quantization is None
    assert again.spec.thresholds == spec.thresholds == ((0.3,) if bits == 4 else (0.5,))
    assert again.spec.routing.calibration == ({"16": {"rows": 12}} if bits == 4 else {})
    assert again.provenance["dequantized_from"] == spec.quantization.model_dump(mode="json")
    policy = Thresholded(jnp.asarray(spec.thresholds, jnp.float32))
    before = run(spec, params, jnp.asarray(TOKENS), policy=policy)
    after = run(again.spec, again.params, jnp.asarray(TOKENS), policy=policy)
    np.testing.assert_array_equal(np.asarray(before.routing.execute), np.asarray(after.routing.execute))
    np.testing.assert_allclose(np.asarray(before.logits), np.asarray(after.logits), rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", [16, 4])
def test_adapters_are_merged(base_spec, filled, tmp_path, bits):
    lora = LoraSpecification(rank=2, targets=("query", "down"))
    spec = base_spec(lora=lora, quantization=None if bits == 16 else quantization(bits))
    params = filled(spec)
    artifact.save_model(tmp_path / "model", spec, params)
    to_huggingface(tmp_path / "model", tmp_path / "hf")
    merged = read_huggingface(tmp_path / "hf")
    assert merged.spec == base_spec()
    plain = nest({name: jnp.asarray(leaf.read()) for name, leaf in flatten(merged.params).items()})
    before, after = (run(s, p, jnp.asarray(TOKENS)).logits for s, p in ((spec, params), (merged.spec, plain)))
    np.testing.assert_allclose(np.asarray(before), np.asarray(after), rtol=0, atol=1e-4)


def test_a_model_without_a_past_gets_a_config(base_spec, filled, raw, tmp_path):
    spec = base_spec(dtype="bfloat16")
    artifact.save_model(tmp_path / "model", spec, filled(spec))
    to_huggingface(tmp_path / "model", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert architecture_from(config, "config.json") == spec.architecture
    assert raw(tmp_path / "hf")["model.norm.weight"][0] == "F32"
    assert read_huggingface(tmp_path / "hf").spec == spec


def test_exports_leave_existing_directories_alone(converted, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        to_huggingface(converted / "llama2", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    with pytest.raises(InputError, match="no such model directory"):
        to_huggingface(tmp_path / "nowhere", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
