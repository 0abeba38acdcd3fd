"""Static layer dropping: which layers matter, which stay, and that the rest is as if always skipped."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.artifact import load_model, save_model
from qtale_jax.config.schema import Config
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import initialize
from qtale_jax.models.forward import context_of, embed, forward, run_layers
from qtale_jax.models.huggingface import read_huggingface, to_huggingface
from qtale_jax.models.policy import Dense, Fixed
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.training.dropping import block_influence, drop_layers, even_layers, layers_to_keep, most_influential

pytestmark = pytest.mark.slow

LAYERS = 5
run = jax.jit(forward, static_argnums=0)


def architecture(layers: int = LAYERS) -> Architecture:
    return Architecture(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_layers=layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=16,
    )


@pytest.fixture(scope="module")
def dense() -> tuple[ModelSpecification, dict]:
    """Five layers whose outputs differ in size: the third does nothing at all, the last a lot."""
    spec = ModelSpecification(architecture=architecture())
    params = initialize(spec, jax.random.key(3))
    for layer, size in enumerate((1.0, 0.5, 0.0, 2.0, 6.0)):
        for part, name in (("attention", "output"), ("mlp", "down")):
            linear = params["layers"][layer][part][name]
            params["layers"][layer][part][name] = {"kernel": linear["kernel"] * size}
    return spec, params


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """Seven rows, most with padding."""
    draw = np.random.default_rng(1)
    tokens = draw.integers(3, 60, (7, 10)).astype(np.int32)
    segments = (np.arange(10)[None] < np.array([10, 4, 10, 1, 7, 9, 3])[:, None]).astype(np.int32)
    return tokens, segments


KINDS = [
    pytest.param({}, marks=pytest.mark.exhaustive),
    {"sliding_window": 3, "global_layers": (1, 4), "local_rope_theta": 50.0},
]
"""Fields of the architecture: all layers alike, or the second and the last without a window."""


def of_kinds(model, fields) -> tuple[ModelSpecification, dict]:
    spec, params = model
    return spec.model_copy(update={"architecture": spec.architecture.model_copy(update=fields)}), params


def hidden_states(spec, params, tokens, segments) -> list[np.ndarray]:
    """The hidden states before the first layer and after each, of the model's own forward pass through them."""
    context, initial = context_of(spec, jnp.asarray(tokens), jnp.asarray(segments))
    first = embed(spec, params, jnp.asarray(tokens), jnp.dtype(jnp.float32))
    states = [first]
    for layers in range(1, LAYERS + 1):
        part = spec.model_copy(update={"architecture": spec.architecture.with_layers(range(layers))})
        states.append(run_layers(part, params, first, context, initial, Dense())[0])
    return [np.asarray(state, np.float64) for state in states]


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=["alike", "two kinds"])
def test_influence_is_the_mean_distance_in_angle(dense, rows, kinds):
    spec, params = of_kinds(dense, kinds)
    states = hidden_states(spec, params, *rows)
    there = rows[1] > 0
    expected = []
    for before, after in zip(states, states[1:], strict=False):
        a, b = before[there], after[there]
        cosine = (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))
        expected.append(1 - cosine.mean())
    found = block_influence(spec, params, *rows)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found[2] == pytest.approx(0, abs=1e-6)  # a layer that adds nothing
    np.testing.assert_allclose(block_influence(spec, params, *rows, batch_size=3), found, atol=1e-6)


def test_influence_needs_a_dense_model(dense, rows):
    spec = ModelSpecification(architecture=architecture(), routing=RoutingSpecification(method="qtale"))
    with pytest.raises(ValueError, match="measured on a dense model"):
        block_influence(spec, dense[1], *rows)


@pytest.mark.parametrize(
    ("layers", "keep", "first", "expected"),
    [
        (12, 6, 2, (0, 1, 4, 6, 9, 11)),
        (12, 2, 2, (0, 1)),
        (12, 3, 2, (0, 1, 11)),
        (4, 3, 1, (0, 2, 3)),
        (6, 6, 2, (0, 1, 2, 3, 4, 5)),
        (3, 1, 0, (2,)),
    ],
)
def test_even_layers(layers, keep, first, expected):
    assert even_layers(layers, keep, first) == expected


@given(st.data())
def test_even_layers_are_distinct_in_order_and_evenly_apart(data):
    layers = data.draw(st.integers(1, 40))
    first = data.draw(st.integers(0, layers - 1))
    keep = data.draw(st.integers(first + 1, layers))
    found = even_layers(layers, keep, first)
    assert len(found) == keep and list(found) == sorted(set(found))
    assert found[:first] == tuple(range(first)) and found[-1] == layers - 1
    gaps = np.diff(found[first:])
    assert not len(gaps) or gaps.max() - gaps.min() <= 1


