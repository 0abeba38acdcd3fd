"""Quantized models on their way to Hugging Face: in AutoAWQ's layout, and restored."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from qtale_jax import artifact, convert
from qtale_jax.artifact.arrays import flatten, nest
from qtale_jax.artifact.document import ModelDocument
from qtale_jax.errors import InputError
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, read_huggingface, to_huggingface
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import (
    LINEARS,
    LoraSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(1).integers(0, 64, (2, 20)).astype(np.int32)

ROUTING = RoutingSpecification(
    method="qtale",
    always_on_layers=1,
    router_hidden=8,
    thresholds={"16": (0.4,), "4": (0.6,)},
    calibration={"4": {"rows": 12}},
)

run = jax.jit(forward, static_argnames=("spec",))


def quantization(others=None, **settings):
    """All linears in one format (default: 4 bits in groups of 16), and formats that differ."""
    form = TensorFormat(**{"bits": 4, "group_size": 16} | settings)
    formats = {f"{layer}/{name}": form for layer in range(2) for name in LINEARS}
    return QuantizationSpecification(method="rtn", formats=formats | (others or {}))


def float16_held(params):
    """The parameters, those in floating point rounded to values of float16; routers as they are."""

    def held(name, leaf):
        plain = leaf.dtype == jnp.float32 and "/router/" not in name
        return leaf.astype(jnp.float16).astype(jnp.float32) if plain else leaf

    return nest({name: held(name, leaf) for name, leaf in flatten(params).items()})


def undecided(params):
    """The parameters, with routers whose two logits are about equal on average."""

    def stir(name, leaf):
        if name.endswith("router/output/kernel"):
            return 4 * (leaf - jnp.mean(leaf))
        return jnp.zeros_like(leaf) if name.endswith("router/output/bias") else leaf

    return nest({name: stir(name, leaf) for name, leaf in flatten(params).items()})


def decisions_and_logits(model):
    policy = Thresholded(jnp.asarray(model.spec.thresholds, jnp.float32)) if model.spec.routing else None
    found = run(model.spec, model.params, jnp.asarray(TOKENS), **({"policy": policy} if policy else {}))
    return None if policy is None else np.asarray(found.routing.execute), np.asarray(found.logits)


def there_and_back(spec, params, folder, **settings):
    """Saves a model, exports it, converts it again; returns it before and after, and what was written."""
    artifact.save_model(folder / "model", spec, params)
    written = to_huggingface(folder / "model", folder / "hf", **settings)
    from_huggingface(folder / "hf", folder / "again")
    return artifact.load_model(folder / "model"), artifact.load_model(folder / "again"), written


@pytest.mark.parametrize(
    "settings",
    [{"group_size": 32, "kv_heads": 2}, {"group_size": -1, "tied": True, "symmetric": True}],
    ids=["groups", "one group, tied, symmetric"],
)
def test_awq_checkpoints_come_back_bit_equal(make_packed, raw, tmp_path, settings):
    made = make_packed("awq", **settings)
    from_huggingface(made.directory, tmp_path / "model")
    written = to_huggingface(tmp_path / "model", tmp_path / "back", quantized="awq")
    assert raw(tmp_path / "back") == raw(made.directory)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((made.directory / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": settings["group_size"],
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    scales = sum(array.size for array in made.scales.values())
    others = sum(np.prod(shape) for name, (code, shape, _) in raw(made.directory).items() if name.endswith(".weight"))
    assert written.changed == {"scales": (0, scales), "others": (0, others)}


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_routed_models_come_back_quantized(base_spec, filled, tmp_path, symmetric):
    spec = base_spec(routing=ROUTING, quantization=quantization(symmetric=symmetric, scale_dtype="float16"))
    before, after, written = there_and_back(spec, float16_held(undecided(filled(spec))), tmp_path, quantized="awq")
    assert {count for count, _ in written.changed.values()} == {0}
    assert after.spec.quantization == spec.quantization.model_copy(update={"method": "awq"})
    assert after.spec.routing == spec.routing and after.spec.thresholds == (0.6,)
    assert after.provenance["packed_from"] == spec.quantization.model_dump(mode="json")
    for name, leaf in flatten(before.params).items():
        assert np.asarray(flatten(after.params)[name]).tobytes() == np.asarray(leaf).tobytes(), name
    for found, expected in zip(decisions_and_logits(after), decisions_and_logits(before), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert 0.1 < decisions_and_logits(before)[0][:, 2:, 1].mean() < 0.9


def test_what_float16_changes_is_counted(base_spec, filled, tmp_path):
    spec = base_spec(quantization=quantization(symmetric=True, group_size=-1))
    before, after, written = there_and_back(spec, filled(spec), tmp_path, quantized="awq")
    counts = {"scales": [0, 0], "others": [0, 0]}
    for name, leaf in flatten(before.params).items():
        if leaf.dtype == jnp.float32:
            kept = np.asarray(leaf).astype(np.float16)
            kind = counts["scales" if name.endswith("scales") else "others"]
            kind[0] += int((kept != np.asarray(leaf)).sum())
            kind[1] += leaf.size
            np.testing.assert_array_equal(np.asarray(flatten(after.params)[name]).astype(np.float16), kept)
        else:
            np.testing.assert_array_equal(flatten(after.params)[name], leaf)
    assert written.changed == {kind: tuple(pair) for kind, pair in counts.items()}
    assert written.changed["scales"][0] > 0
    assert {format.scale_dtype for format in after.spec.quantization.formats.values()} == {"float16"}


EIGHT = TensorFormat(bits=8, symmetric=True)


@pytest.mark.slow
@pytest.mark.parametrize("packed", [True, False])
def test_eight_bit_embedding_head_and_router_are_restored(base_spec, filled, tmp_path, packed):
    others = {"embedding": EIGHT, "head": EIGHT, "1/router": EIGHT}
    spec = base_spec(routing=ROUTING, quantization=quantization(others, scale_dtype="float16"))
    params = float16_held(undecided(filled(spec)))
    before, after, _ = there_and_back(spec, params, tmp_path, quantized="awq" if packed else None)
    kernel = safetensors.numpy.load_file(tmp_path / "hf" / "routers.safetensors")["layers.1.router.hidden.kernel"]
    node = params["layers"][1]["router"]["hidden"]["quantized"]
    np.testing.assert_array_equal(kernel, np.asarray(node["values"]).astype(np.float32) * np.asarray(node["scales"]))
    for part, name in (("embedding", "table"), ("head", "kernel")):
        node = params[part]["quantized"]
        expected = np.asarray(node["values"]).astype(np.float32) * np.asarray(node["scales"])
        found = np.asarray(after.params[part][name])
        expected = expected.astype(np.float16).astype(np.float32) if packed else expected
        np.testing.assert_array_equal(found.T if part == "embedding" else found, expected)
    assert after.spec.bits == (4 if packed else 16)
    assert after.spec.thresholds == (0.6,)
    if packed:
        for name, leaf in flatten(before.params).items():
            if name.startswith("layers") and "/router/" not in name:
                np.testing.assert_array_equal(flatten(after.params)[name], leaf)
    else:
        found, expected = decisions_and_logits(after), decisions_and_logits(before)
        np.testing.assert_array_equal(found[0], expected[0])
        scale = np.abs(expected[1]).max()
        np.testing.assert_allclose(found[1] / scale, expected[1] / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_scattered_groups_are_restored_in_their_own_order(make_packed, tmp_path, layout):
    made = make_packed(layout, 16, shuffled=True)
    from_huggingface(made.directory, tmp_path / "model")
    to_huggingface(tmp_path / "model", tmp_path / "back")
    found = safetensors.numpy.load_file(tmp_path / "back" / "model.safetensors")
    expected = safetensors.numpy.load_file(made.dense / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    assert read_huggingface(tmp_path / "back").spec.quantization is None


def printed_rows(text):
    """Cells of a printed table by its first column, without thousands separators."""
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    return {first: [cell.replace(",", "") for cell in others] for first, *others in lines}


def test_the_tables_count_parameters_and_changes(base_spec, filled, tmp_path, capsys):
    spec = base_spec(quantization=quantization(scale_dtype="float16"))
    artifact.save_model(tmp_path / "model", spec, filled(spec))
    linears = 2 * sum(int(np.prod(spec.architecture.linear_shape(name))) for name in LINEARS)
    floats, scales = 2 * 64 * 32 + 5 * 32, linears // 16
    convert.main(["--to-hf", "--quantized", "awq", str(tmp_path / "model"), str(tmp_path / "hf")])
    arrays, changes = map(printed_rows, capsys.readouterr().out.split("rounded to float16"))
    assert arrays["model"] == [str(linears + floats), str(linears // 2 + 2 * floats), "float16 int32"]
    assert arrays["scales"] == ["", str(2 * scales + scales // 2), "float16 int32"]
    assert changes["scales"] == [str(scales), "0"]
    assert changes["others"][0] == str(floats) and int(changes["others"][1]) > 0
    convert.main([str(tmp_path / "hf"), str(tmp_path / "again")])
    arrays = printed_rows(capsys.readouterr().out)
    assert arrays["model"] == [str(linears + floats), str(linears // 2 + 4 * floats), "float32 int4"]
    assert arrays["scales"] == ["", str(2 * scales + scales // 2), "float16 int4"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "the model is not quantized; AWQ's layout is for 4-bit linears"),
        ({"quantization": quantization(bits=3)}, "linear '0/query' is stored in 3 bits; AWQ's layout allows: 4 bits"),
        ({"quantization": quantization(bits=8)}, "linear '0/query' is stored in 8 bits; AWQ's layout allows: 4 bits"),
        (
            {"quantization": quantization({"1/up": TensorFormat(bits=2, group_size=16)})},
            "linear '1/up' is stored in 2 bits; AWQ's layout allows: 4 bits for all linears",
        ),
        (
            {"quantization": QuantizationSpecification(method="awq", formats={"0/query": TensorFormat(bits=4)})},
            "linear '0/key' is in floating point; AWQ's layout allows: 4 bits for all linears",
        ),
        (
            {"quantization": quantization({"1/up": TensorFormat(bits=4, group_size=8)})},
            "group sizes [8, 16]; AWQ's layout allows: one for all linears",
        ),
        (
            {"quantization": quantization({"1/up": TensorFormat(bits=4, group_size=16, permuted=True)})},
            "the inputs of linear '1/up' are permuted; AWQ's layout allows: their own order",
        ),
        ({"quantization": quantization(activation_bits=8)}, "linear '0/query' rounds activations to 8 bits"),
        (
            {"quantization": quantization(), "lora": LoraSpecification(rank=2)},
            "its adapters cannot be merged into integers",
        ),
    ],
)
def test_what_does_not_fit_awq_is_refused(base_spec, refused, tmp_path, fields, message):
    (tmp_path / "model").mkdir()
    ModelDocument(base_spec(**fields), {}).write(tmp_path / "model")
    assert message in refused("--to-hf", "--quantized", "awq", tmp_path / "model", tmp_path / "out")


def test_outputs_that_do_not_fill_words_are_refused(base_spec, refused, tmp_path):
    (tmp_path / "model").mkdir()
    spec = base_spec(quantization=quantization(group_size=-1))
    odd = spec.architecture.model_copy(update={"intermediate_size": 44})
    ModelDocument(spec.model_copy(update={"architecture": odd}), {}).write(tmp_path / "model")
    message = refused("--to-hf", "--quantized", "awq", tmp_path / "model", tmp_path / "out")
    assert "linear '0/gate' has 44 outputs; AWQ's layout allows: multiples of 8" in message


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("layers/1/mlp/up/quantized/scales", "a scale of linear '1/up' is 100000; float16"),
        ("final_norm/scale", "a value of model.norm.weight is 100000; float16"),
    ],
)
def test_values_too_large_for_float16_are_refused(base_spec, filled, refused, tmp_path, path, message):
    spec = base_spec(quantization=quantization())
    flat = flatten(filled(spec))
    flat[path] = jnp.full_like(flat[path], 1e5)
    artifact.save_model(tmp_path / "model", spec, nest(flat))
    assert message in refused("--to-hf", "--quantized", "awq", tmp_path / "model", tmp_path / "out")


def test_a_type_does_not_go_with_a_layout(converted, tmp_path):
    with pytest.raises(InputError, match="dtype='bfloat16' does not go with quantized='awq'"):
        to_huggingface(converted / "llama2", tmp_path / "out", dtype="bfloat16", quantized="awq")
    assert not list(tmp_path.iterdir())
