"""Attention without the keys of skipped tokens, against a reference in NumPy float64 that really leaves them out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.models.attention import attend
from qtale_jax.models.policy import Fixed
from qtale_jax.models.rotary import frequencies
from qtale_jax.models.stacking import stack_layers


def rms_norm(x, scale, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * scale


def rotated(x, position, angles):
    first, second = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(position * angles), np.sin(position * angles)
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def reference_row(spec, params, tokens, execute) -> np.ndarray:
    """Logits (length, vocabulary) of one row, token by token, with a cache that only executing tokens enter."""
    shape = spec.architecture
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    angles = frequencies(shape).astype(np.float64)
    caches = [[] for _ in range(shape.num_layers)]
    out = []
    for position, token in enumerate(tokens):
        hidden = params["embedding"]["table"][token]
        for layer in range(shape.num_layers):
            if not execute[position, layer]:
                continue
            weights = params["layers"][layer]
            x = rms_norm(hidden, weights["attention_norm"]["scale"], shape.norm_eps)
            q, k, v = (
                (x @ weights["attention"][name]["kernel"]).reshape(-1, shape.head_dim)
                for name in ("query", "key", "value")
            )
            caches[layer].append((rotated(k, position, angles), v))
            heads = []
            for head, query in enumerate(rotated(q, position, angles)):
                group = head * shape.num_kv_heads // shape.num_heads
                scores = np.array([query @ key[group] for key, _ in caches[layer]]) / np.sqrt(shape.head_dim)
                mass = np.exp(scores - scores.max())
                heads.append(
                    sum(m * value[group] for m, (_, value) in zip(mass, caches[layer], strict=True)) / mass.sum()
                )
            hidden = hidden + np.concatenate(heads) @ weights["attention"]["output"]["kernel"]
            x = rms_norm(hidden, weights["mlp_norm"]["scale"], shape.norm_eps)
            gate = x @ weights["mlp"]["gate"]["kernel"]
            hidden = (
                hidden
                + (gate / (1 + np.exp(-gate)) * (x @ weights["mlp"]["up"]["kernel"])) @ weights["mlp"]["down"]["kernel"]
            )
        hidden = rms_norm(hidden, params["final_norm"]["scale"], shape.norm_eps)
        out.append(hidden @ (params["embedding"]["table"].T if shape.tied_head else params["head"]["kernel"]))
    return np.stack(out)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_kv_heads": 4, "tied_head": True},
        {
            "num_kv_heads": 1,
            "rope_theta": 50.0,
            "rope_scaling": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 16},
        },
        pytest.param({"rope_scaling": {"kind": "linear", "factor": 4.0}}, marks=pytest.mark.exhaustive),
    ],
    ids=["grouped", "tied", "scaled", "interpolated"],
)
def test_masked_execution_equals_a_cache_without_skipped_tokens(make_spec, make_params, run, tokens, fields, stacked):
    spec = make_spec(routing={"always_on_layers": 0, "always_on_tokens": 0}, **fields)
    params = make_params(spec)
    execute = np.random.default_rng(0).random((*tokens.shape, 3)) < 0.6
    found = run(spec, stack_layers(spec, params) if stacked else params, tokens, policy=Fixed(jnp.asarray(execute)))
    for row in range(len(tokens)):
        expected = reference_row(spec, params, np.asarray(tokens[row]), execute[row])
        np.testing.assert_allclose(found.logits[row], expected, atol=1e-5)


@pytest.mark.parametrize("eviction", [True, False])
def test_token_that_skips_every_layer_is_never_seen(make_spec, make_params, run, tokens, eviction):
    spec = make_spec(routing={"always_on_layers": 0, "always_on_tokens": 0, "eviction": eviction})
    params = make_params(spec)
    policy = Fixed(jnp.ones((*tokens.shape, 3), jnp.bool_).at[:, 3].set(False))
    first, second = (
        run(spec, params, ids, policy=policy).logits for ids in (tokens, tokens.at[:, 3].set((tokens[:, 3] + 5) % 40))
    )
    assert np.array_equal(first[:, 4:], second[:, 4:]) == eviction
    assert not np.array_equal(first[:, 3], second[:, 3])


def test_token_that_skips_one_layer_is_seen_in_the_others(make_spec, make_params, run, tokens):
    spec = make_spec(routing={"always_on_layers": 0, "always_on_tokens": 0})
    params = make_params(spec)
    policy = Fixed(jnp.ones((*tokens.shape, 3), jnp.bool_).at[:, 3, 1].set(False))
    first, second = (
        run(spec, params, ids, policy=policy).logits for ids in (tokens, tokens.at[:, 3].set((tokens[:, 3] + 5) % 40))
    )
    assert not np.array_equal(first[:, 4:], second[:, 4:])


@pytest.fixture
def attention_inputs():
    """Queries, keys, values of 8 tokens; half of the keys evicted, never a query's own."""
    keys = jax.random.split(jax.random.key(0), 4)
    query = jax.random.normal(keys[0], (1, 8, 4, 4), jnp.float32)
    key, value = (jax.random.normal(k, (1, 8, 2, 4), jnp.float32) for k in keys[1:3])
    causal = jnp.tril(jnp.ones((1, 8, 8), jnp.bool_))
    own = jnp.eye(8, dtype=jnp.bool_)[None]
    kept = jax.random.bernoulli(keys[3], 0.5, (1, 1, 8)) | own
    return query, key, value, causal, kept


