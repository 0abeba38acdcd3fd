"""Shapes and types, and that a row's result depends on nothing but the row: not on padding, packing or company."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.models.forward import forward, positions_of
from qtale_jax.models.policy import Dense, Sampled, Thresholded
from qtale_jax.models.stacking import stack_layers

HALF = Thresholded(jnp.full((2,), 0.5, jnp.float32))


def test_shapes_and_types(routed, run, tokens):
    spec, params = routed
    out = run(spec, params, tokens, policy=HALF)
    assert out.logits.shape == (3, 10, 40) and out.logits.dtype == jnp.float32
    assert out.routing.logits.shape == (3, 10, 2, 2) and out.routing.logits.dtype == jnp.float32
    assert out.routing.execute.shape == (3, 10, 3) and out.routing.execute.dtype == jnp.bool_
    assert out.routing.probability.shape == (3, 10, 2)


def test_dense_model_executes_everything_and_has_no_router_logits(make_spec, make_params, run, tokens):
    spec = make_spec()
    out = run(spec, make_params(spec), tokens)
    assert out.routing.execute.shape == (3, 10, 3) and out.routing.execute.all()
    assert out.routing.logits.shape == (3, 10, 0, 2)


@pytest.mark.parametrize("policy", [Dense(), HALF, Sampled(jax.random.key(0))], ids=["dense", "half", "sampled"])
def test_router_and_logits_stay_float32_in_bfloat16(make_spec, make_params, run, tokens, policy):
    spec = make_spec(routing={"always_on_layers": 1}, lora={}, dtype="bfloat16")
    params = make_params(spec)
    assert {leaf.dtype for leaf in jax.tree.leaves(params["layers"][1]["router"])} == {jnp.dtype("float32")}
    assert params["layers"][1]["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert params["layers"][1]["attention"]["query"]["lora"]["down"].dtype == jnp.float32
    out = run(spec, params, tokens, policy=policy, compute_dtype=jnp.bfloat16)
    assert out.logits.dtype == out.routing.logits.dtype == jnp.float32
    # Not merely converted at the end: bfloat16 arithmetic would leave only values that bfloat16 can hold.
    logits = np.asarray(out.routing.logits)
    assert (logits != np.asarray(jnp.asarray(logits).astype(jnp.bfloat16).astype(jnp.float32))).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_neither_value_nor_gradient(make_spec, make_params, tokens, remat):
    spec = make_spec(num_layers=2, routing={"always_on_layers": 1})
    params = stack_layers(spec, make_params(spec))

    def loss(params, remat):
        return forward(spec, params, tokens[:1], policy=Sampled(jax.random.key(0)), remat=remat).logits.std()

    both = [jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, kind) for kind in ("none", remat)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *both)


def test_padding_changes_nothing(routed, run, tokens):
    spec, params = routed
    padded = run(spec, params, tokens, lengths=jnp.array([10, 7, 7], jnp.int32), policy=HALF)
    for row, length in enumerate((10, 7, 7)):
        alone = run(spec, params, tokens[row : row + 1, :length], policy=HALF)
        np.testing.assert_allclose(padded.logits[row, :length], alone.logits[0], atol=1e-5)
        np.testing.assert_array_equal(padded.routing.execute[row, :length], alone.routing.execute[0])
        assert not padded.routing.execute[row, length:].any()
    assert jnp.isfinite(padded.logits).all()


@pytest.mark.parametrize(
    ("routing", "value"),
    [
        (None, Dense()),
        ({"always_on_layers": 1}, Thresholded(jnp.array([0.5], jnp.float32))),
        ({"always_on_layers": 1, "eviction": False}, Thresholded(jnp.array([0.5], jnp.float32))),
        ({"always_on_layers": 1}, Sampled(jax.random.key(0))),
    ],
    ids=["dense", "evicting", "keeping", "sampled"],
)
def test_negative_ids_are_padding_wherever_they_are(make_spec, make_params, run, tokens, routing, value):
    """Two rows that differ in the id of a hole only: what is in a hole is never read."""
    spec = make_spec(num_layers=2, routing=routing)
    params = make_params(spec)
    hole = tokens[:1].at[0, 4].set(-1)
    other = tokens[:1].at[0, 4].set(-100)
    first, second = (run(spec, params, ids, policy=value) for ids in (hole, other))
    kept = np.arange(10) != 4
    np.testing.assert_array_equal(first.logits[:, kept], second.logits[:, kept])
    assert np.isfinite(second.logits).all()
    assert not first.routing.execute[:, 4].any()


@pytest.mark.slow
def test_packing_changes_nothing(routed, run, tokens):
    spec, params = routed
    lengths = (5, 3, 2)
    rows = [tokens[row, :length] for row, length in enumerate(lengths)]
    packed = jnp.concatenate([*rows, jnp.zeros(4, jnp.int32)])[None]
    segments = jnp.array([[1] * 5 + [2] * 3 + [3] * 2 + [0] * 4], jnp.int32)
    out = run(spec, params, packed, segment_ids=segments, policy=HALF)
    start = 0
    for row in rows:
        alone = run(spec, params, row[None], policy=HALF)
        part = slice(start, start + len(row))
        np.testing.assert_allclose(out.logits[0, part], alone.logits[0], atol=1e-5)
        np.testing.assert_array_equal(out.routing.execute[0, part], alone.routing.execute[0])
        start += len(row)
    assert not out.routing.execute[0, start:].any()


def test_batch_decides_as_its_rows_do(routed, run, tokens):
    spec, params = routed
    together = run(spec, params, tokens, policy=HALF)
    for row in range(3):
        alone = run(spec, params, tokens[row : row + 1], policy=HALF)
        np.testing.assert_array_equal(together.routing.execute[row], alone.routing.execute[0])
        np.testing.assert_allclose(together.logits[row], alone.logits[0], atol=1e-5)


def test_later_tokens_do_not_reach_back(routed, run, tokens):
    spec, params = routed
    changed = tokens.at[:, 6:].set((tokens[:, 6:] + 1) % 40)
    first, second = (run(spec, params, ids, policy=HALF) for ids in (tokens, changed))
    np.testing.assert_array_equal(first.logits[:, :6], second.logits[:, :6])
    assert not np.array_equal(first.logits[:, 6:], second.logits[:, 6:])


def test_same_input_gives_the_same_bits(routed, run, tokens):
    spec, params = routed
    first, second = (run(spec, params, tokens, policy=HALF) for _ in range(2))
    np.testing.assert_array_equal(first.logits, second.logits)


@pytest.mark.slow
def test_dropout_only_with_a_key(make_spec, make_params, run, tokens):
    spec = make_spec(lora={"dropout": 0.5})
    params = make_params(spec)
    plain, again = (run(spec, params, tokens).logits for _ in range(2))
    np.testing.assert_array_equal(plain, again)
    dropped = [run(spec, params, tokens, dropout_key=jax.random.key(seed)).logits for seed in (0, 1)]
    assert not np.array_equal(plain, dropped[0])
    assert not np.array_equal(dropped[0], dropped[1])


def test_lengths_and_segments_exclude_each_other(routed, tokens):
    spec, params = routed
    with pytest.raises(ValueError, match="not both"):
        forward(spec, params, tokens, lengths=jnp.ones(3, jnp.int32), segment_ids=jnp.ones_like(tokens))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 5)), min_size=1, max_size=6))
def test_positions_restart_with_every_run(runs):
    ids = [segment for segment, count in runs for _ in range(count)]
    expected = []
    for index, segment in enumerate(ids):
        same = index > 0 and ids[index - 1] == segment
        expected.append(expected[-1] + 1 if same else 0)
    width = 30  # one compiled shape
    padded = np.array([ids + [99] * (width - len(ids))], np.int32)
    np.testing.assert_array_equal(positions_of(jnp.asarray(padded))[0, : len(ids)], expected)
