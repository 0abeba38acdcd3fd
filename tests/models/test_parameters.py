"""What parameters exist: counts of published models, initial values, layouts, adapters."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.errors import InputError
from qtale_jax.models.adapt import adapt
from qtale_jax.models.decoder import abstract_parameters, initialize, logical_axes
from qtale_jax.models.lora import merge_lora
from qtale_jax.models.policy import Dense, Thresholded, probability
from qtale_jax.models.specification import (
    Architecture,
    LoraSpecification,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)
from qtale_jax.models.stacking import is_stacked, stack_layers, stacks, unstack_layers

LLAMA_2_7B = Architecture(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    max_length=4096,
)
LLAMA_3_1_8B = Architecture(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_length=131072,
)
LLAMA_3_2_3B = Architecture(
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    max_length=131072,
    tied_head=True,
)


def count(tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("architecture", "parameters"),
    [(LLAMA_2_7B, 6_738_415_616), (LLAMA_3_1_8B, 8_030_261_248), (LLAMA_3_2_3B, 3_212_749_824)],
    ids=["llama2-7b", "llama3.1-8b", "llama3.2-3b"],
)
def test_published_parameter_counts(architecture, parameters):
    assert count(abstract_parameters(ModelSpecification(architecture=architecture))) == parameters


def test_router_size_at_7b():
    """2.10 M per layer, 63 M in all, 0.93 % of the model (method.md, after D-LLM)."""
    small = LLAMA_2_7B.model_copy(update={"num_layers": 3})
    spec = ModelSpecification(architecture=small, routing=RoutingSpecification(method="dllm"))
    layers = abstract_parameters(spec)["layers"]
    assert "router" not in layers[0] and "router" not in layers[1]
    size = count(layers[2]["router"])
    assert size == 4096 * 512 + 512 + 512 + 512 * 2 + 2
    assert round(size / 1e6, 2) == 2.10
    assert round(30 * size / 6_738_415_616, 4) == 0.0093


def test_routers_start_open(make_spec):
    spec = make_spec(routing={"always_on_layers": 1})
    router = initialize(spec, jax.random.key(0))["layers"][2]["router"]
    np.testing.assert_array_equal(router["output"]["bias"], np.array([0.1, 2.0], np.float32))
    assert float(probability(router["output"]["bias"])) == pytest.approx(0.87, abs=0.005)


def test_initialisation_is_a_function_of_the_key(make_spec):
    spec = make_spec(routing={}, lora={})
    first, again, other = (initialize(spec, jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["embedding"]["table"], other["embedding"]["table"])
    kernels = [np.asarray(first["layers"][i]["mlp"]["up"]["kernel"]) for i in range(2)]
    assert not np.array_equal(kernels[0], kernels[1])


def test_adapters_start_without_effect(make_spec):
    lora = initialize(make_spec(lora={"rank": 4}, hidden_size=64), jax.random.key(0))["layers"][0]["attention"][
        "query"
    ]["lora"]
    assert not lora["up"].any()
    assert float(lora["down"].std()) == pytest.approx(1 / 4, rel=0.2)


def test_quantized_models_are_not_drawn(make_spec):
    formats = {"0/query": TensorFormat(bits=4)}
    spec = make_spec().model_copy(update={"quantization": QuantizationSpecification(method="rtn", formats=formats)})
    with pytest.raises(ValueError, match="quantized"):
        initialize(spec, jax.random.key(0))


def test_axes_name_every_dimension(make_spec):
    spec = make_spec(routing={"always_on_layers": 1}, lora={})
    axes, abstract = logical_axes(spec), abstract_parameters(spec)
    shapes = jax.tree.map(
        lambda names, leaf: len(names) == len(leaf.shape), axes, abstract, is_leaf=lambda x: isinstance(x, tuple)
    )
    assert all(jax.tree.leaves(shapes))
    assert axes["layers"][2]["attention"]["query"]["kernel"] == ("embed", "heads")
    stacked = stack_layers(spec, axes)["layers"]["routed"]
    assert stacked["attention"]["query"]["lora"]["up"] == ("layers", None, "heads")


@pytest.mark.parametrize("always_on", [0, 1, None])
def test_stacking_and_unstacking_are_inverse(make_spec, always_on):
    spec = make_spec(routing=None if always_on is None else {"always_on_layers": always_on})
    params = initialize(spec, jax.random.key(0))
    stacked = stack_layers(spec, params)
    assert is_stacked(stacked) and not is_stacked(params)
    assert sum(len(layers) for layers in stacks(spec).values()) == 3
    back = unstack_layers(spec, stacked)
    assert list(back["layers"]) == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_layers_of_different_formats_do_not_stack(make_spec):
    formats = {"0/query": TensorFormat(bits=4), "1/query": TensorFormat(bits=8)}
    spec = make_spec(num_layers=2)
    spec = spec.model_copy(update={"quantization": QuantizationSpecification(method="rtn", formats=formats)})
    with pytest.raises(ValueError, match="storage formats"):
        stack_layers(spec, abstract_parameters(spec))


@pytest.mark.slow
def test_merged_adapters_equal_adapters_beside(make_spec, make_params, run, tokens):
    spec = make_spec(routing={"always_on_layers": 1}, lora={"targets": ("query", "value", "down"), "dropout": 0.1})
    params = make_params(spec)
    merged_spec, merged = merge_lora(spec, params)
    assert merged_spec.lora is None and "lora" not in merged["layers"][0]["mlp"]["down"]
    half = Thresholded(jnp.full((2,), 0.5, jnp.float32))
    for policy in (Dense(), half):
        beside, folded = run(spec, params, tokens, policy=policy), run(merged_spec, merged, tokens, policy=policy)
        np.testing.assert_allclose(folded.logits, beside.logits, atol=1e-5)
        without = run(spec, {**params, "layers": initialize(spec, jax.random.key(0))["layers"]}, tokens, policy=policy)
        assert np.abs(without.logits - beside.logits).max() > 1e-3
    stacked_spec, stacked = merge_lora(spec, stack_layers(spec, params))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked_spec, stacked), merged)


def test_merging_without_adapters_returns_the_same_model(make_spec):
    spec = make_spec()
    params = initialize(spec, jax.random.key(0))
    assert merge_lora(spec, params) == (spec, params)


ROUTING = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8)


def test_adapting_keeps_weights_and_only_adds(make_spec):
    spec = make_spec()
    params = initialize(spec, jax.random.key(0))
    new, adapted = adapt(spec, params, ROUTING, LoraSpecification(rank=2), jax.random.key(1))
    jax.tree.map(
        lambda leaf, like: None if leaf.shape == like.shape else pytest.fail(), adapted, abstract_parameters(new)
    )
    flat = dict(jax.tree_util.tree_leaves_with_path(adapted))
    before = dict(jax.tree_util.tree_leaves_with_path(params))
    for path, leaf in before.items():
        assert flat[path] is leaf
    added = {jax.tree_util.keystr(path) for path in flat.keys() - before.keys()}
    assert added and all("router" in name or "lora" in name for name in added)
    routers = [np.asarray(adapted["layers"][i]["router"]["hidden"]["kernel"]) for i in (1, 2)]
    assert not np.array_equal(routers[0], routers[1])


def test_adapting_again_continues_the_routers(make_spec):
    spec = make_spec(routing={"always_on_layers": 1})
    params = initialize(spec, jax.random.key(0))
    new, adapted = adapt(spec, params, ROUTING.model_copy(update={"target": 0.3}), None, jax.random.key(1))
    assert new.routing is not None and new.routing.target == 0.3
    jax.tree.map(np.testing.assert_array_equal, adapted, params)
    kept, _ = adapt(spec, params, None, None, jax.random.key(1))
    assert kept.routing == spec.routing


@pytest.mark.parametrize(
    ("update", "message"), [({"always_on_layers": 2}, "always_on_layers=2"), ({"router_hidden": 4}, "=4")]
)
def test_routers_of_another_shape_are_refused(make_spec, update, message):
    spec = make_spec(routing={"always_on_layers": 1})
    params = initialize(spec, jax.random.key(0))
    with pytest.raises(InputError, match=message):
        adapt(spec, params, ROUTING.model_copy(update=update), None, jax.random.key(1))


def test_routing_that_leaves_no_layer_is_refused(make_spec):
    spec = make_spec(num_layers=2)
    routing = ROUTING.model_copy(update={"always_on_layers": 2})
    with pytest.raises(InputError, match="leaves no routed layer of 2; allowed: 0 to 1"):
        adapt(spec, initialize(spec, jax.random.key(0)), routing, None, jax.random.key(1))


def test_quantized_model_takes_no_adapters(make_spec):
    formats = {"0/query": TensorFormat(bits=4)}
    spec = make_spec().model_copy(update={"quantization": QuantizationSpecification(method="rtn", formats=formats)})
    with pytest.raises(InputError, match="quantized"):
        adapt(spec, {}, ROUTING, LoraSpecification(rank=2), jax.random.key(1))
