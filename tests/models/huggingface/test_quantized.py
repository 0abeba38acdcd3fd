"""Checkpoints that AutoAWQ and GPTQ packed, written here by an independent packer: read, computed with, refused."""

import json
import shutil
from pathlib import Path

import hypothesis.extra.numpy as hypothesis_numpy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax import artifact
from qtale_jax.artifact.arrays import flatten, nest
from qtale_jax.models.forward import forward
from qtale_jax.models.huggingface import from_huggingface, packing, read_huggingface
from qtale_jax.models.specification import LINEARS, TensorFormat
from qtale_jax.quantization.storage import recover

pytestmark = pytest.mark.slow

TOKENS = np.random.default_rng(1).integers(0, 40, (2, 12)).astype(np.int32)

MODULES = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}

run = jax.jit(forward, static_argnames=("spec",))


def logits(spec, params):
    return np.asarray(run(spec, params, jnp.asarray(TOKENS)).logits)


def read_in_memory(directory):
    """A checkpoint without a model directory in between."""
    found = read_huggingface(directory)
    return found.spec, nest({name: jnp.asarray(leaf.read()) for name, leaf in flatten(found.params).items()})


def linear_of(params, layer, name):
    return params["layers"][layer]["attention" if "self_attn" in MODULES[name] else "mlp"][name]


