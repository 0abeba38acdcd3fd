"""Models whose linears, embedding, head and routers are stored as integers: what they compute, hold and weigh."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.artifact import weight_bytes
from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.models.decoder import abstract_parameters, logical_axes
from qtale_jax.models.forward import embed, forward
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import (
    LINEARS,
    Architecture,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)
from qtale_jax.models.stacking import stack_layers
from qtale_jax.parallel.axes import partition_spec
from qtale_jax.quantization.layer import restore_layer
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.storage import array_bytes, unstore

pytestmark = pytest.mark.slow

ENDS: dict[str, Any] = {"embedding_bits": 8, "head_bits": 8, "router_bits": 8}
HALF = Thresholded(jnp.full((1,), 0.5, jnp.float32))


@pytest.fixture(scope="module")
def build(make_spec, make_params):
    """Builds (specification, parameters) before and after quantization of two layers, the second routed."""
    kept = {}

    def make(tied: bool = False, **quantize) -> tuple[ModelSpecification, dict, ModelSpecification, dict]:
        key = (tied, *sorted(quantize.items()))
        if key not in kept:
            spec = make_spec(
                hidden_size=32,
                intermediate_size=64,
                head_dim=8,
                num_layers=2,
                tied_head=tied,
                routing={"always_on_layers": 1, "always_on_tokens": 1},
            )
            params = make_params(spec)
            quantized_spec, quantized, _ = quantize_parameters(spec, params, QuantizeConfig(method="rtn", **quantize))
            kept[key] = spec, params, quantized_spec, quantized
        return kept[key]

    return make


def restored(spec: ModelSpecification, params: dict) -> dict:
    """The floating-point parameters that stored ones stand for."""
    assert spec.quantization is not None
    formats, out = spec.quantization.formats, dict(params)
    vocab, size = spec.architecture.vocab_size, spec.architecture.hidden_size
    out["layers"] = {index: restore_layer(spec, index, layer, formats) for index, layer in params["layers"].items()}
    for name, leaf in (("embedding", "table"), ("head", "kernel")):
        if name in formats:
            matrix = unstore(params[name]["quantized"], (size, vocab), formats[name])
            out[name] = {leaf: matrix.T if name == "embedding" else matrix}
    return out


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["free", "tied"])
@pytest.mark.parametrize("scale", ["float32", "bfloat16"])
def test_embedding_head_and_router_compute_with_their_restored_matrices(build, run, tokens, tied, scale):
    settings = ENDS | {"head_bits": 16} if tied else ENDS
    plain_spec, plain, spec, params = build(tied, bits=4, group_size=16, scale_dtype=scale, **settings)
    for part in ("table", "kernel"):
        assert part not in params["embedding"] and part not in params.get("head", {})
    assert set(params["layers"][1]["router"]["hidden"]) == {"quantized", "bias"}
    out, expected = run(spec, params, tokens, policy=HALF), run(plain_spec, restored(spec, params), tokens, policy=HALF)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)
    np.testing.assert_allclose(out.routing.logits, expected.routing.logits, atol=1e-5)
    np.testing.assert_array_equal(out.routing.execute, expected.routing.execute)
    assert out.logits.dtype == out.routing.logits.dtype == jnp.float32
    executed = np.asarray(out.routing.execute[:, 1:, 1])
    assert executed.any() and not executed.all()
    before = run(plain_spec, plain, tokens, policy=HALF)
    assert np.abs(out.routing.logits - before.routing.logits).max() > 1e-4  # all of it was rounded


@pytest.mark.slow
def test_one_token_computes_as_many_do(build, run, tokens):
    """One token takes the product of few rows, thirty that of many."""
    _, _, spec, params = build(bits=3, group_size=32, **ENDS)
    together = run(spec, params, tokens, policy=HALF)
    for row in range(3):
        alone = run(spec, params, tokens[row : row + 1, :1], policy=HALF)
        np.testing.assert_allclose(alone.logits[0], together.logits[row, :1], atol=1e-5)
        np.testing.assert_array_equal(alone.routing.execute[0], together.routing.execute[row, :1])


def test_rows_of_a_quantized_embedding(build):
    _, _, spec, params = build(bits=8, **ENDS)
    ids = jnp.array([[0, 39, 7], [7, -1, -100]], jnp.int32)
    table = restored(spec, params)["embedding"]["table"]
    found = embed(spec, params, ids, jnp.float32)
    np.testing.assert_array_equal(found, table[jnp.maximum(ids, 0)])
    assert embed(spec, params, ids, jnp.bfloat16).dtype == jnp.bfloat16
    beyond = embed(spec, params, jnp.array([[40]], jnp.int32), jnp.float32)
    assert jnp.isnan(beyond).all()


@pytest.mark.parametrize(
    "quantize",
    [
        {"bits": 4, "group_size": 16, "scale_dtype": "float16", **ENDS},
        {"bits": 3, "symmetric": True, **ENDS},
        {"bits": 8, "activation_bits": 8, "router_bits": 8},
        {"bits": 2, "group_size": 32, "scale_dtype": "bfloat16"},
    ],
    ids=["4bit", "3bit", "w8a8", "2bit"],
)
def test_what_is_stored_is_what_the_skeleton_says_and_every_leaf_has_axes(build, quantize):
    _, _, spec, params = build(**quantize)
    skeleton, axes = abstract_parameters(spec), logical_axes(spec)
    assert jax.tree.structure(params) == jax.tree.structure(skeleton)
    found = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert found == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), skeleton)
    named = jax.tree.map(lambda leaf: tuple(leaf), axes, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def check(leaf, names):
        assert len(names) == leaf.ndim
        partition_spec(names)  # raises for an unknown axis, or one that is there twice

    jax.tree.map(check, params, named, is_leaf=lambda leaf: isinstance(leaf, tuple))
    stored = axes["layers"][0]["mlp"]["down"]["quantized"]
    assert stored["values"] == ("mlp", "embed") and stored["scales"] == (None, "embed")
    if "embedding_bits" in quantize:
        assert axes["embedding"]["quantized"]["values"] == ("embed", "vocab")
    assert "layers" in stack_layers(spec, params)


def test_a_permuted_format_has_an_order_beside_it(make_spec):
    formats = {"0/down": TensorFormat(bits=4, group_size=8, permuted=True)}
    spec = make_spec().model_copy(update={"quantization": QuantizationSpecification(method="gptq", formats=formats)})
    stored = abstract_parameters(spec)["layers"][0]["mlp"]["down"]["quantized"]
    assert stored["order"].shape == (24,) and stored["order"].dtype == jnp.int32
    assert logical_axes(spec)["layers"][0]["mlp"]["down"]["quantized"]["order"] == (None,)
    kernel = 24 * 16
    others = sum(a * b for a, b in map(spec.architecture.linear_shape, LINEARS)) * 3 - kernel
    parts = weight_bytes(abstract_parameters(spec))
    assert parts["linears"] == others * 4 + kernel // 2
    assert parts["scales"] == 3 * 16 * 4 + 3 * 16 // 2 + 24 * 4  # scales, zero points, order


def test_bytes_of_embedding_head_and_routers_are_theirs(build):
    _, _, spec, params = build(bits=4, group_size=16, symmetric=True, scale_dtype="float16", **ENDS)
    kernels = 2 * sum(a * b for a, b in map(spec.architecture.linear_shape, LINEARS))
    router = (32 * 8 + 8 * 2) + 4 * (8 + 8 + 8 * 2 + 2)  # int8 and its scales; bias, norm, second matrix, bias
    parts = weight_bytes(params)
    assert parts == {
        "embedding": 40 * 32 + 40 * 2,
        "head": 40 * 32 + 40 * 2,
        "norms": 5 * 32 * 4,
        "routers": router,
        "adapters": 0,
        "linears": kernels // 2,
        "scales": kernels // 16 * 2,
        "total": parts["embedding"] * 2 + 5 * 32 * 4 + router + kernels // 2 + kernels // 8,
    }
    assert parts["total"] == sum(map(array_bytes, jax.tree.leaves(params)))


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [{"bits": 4, "group_size": 16, **ENDS}, {"bits": 3, "scale_dtype": "bfloat16"}])
def test_a_compiled_program_takes_the_bytes_that_are_counted(build, quantize):
    """Two int4 share a byte on the device too."""
    _, _, spec, params = build(**quantize)
    compiled = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf[:1], params)).lower(params).compile()
    assert compiled.memory_analysis().argument_size_in_bytes == weight_bytes(params)["total"]


def test_bytes_at_7b():
    """4 bits in groups of 128 with 16-bit scales: 6.48e9 weights of linears at 4 + 20 / 128 bits, and 8-bit ends."""
    architecture = Architecture(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_length=4096,
    )
    linear = TensorFormat(bits=4, group_size=128, scale_dtype="float16")
    plain = TensorFormat(bits=8, symmetric=True, scale_dtype="float16")
    formats = {f"{layer}/{name}": linear for layer in range(32) for name in LINEARS}
    formats |= {f"{layer}/router": plain for layer in range(2, 32)} | {"embedding": plain, "head": plain}
    spec = ModelSpecification(
        architecture=architecture,
        routing=RoutingSpecification(method="qtale"),
        quantization=QuantizationSpecification(method="rtn", formats=formats),
    )
    parts = weight_bytes(abstract_parameters(spec))
    weights = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert parts["linears"] == weights // 2
    assert parts["scales"] == weights // 128 * 2 + weights // 128 // 2
    assert parts["embedding"] == parts["head"] == 32000 * 4096 + 32000 * 2
    assert parts["routers"] == 30 * (4096 * 512 + 512 * 2 + 4 * (512 + 512 + 512 * 2 + 2))
    assert round(parts["total"] / 1e9, 2) == 3.69


DOT = re.compile(r"stablehlo\.dot_general.*: \(tensor<[\dx]*xi8>, tensor<[\dx]*xi8>\) -> tensor<[\dx]*xi32>")


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True)])
def test_every_linear_of_a_model_is_an_integer_dot(build, tokens, bits, symmetric):
    _, _, spec, params = build(bits=bits, activation_bits=8, symmetric=symmetric)
    model = jax.jit(forward, static_argnames="spec")
    assert len(DOT.findall(model.lower(spec, params, tokens).as_text())) == 2 * len(LINEARS)
    _, _, spec, params = build(bits=bits, symmetric=symmetric)
    assert not DOT.search(model.lower(spec, params, tokens).as_text())


@pytest.mark.slow
def test_logits_of_integer_dots_are_near_those_of_the_weights(build, run, tokens):
    """Rounded activations move the logits by little, and by nothing that depends on the other rows."""
    _, _, spec, params = build(bits=8, activation_bits=8, symmetric=True)
    out = run(spec, params, tokens)
    wide_spec, _, _, _ = build(bits=8, symmetric=True)
    expected = run(wide_spec, restored(spec, params), tokens)
    error = np.linalg.norm(out.logits - expected.logits) / np.linalg.norm(expected.logits)
    assert 1e-5 < error < 0.02
    alone = run(spec, params, tokens[1:2])
    np.testing.assert_allclose(alone.logits[0], out.logits[1], atol=1e-5)
