"""What families add to a Llama: parameters, and that everything done to a model leaves what they compute as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.config.schema import MeshConfig
from qtale_jax.models.decoder import abstract_parameters, initialize, logical_axes, skeleton
from qtale_jax.models.forward import merge
from qtale_jax.models.lora import merge_lora
from qtale_jax.models.policy import Dense, Thresholded
from qtale_jax.models.specification import LinearScaling
from qtale_jax.models.stacking import stack_layers, unstack_layers
from qtale_jax.parallel.mesh import build_mesh, shardings

FEATURES = {
    "biases": {"biases": ("query", "key", "value")},
    "window": {"sliding_window": 3},
    "head norms": {"query_key_norm": True},
    "everything": {"biases": ("query", "key", "value"), "sliding_window": 4, "query_key_norm": True},
    "layers of two kinds": {
        "sliding_window": 3,
        "global_layers": (1,),
        "local_rope_theta": 100.0,
        "rope_scaling": LinearScaling(factor=4.0),
        "query_key_norm": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "scaled_embedding": True,
        "activation": "gelu_tanh",
        "query_pre_attn_scalar": 3.0,
        "attention_softcap": 1.5,
        "logit_softcap": 2.0,
    },
}


# Those that "everything" has together, too.
ALONE = ("biases", "window", "head norms")


@pytest.fixture(
    params=[pytest.param(name, marks=pytest.mark.exhaustive if name in ALONE else ()) for name in FEATURES], ids=str
)
def model(request, make_spec, make_params):
    """A routed model with adapters and one of the features."""
    spec = make_spec(routing={"always_on_layers": 1}, lora={"targets": ("query", "value")}, **FEATURES[request.param])
    return spec, make_params(spec)


def test_a_feature_matters(model, run, tokens):
    spec, params = model
    defaults = type(spec.architecture).model_fields
    plain = {name: defaults[name].default for feature in FEATURES.values() for name in feature}
    llama = spec.model_copy(update={"architecture": spec.architecture.model_copy(update=plain)})
    kept = {path for path, _ in jax.tree_util.tree_leaves_with_path(abstract_parameters(llama))}
    left = unflattened(leaf for leaf in jax.tree_util.tree_leaves_with_path(params) if leaf[0] in kept)
    assert np.abs(run(spec, params, tokens).logits - run(llama, left, tokens).logits).max() > 0.1


def unflattened(leaves) -> dict:
    found: dict = {}
    for path, leaf in leaves:
        node = found
        for key in path[:-1]:
            node = node.setdefault(key.key, {})
        node[path[-1].key] = leaf
    return found


def test_axes_name_every_dimension(model):
    spec, _ = model
    axes, abstract = logical_axes(spec), abstract_parameters(spec)
    same = jax.tree.map(lambda names, leaf: len(names) == len(leaf.shape), axes, abstract, is_leaf=is_axes)
    assert all(jax.tree.leaves(same))


def is_axes(node) -> bool:
    return isinstance(node, tuple)


def test_every_parameter_has_a_sharding(model):
    spec, _ = model
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    axes, abstract = (stack_layers(spec, tree) for tree in (logical_axes(spec), abstract_parameters(spec)))
    placed = shardings(mesh, axes, abstract)
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    for leaf, where in zip(jax.tree.leaves(abstract), jax.tree.leaves(placed), strict=True):
        where.shard_shape(leaf.shape)  # raises if the mesh does not divide it


def test_stacked_layers_compute_the_same(model, run, tokens):
    spec, params = model
    policy = Thresholded(jnp.full((2,), 0.5, jnp.float32))
    stacked = stack_layers(spec, params)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(spec, stacked), params)
    one, other = (run(spec, tree, tokens, policy=policy).logits for tree in (params, stacked))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_merged_adapters_compute_the_same(model, run, tokens):
    spec, params = model
    merged_spec, merged = merge_lora(spec, params)
    assert merged_spec.lora is None
    expected = abstract_parameters(merged_spec)
    assert jax.tree.structure(merged) == jax.tree.structure(expected)
    np.testing.assert_allclose(run(merged_spec, merged, tokens).logits, run(spec, params, tokens).logits, atol=1e-5)


@pytest.mark.slow
def test_theta_zero_is_the_dense_model_to_the_bit(model, run_optimized, tokens):
    spec, params = merge_lora(*model)
    dense_spec = spec.model_copy(update={"routing": None})
    layers = {i: {k: v for k, v in layer.items() if k != "router"} for i, layer in params["layers"].items()}
    dense = run_optimized(dense_spec, {**params, "layers": layers}, tokens).logits
    everything = Thresholded(jnp.zeros((2,), jnp.float32))
    for policy in (everything, Dense()):
        out = run_optimized(spec, params, tokens, policy=policy)
        assert out.routing.execute.all()
        np.testing.assert_array_equal(out.logits, dense)


def test_padding_changes_nothing(model, run, tokens):
    spec, params = model
    policy = Thresholded(jnp.full((2,), 0.5, jnp.float32))
    padded = run(spec, params, tokens, lengths=jnp.array([10, 7, 3], jnp.int32), policy=policy)
    for row, length in enumerate((10, 7, 3)):
        alone = run(spec, params, tokens[row : row + 1, :length], policy=policy)
        np.testing.assert_allclose(padded.logits[row, :length], alone.logits[0], atol=1e-5)
        np.testing.assert_array_equal(padded.routing.execute[row, :length], alone.routing.execute[0])


def test_biases_are_float32_and_start_at_zero(make_spec):
    spec = make_spec(dtype="bfloat16", **FEATURES["biases"])
    attention = initialize(spec, jax.random.key(0))["layers"][0]["attention"]
    assert {name for name, linear in attention.items() if "bias" in linear} == {"query", "key", "value"}
    assert attention["key"]["kernel"].dtype == jnp.bfloat16
    assert attention["key"]["bias"].dtype == jnp.float32 and not attention["key"]["bias"].any()


def test_head_norms_are_float32_and_make_the_size_of_queries_irrelevant(make_spec, make_params, run, tokens):
    spec = make_spec(dtype="bfloat16", **FEATURES["head norms"])
    params = make_params(spec)
    attention = params["layers"][1]["attention"]
    assert attention["query_norm"]["scale"].dtype == attention["key_norm"]["scale"].dtype == jnp.float32
    assert attention["key_norm"]["scale"].shape == (4,)
    expected = run(spec, params, tokens).logits
    attention["query"]["kernel"] = attention["query"]["kernel"] * 64  # so that epsilon no longer counts
    large = run(spec, params, tokens).logits
    attention["query"]["kernel"] = attention["query"]["kernel"] * 64
    np.testing.assert_allclose(run(spec, params, tokens).logits, large, atol=1e-5)
    np.testing.assert_allclose(large, expected, atol=1e-2)


def test_large_biases_lose_nothing_in_bfloat16(make_spec, make_params):
    """What is added to a bias is not rounded to the bias's own step before."""
    spec = make_spec(dtype="bfloat16", **FEATURES["biases"])
    linear = make_params(spec)["layers"][0]["attention"]["key"]
    linear["bias"] = jnp.full_like(linear["bias"], 3.0)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16), jnp.float32).astype(jnp.bfloat16)
    found = merge(skeleton(spec).layers[0].attention.key, linear)(x)
    exact = x.astype(jnp.float32) @ linear["kernel"].astype(jnp.float32) + 3.0
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, exact.astype(jnp.bfloat16))