CASES = {
    "awq": {"layout": "awq", "group_size": 32},
    "awq, one group, tied": {"layout": "awq", "group_size": -1, "tied": True},
    "awq, grouped queries, symmetric": {"layout": "awq", "group_size": 16, "kv_heads": 1, "symmetric": True},
    "awq, mixed": {"layout": "awq", "group_size": 32, "kept": ("0.self_attn.q_proj", "1.mlp")},
    "gptq": {"layout": "gptq", "group_size": 32, "kv_heads": 2},
    "gptq, shuffled": {"layout": "gptq", "group_size": 16, "shuffled": True, "kv_heads": 2},
    "gptq v2, shuffled, tied": {"layout": "gptq_v2", "group_size": 32, "shuffled": True, "tied": True},
    "gptq v2, one group, mixed": {"layout": "gptq_v2", "group_size": -1, "kept": ("down_proj",)},
    "gptq, shuffled, symmetric": {
        "layout": "gptq",
        "group_size": 32,
        "shuffled": True,
        "symmetric": True,
        "biases": True,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_packed_checkpoints_compute_what_their_restored_weights_do(make_packed, case, tmp_path):
    settings = CASES[case]
    made = make_packed(**settings)
    from_huggingface(made.directory, tmp_path / "model")
    model = artifact.load_model(tmp_path / "model")
    dense = read_in_memory(made.dense)
    assert dense[0].quantization is None
    found, expected = logits(model.spec, model.params), logits(*dense)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

    assert model.spec.quantization.method == settings["layout"].split("_")[0]
    assert model.spec.dtype == "float32"
    format = TensorFormat(
        bits=4,
        group_size=settings["group_size"],
        symmetric=settings.get("symmetric", False),
        scale_dtype="float16",
        permuted=settings.get("shuffled", False),
    )
    for layer in range(2):
        for name in LINEARS:
            module = f"model.layers.{layer}.{MODULES[name]}"
            if module not in made.integers:
                assert model.spec.quantization.format(layer, name) is None
                assert set(linear_of(model.params, layer, name)) == {"kernel"}
                continue
            assert model.spec.quantization.format(layer, name) == format
            q, z, g_idx = made.integers[module]
            node = linear_of(model.params, layer, name)["quantized"]
            rounded = recover(node, q.shape, format)
            order = np.asarray(node["order"]) if format.permuted else np.arange(len(q))
            np.testing.assert_array_equal(rounded.values, q[order] - 8)
            np.testing.assert_array_equal(rounded.scales, made.scales[module])
            if format.symmetric:
                assert "zero_points" not in node
            else:
                np.testing.assert_array_equal(rounded.zero_points, z - 8)
            np.testing.assert_array_equal(g_idx[order], np.arange(len(q)) // (len(q) // len(z)))


@pytest.mark.slow
def test_through_the_entry_point(make_packed, run_module, tmp_path):
    made = make_packed("gptq", 32, shuffled=True)
    done = run_module("qtale_jax.convert", made.directory, "model")
    assert (done.returncode, done.stderr) == (0, "")
    assert "int4" in done.stdout and "float16" in done.stdout
    model = artifact.load_model(tmp_path / "model")
    np.testing.assert_allclose(logits(model.spec, model.params), logits(*read_in_memory(made.dense)), rtol=0, atol=1e-5)


def test_reading_is_put_off(make_packed):
    """Only zero points and groups are read before a matrix's turn comes."""
    made = make_packed("awq", 32)
    checkpoint = read_huggingface(made.directory)
    leaf = flatten(checkpoint.params)["layers/1/mlp/down/quantized/values"]
    tensors = dict(safetensors.numpy.load_file(made.directory / "model.safetensors"))
    tensors["model.layers.1.mlp.down_proj.qweight"][:] = 0
    safetensors.numpy.save_file(tensors, made.directory / "model.safetensors")
    np.testing.assert_array_equal(leaf.read().astype(np.int8), np.full((96, 64), -8))


INTEGERS = hypothesis_numpy.arrays(
    np.int8,
    st.tuples(st.integers(1, 5), st.integers(1, 4).map(lambda words: 8 * words)),
    elements=st.integers(-8, 7),
)


@given(INTEGERS)
def test_every_integer_survives_packing(pack_rows, integers):
    words = packing.pack_awq(integers)
    assert words.dtype == np.int32 and words.shape == (integers.shape[0], integers.shape[1] // 8)
    np.testing.assert_array_equal(packing.unpack_awq(words), integers)
    independent = pack_rows((integers + 8).tolist(), awq=True)
    np.testing.assert_array_equal(words, independent)


@given(INTEGERS, st.sampled_from([0, 1]))
def test_gptq_words_are_unpacked(pack_rows, integers, added):
    words = pack_rows((integers + 8).tolist())
    np.testing.assert_array_equal(packing.unpack_gptq_weights(words.T), integers.T)
    stored = pack_rows(((integers + 8 - added) % 16).tolist())
    np.testing.assert_array_equal(packing.unpack_gptq_zeros(stored, added), integers)


@given(st.permutations([i // 4 for i in range(20)]))
def test_inputs_are_sorted_by_group_and_stay_in_order_within_one(groups):
    order = packing.group_order(np.array(groups, np.int32), 5)
    expected = sorted(range(20), key=lambda i: (groups[i], i))
    assert (list(range(20)) if order is None else order.tolist()) == expected


def test_nothing_is_permuted_without_need():
    assert packing.group_order(np.repeat(np.arange(3, dtype=np.int32), 4), 3) is None


LAYER = "model.layers.1.mlp.up_proj"


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("layout", "settings", "message"),
    [
        ("awq", {"quant_method": "awk"}, "quant_method='awk' is not supported; supported: 'awq', 'gptq' (did you mean"),
        ("awq", {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes' is not supported"),
        ("awq", {"bits": 3}, "quantization_config: bits=3 is not supported; supported: 4"),
        ("awq", {"bits": None}, "quantization_config: bits=None is not supported; supported: 4"),
        ("awq", {"version": "gemv"}, "version='gemv' is not supported; supported: 'gemm'"),
        ("awq", {"version": "exllama"}, "version='exllama' is not supported; supported: 'gemm'"),
        ("awq", {"version": None, "format": "marlin"}, "format='marlin' is not supported; supported: 'gemm'"),
        ("awq", {"zero_point": False}, "zero_point=False is not supported; supported: true"),
        ("awq", {"backend": "llm-awq"}, "backend='llm-awq' packs differently"),
        ("awq", {"group_size": 0}, "group_size=0; allowed: -1 (one group) or a positive integer"),
        ("awq", {"group_size": 40}, "group_size=40 does not divide the 64 inputs of model.layers.0.self_attn.q_proj"),
        ("gptq", {"bits": 8}, "quantization_config: bits=8 is not supported; supported: 4"),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "checkpoint_format='marlin' is not supported; supported: 'gptq', 'gp",
        ),
        ("gptq", {"format": "gptq_v2"}, "the layouts contradict each other"),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format=True is not supported; supported: false"),
        ("gptq", {"pack_dtype": "int16"}, "pack_dtype='int16' is not supported; supported: \"int32\""),
        ("gptq", {"group_size": 16}, r"qzeros has shape (2, 8), expected (4, 8)"),
    ],
)
def test_unsupported_packings_are_refused(packed_copies, edit_config, refused, tmp_path, layout, settings, message):
    directory = packed_copies(layout, tmp_path / "checkpoint")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config=config | settings)
    assert message in refused(directory, tmp_path / "out")


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("awq", put(f"{LAYER}.bias", np.full(96, 0.5, np.float16)), f"{LAYER}.bias is not zero"),
        ("awq", put(f"{LAYER}.qweight", np.zeros((64, 12), np.float16)), "has type F16; allowed: I32"),
        ("awq", put(f"{LAYER}.scales", np.ones((2, 96), np.int32)), "has type I32; allowed: F32, F16, BF16"),
        ("awq", put("model.norm.weight", np.ones(64, np.int32)), "has type I32; allowed: F32, F16, BF16"),
        ("awq", put(f"{LAYER}.weight", np.ones((96, 64), np.float16)), f"unexpected tensor {LAYER}."),
        ("awq", put(f"{LAYER}.g_idx", np.zeros(64, np.int32)), f"unexpected tensor {LAYER}.g_idx"),
        (
            "awq",
            put("lm_head.qweight", np.zeros((64, 5), np.int32)),
            "lm_head.qweight is not supported; supported: the",
        ),
        ("awq", lambda tensors: tensors.pop(f"{LAYER}.qweight"), f"tensor {LAYER}.qweight is missing (1 in all)"),
        ("awq", lambda tensors: tensors.pop(f"{LAYER}.qzeros"), f"tensor {LAYER}.qzeros is missing (1 in all)"),
        ("gptq", lambda tensors: tensors.pop(f"{LAYER}.g_idx"), f"tensor {LAYER}.g_idx is missing (1 in all)"),
        (
            "gptq",
            put(f"{LAYER}.g_idx", np.arange(64, dtype=np.int32) // 33),
            "makes groups of 31 to 33 inputs; allowed",
        ),
        ("gptq", put(f"{LAYER}.g_idx", np.full(64, 2, np.int32)), "holds groups from 2 to 2, expected 0 to 1"),
        ("gptq", put(f"{LAYER}.g_idx", np.full(64, -1, np.int32)), "holds groups from -1 to -1, expected 0 to 1"),
        ("gptq", put(f"{LAYER}.qweight", np.zeros((64, 12), np.int32)), "has shape (64, 12), expected (8, 96)"),
    ],
)
def test_wrong_tensors_are_refused(packed_copies, refused, tmp_path, layout, change, message):
    directory = packed_copies(layout, tmp_path / "checkpoint")
    tensors = dict(safetensors.numpy.load_file(directory / "model.safetensors"))
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    assert message in refused(directory, tmp_path / "out")


def test_sizes_that_do_not_fill_words_are_refused(packed_copies, edit_config, refused, tmp_path):
    directory = packed_copies("awq", tmp_path / "awq")
    edit_config(directory, num_key_value_heads=2, head_dim=2)
    assert "model.layers.0.self_attn.k_proj has 4 outputs; packed in 4 bits, it needs" in refused(
        directory, tmp_path / "o"
    )
    directory = packed_copies("gptq", tmp_path / "gptq")
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, hidden_size=60, quantization_config=config | {"group_size": -1})
    assert "model.layers.0.self_attn.q_proj has 60 inputs; packed in 4 bits, it needs" in refused(
        directory, tmp_path / "o"
    )


def test_configs_and_tensors_must_agree_about_being_packed(packed_copies, make_packed, edit_config, refused, tmp_path):
    directory = packed_copies("gptq", tmp_path / "checkpoint")
    settings = json.loads((directory / "config.json").read_text())["quantization_config"]
    edit_config(directory, quantization_config=...)
    assert "quantization_config is missing, but model.layers." in refused(directory, tmp_path / "out")
    edit_config(directory, quantization_config=[4])
    assert "quantization_config=[4] is not an object" in refused(directory, tmp_path / "out")
    dense = Path(shutil.copytree(make_packed("gptq", 32).dense, tmp_path / "dense"))
    edit_config(dense, quantization_config=settings)
    assert "quantization_config says 'gptq', but no linear is quantized" in refused(dense, tmp_path / "out")