def test_most_influential():
    influence = np.array([0.0, 0.3, 0.1, 0.3, 0.5])
    assert most_influential(influence, 3, 1) == (0, 1, 4)  # of the equal ones the first
    assert most_influential(influence, 4, 1) == (0, 1, 3, 4)
    assert most_influential(influence, 2, 2) == (0, 1)
    assert most_influential(influence, 1, 0) == (4,)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", KINDS, ids=["alike", "two kinds"])
def test_a_model_without_layers_is_the_whole_one_whose_tokens_skip_them(dense, rows, kinds):
    spec, params = of_kinds(dense, kinds)
    keep = (0, 2, 4)
    smaller, kept = drop_layers(spec, params, keep)
    assert smaller.dropped_layers == (1, 3) and smaller.kept_share == pytest.approx(0.6)
    assert smaller.architecture.num_layers == 3 and list(kept["layers"]) == [0, 1, 2]
    routing = RoutingSpecification(method="random", router="hashed", always_on_layers=0, always_on_tokens=0)
    routed = spec.model_copy(update={"routing": routing})
    tokens, segments = map(jnp.asarray, rows)
    mask = jnp.broadcast_to(jnp.isin(jnp.arange(LAYERS), jnp.array(keep)), (*tokens.shape, LAYERS))
    expected = run(routed, params, tokens, segment_ids=segments, policy=Fixed(mask))
    np.testing.assert_array_equal(expected.routing.execute[0, 0], [True, False, True, False, True])
    found = run(smaller, kept, tokens, segment_ids=segments)
    there = rows[1] > 0
    np.testing.assert_allclose(np.asarray(found.logits)[there], np.asarray(expected.logits)[there], atol=1e-5)


def test_what_was_dropped_is_counted_in_the_numbers_of_the_first_model(dense, tmp_path):
    spec, params = dense
    once = drop_layers(spec, params, (0, 2, 3, 4))
    twice, kept = drop_layers(*once, (0, 3))
    assert twice.dropped_layers == (1, 2, 3) and twice.kept_share == pytest.approx(2 / 5)
    assert kept["layers"][1] is params["layers"][4]
    assert spec.kept_share == 1.0
    save_model(tmp_path / "model", twice, kept)
    assert load_model(tmp_path / "model").spec == twice
    to_huggingface(tmp_path / "model", tmp_path / "exported")
    back = read_huggingface(tmp_path / "exported").spec
    assert back.dropped_layers == (1, 2, 3) and back.routing is None
    document = json.loads((tmp_path / "exported" / "qtale.json").read_text())
    (tmp_path / "exported" / "qtale.json").write_text(json.dumps({**document, "dropped_layers": "1"}))
    with pytest.raises(InputError, match="dropped_layers: found '1', allowed: a list of numbers"):
        read_huggingface(tmp_path / "exported")


def config(tmp_path, **drop) -> Config:
    """Sums in the words of the reasoning suite, two layers always on."""
    path = tmp_path / "rows.jsonl"
    rows = [{"query": f"sum {i} 1 =", "choices": [str(i + 1), str(i)], "gold": 0} for i in range(20)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = {"kind": "multiple_choice", "path": str(path), "length": 12, "held_out": 0.4, "loss_on": "all"}
    return Config.model_validate(
        {"data": data, "model": {"path": "parent", "drop": drop}, "routing": {"method": "dense"}}
    )


@pytest.mark.slow
def test_layers_are_chosen_by_influence_on_calibration_data_or_evenly(dense, tmp_path):
    spec, params = dense
    tokenizer = reasoning.tokenizer()
    found = layers_to_keep(config(tmp_path, keep=0.6, examples=4), spec, params, tokenizer)
    assert found == (0, 1, 4)  # the first two always stay; the last changes most
    assert layers_to_keep(config(tmp_path, keep=0.8, examples=4), spec, params, tokenizer) == (0, 1, 3, 4)
    assert layers_to_keep(config(tmp_path, keep=0.7, by="even"), spec, params, None) == even_layers(5, 4, 2)


@pytest.mark.parametrize("by", ["even", "influence"])
def test_what_cannot_be_dropped_is_refused(dense, tmp_path, by):
    spec, params = dense
    with pytest.raises(InputError, match=r"keep=0.4 leaves 2 of 5 layers; allowed: more than .*always_on_layers=2"):
        layers_to_keep(config(tmp_path, keep=0.4, by=by), spec, params, None)
    routed = spec.model_copy(update={"routing": RoutingSpecification(method="qtale")})
    with pytest.raises(InputError, match="out of a dense model, but model.path is routed"):
        layers_to_keep(config(tmp_path, keep=0.6, by=by), routed, params, None)
