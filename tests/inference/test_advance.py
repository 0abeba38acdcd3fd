"""The skipping engine against the masked forward pass: the same decisions, the same logits to 1e-5.

Rows are forced through given tokens: the first ones by prefill in two chunks, the rest by decode one by one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtale_jax.config.schema import QuantizeConfig
from qtale_jax.inference.advance import advance, at_positions
from qtale_jax.inference.pages import empty_pages
from qtale_jax.models.decoder import initialize
from qtale_jax.models.forward import forward, unembed
from qtale_jax.models.policy import Dense, Fixed, Sampled, Thresholded
from qtale_jax.models.specification import Architecture, LinearScaling, ModelSpecification, RoutingSpecification
from qtale_jax.quantization.pipeline import quantize_parameters

pytestmark = pytest.mark.slow

ROWS, CHUNK, STEPS, VOCABULARY, PAGE = 4, 6, 3, 29, 4
PROMPT, WIDTH = 2 * CHUNK, 2 * CHUNK + STEPS

reference = jax.jit(forward, static_argnums=0)


@jax.jit(static_argnums=0)
def step(spec, params, tokens, positions, present, cache, policy):
    hidden, execute, cache = advance(spec, params, tokens, positions, present, cache, policy, jnp.dtype(jnp.float32))
    return unembed(spec, params, hidden), execute, cache


def engine(model, tokens, lengths, policy):
    """Logits and decisions (rows, length) of whole rows: `lengths` tokens by prefill, `STEPS` more by decode."""
    spec, params = model
    count = len(tokens)
    pages = spec.architecture.num_layers * count * -(-WIDTH // PAGE)
    cache = empty_pages(spec.architecture, count, WIDTH, pages, jnp.float32, PAGE)
    logits = np.full((count, WIDTH, VOCABULARY), np.nan, np.float32)
    execute = np.zeros((count, WIDTH, spec.architecture.num_layers), bool)
    parts = [np.tile(np.arange(start, start + CHUNK), (count, 1)) for start in (0, CHUNK)]
    parts += [lengths[:, None] + number for number in range(STEPS)]
    rows = np.arange(count)[:, None]
    for part in parts:
        prefill = part.shape[1] > 1
        present = part < lengths[:, None] if prefill else np.ones_like(part, bool)
        at = jnp.asarray(part, jnp.int32)
        found, taken, cache = step(
            spec.structure, params, jnp.asarray(tokens[rows, part]), at, jnp.asarray(present), cache, policy
        )
        logits[rows, part] = np.where(present[:, :, None], found, logits[rows, part])
        execute[rows, part] |= np.asarray(taken) & present[:, :, None]
    return logits, execute, cache


def agrees(model, tokens, lengths, policy):
    """Compares everything, and returns what was executed and the cache."""
    spec, params = model
    logits, execute, cache = engine(model, tokens, lengths, policy)
    total = jnp.asarray(lengths + STEPS)
    expected = reference(spec.structure, params, jnp.asarray(tokens), lengths=total, policy=policy)
    present = np.arange(WIDTH) < (lengths + STEPS)[:, None]
    np.testing.assert_array_equal(execute[present], np.asarray(expected.routing.execute)[present])
    np.testing.assert_allclose(logits[present], np.asarray(expected.logits)[present], rtol=0, atol=1e-5)
    evicts = spec.routing is not None and spec.routing.eviction
    kept = execute if evicts else np.repeat(present[..., None], execute.shape[2], axis=2)
    np.testing.assert_array_equal(cache.counts, (kept & present[..., None]).sum(1).T)
    return execute


batches = st.tuples(st.integers(0, 10**6), st.lists(st.integers(1, PROMPT), min_size=ROWS, max_size=ROWS).map(np.array))


def random_tokens(seed, rows=ROWS):
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, WIDTH)).astype(np.int32)


@given(batch=batches, theta=st.lists(st.floats(0.125, 1.0, width=32), min_size=2, max_size=2))
@settings(max_examples=20)
def test_thresholds(routed, batch, theta):
    agrees(routed, random_tokens(batch[0]), batch[1], Thresholded(jnp.asarray(theta, jnp.float32)))


@given(batch=batches, share=st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9]))
@settings(max_examples=20)
def test_given_masks(routed, batch, share):
    mask = np.random.default_rng(batch[0]).random((ROWS, WIDTH, 3)) < share
    execute = agrees(routed, random_tokens(batch[0]), batch[1], Fixed(jnp.asarray(mask)))
    total = (batch[1] + STEPS)[:, None]
    inside = (np.arange(WIDTH) >= 2) & (np.arange(WIDTH) < total)
    np.testing.assert_array_equal(execute[inside][:, 1:], mask[inside][:, 1:])


LENGTHS = np.array([1, 12, 7, 3])

TWO_KINDS = {
    "sliding_window": 3,
    "global_layers": (1,),
    "local_rope_theta": 100.0,
    "rope_scaling": LinearScaling(factor=4.0),
    "norm_offset": 1.0,
    "post_norms": True,
    "activation": "gelu_tanh",
    "query_pre_attn_scalar": 3.0,
    "attention_softcap": 1.5,
    "logit_softcap": 2.0,
}


@pytest.fixture
def model(routed, request):
    """The routed model with something else about it."""
    spec, params = routed
    if request.param == "window":
        narrow = spec.architecture.model_copy(update={"sliding_window": 3})
        return spec.model_copy(update={"architecture": narrow}), params
    if request.param == "two kinds of layers":
        shape = spec.architecture.model_copy(update=TWO_KINDS)
        spec = spec.model_copy(update={"architecture": shape})
        return spec, initialize(spec, jax.random.key(8))
    if request.param == "head size":
        shape = spec.architecture.model_copy(update={"query_key_norm": True, "num_kv_heads": 4, "biases": ("key",)})
        spec = spec.model_copy(update={"architecture": shape})
        return spec, initialize(spec, jax.random.key(8))
    if request.param in ("int8", "int4"):
        config = QuantizeConfig(bits=int(request.param[3:]), group_size=-1)
        spec, params, *_ = quantize_parameters(spec, params, config)
        return spec, params
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize(
    "model",
    [
        "two kinds of layers",
        "int4",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("without_eviction", "window", "head size", "hashed")
        ),
    ],
    indirect=True,
)
def test_all_kinds_of_models(model):
    execute = agrees(model, random_tokens(5), LENGTHS, Thresholded(jnp.full(2, 0.55)))
    assert 0.1 < execute[:, 2:, 1:].mean() < 0.9


@pytest.mark.parametrize("rows", [1, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_a_row_does_not_depend_on_those_beside_it(routed, rows):
    tokens, policy = random_tokens(6), Thresholded(jnp.asarray(routed[0].thresholds, jnp.float32))
    logits, execute, _ = engine(routed, tokens, LENGTHS, policy)
    some, taken, _ = engine(routed, tokens[:rows], LENGTHS[:rows], policy)
    np.testing.assert_array_equal(taken, execute[:rows])
    np.testing.assert_allclose(some, logits[:rows], rtol=0, atol=1e-5)


def test_theta_zero_is_the_dense_model(routed):
    results = [engine(routed, random_tokens(7), LENGTHS, policy)[0] for policy in (Dense(), Thresholded(jnp.zeros(2)))]
    np.testing.assert_array_equal(*results)


def test_a_theta_per_row(routed):
    thetas = np.random.default_rng(3).uniform(0.3, 0.7, (2, ROWS, 1)).astype(np.float32)
    logits, execute, _ = engine(routed, random_tokens(8), LENGTHS, Thresholded(jnp.asarray(thetas)))
    for row in range(ROWS):
        policy = Thresholded(jnp.asarray(np.tile(thetas[:, row : row + 1], (1, ROWS, 1))))
        alone, taken, _ = engine(routed, random_tokens(8), LENGTHS, policy)
        np.testing.assert_array_equal(taken[row], execute[row])
        np.testing.assert_allclose(alone[row], logits[row], rtol=0, atol=1e-5)


@st.composite
def random_models(draw):
    """Any small model: shape, what a family may add, routing, quantizer, kernels."""
    heads, groups = draw(st.sampled_from([(4, 2), (2, 1), (3, 3)]))
    layers = draw(st.integers(2, 4))
    extras = {
        "tied_head": draw(st.booleans()),
        "query_key_norm": draw(st.booleans()),
        "biases": draw(st.sampled_from([(), ("query", "key", "value")])),
        "sliding_window": draw(st.sampled_from([None, 4])),
        "attention_softcap": draw(st.sampled_from([None, 2.0])),
        "post_norms": draw(st.booleans()),
    }
    shape = Architecture(
        vocab_size=VOCABULARY,
        hidden_size=draw(st.sampled_from([16, 24])),
        intermediate_size=32,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=groups,
        head_dim=8,
        max_length=64,
        **extras,
    )
    routing = RoutingSpecification(
        method="qtale",
        always_on_layers=draw(st.integers(0, layers - 1)),
        always_on_tokens=draw(st.integers(0, 2)),
        router_hidden=8,
        eviction=draw(st.booleans()),
    )
    spec = ModelSpecification(architecture=shape, routing=routing)
    params = initialize(spec, jax.random.key(draw(st.integers(0, 2**16))))
    bits = draw(st.sampled_from([16, 8, 4, 3, 2]))
    if bits < 16:
        groups, symmetric = draw(st.sampled_from([-1, 8])), draw(st.booleans())
        config = QuantizeConfig(bits=bits, group_size=groups, symmetric=symmetric)
        spec, params, *_ = quantize_parameters(spec, params, config)
    return spec.model_copy(update={"kernels": draw(st.sampled_from(["xla", "interpreted"]))}), params


def check_random_model(model, batch, data):
    layers = len(model[0].routed_layers)
    theta = data.draw(st.lists(st.floats(0.375, 0.625, width=32), min_size=layers, max_size=layers))
    agrees(model, random_tokens(batch[0]), batch[1], Thresholded(jnp.asarray(theta, jnp.float32)))


@given(model=random_models(), batch=batches, data=st.data())
@settings(max_examples=2)  # a model compiles for a quarter of a minute
def test_random_models(model, batch, data):
    check_random_model(model, batch, data)


@pytest.mark.exhaustive
@given(model=random_models(), batch=batches, data=st.data())
@settings(max_examples=8)
def test_more_random_models(model, batch, data):
    check_random_model(model, batch, data)


def test_policies_of_training_are_refused():
    with pytest.raises(ValueError, match="takes Dense, Thresholded or Fixed, found Sampled"):
        at_positions(Sampled(jax.random.key(0)), jnp.zeros((1, 1), jnp.int32))