def test_key_gate_has_the_value_of_masked_softmax(attention_inputs):
    query, key, value, causal, kept = attention_inputs
    masked = attend(query, key, value, causal, kept)
    gated = attend(query, key, value, causal, kept, kept.astype(jnp.float32))
    np.testing.assert_allclose(gated, masked, atol=1e-6)


def test_queries_keys_and_values_learn_as_under_masked_softmax(attention_inputs):
    query, key, value, causal, kept = attention_inputs
    weight = jax.random.normal(jax.random.key(1), query.shape)

    def loss(arrays, gate):
        return jnp.sum(weight * attend(*arrays, causal, kept, gate))

    masked = jax.grad(loss)((query, key, value), None)
    gated = jax.grad(loss)((query, key, value), kept.astype(jnp.float32))
    for expected, found in zip(masked, gated, strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6)


def test_gates_learn_as_in_a_renormalised_softmax(attention_inputs):
    """The reference of D-LLM: softmax over causal keys, times the gate, renormalised.

    A query that points along its own key prefers no other, so that no evicted key is stronger than a visible one.
    """
    _, key, value, causal, kept = attention_inputs
    key = key / jnp.linalg.norm(key, axis=-1, keepdims=True)
    query = 3 * jnp.repeat(key, 2, axis=2)

    def renormalised(gate):
        scores = jnp.einsum("btkgd,bskd->bkgts", query.reshape(1, 8, 2, 2, 4), key) / 2
        weights = jax.nn.softmax(jnp.where(causal[:, None, None], scores, -jnp.inf), axis=-1) * gate[:, None, None]
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return jnp.einsum("bkgts,bskd->btkgd", weights, value).reshape(query.shape)

    gate = kept.astype(jnp.float32)
    expected = jax.grad(lambda gate: jnp.sum(jnp.sin(3 * renormalised(gate))))(gate)
    found = jax.grad(lambda gate: jnp.sum(jnp.sin(3 * attend(query, key, value, causal, kept, gate))))(gate)
    assert float(jnp.abs(jnp.where(causal & ~kept, expected, 0.0)).max()) > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_gradient_through_eviction_is_bounded(attention_inputs, size):
    """However strongly a query would have liked an evicted key, its gate's gradient stays that of a visible key."""
    query, key, value, causal, kept = attention_inputs

    def total(gate):
        return jnp.sum(attend(query * size, key, value, causal, kept, gate))

    slope = jax.grad(total)(kept.astype(jnp.float32))
    # d out / d gate is at most (largest value) * 2 per head and channel, as no mass exceeds that of the top visible key
    bound = 2 * float(jnp.abs(value).max()) * 4 * 4
    assert np.isfinite(slope).all()
    assert float(jnp.abs(slope).max()) <= bound
    assert float(jnp.abs(jnp.where(causal & ~kept, slope, 0.0)).max()) > 0
    assert not jnp.where(causal, 0.0, slope).any()


def test_row_without_visible_keys_gives_numbers(attention_inputs):
    query, key, value, causal, _ = attention_inputs
    nothing = jnp.zeros_like(causal)
    assert jnp.isfinite(attend(query, key, value, nothing, nothing)).all()
