import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.errors import InputError
from qtale_jax.evaluation.likelihood import HISTOGRAM_EDGES, Row, batch_likelihood, batches, likelihoods, padded_length
from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.forward import forward
from qtale_jax.models.stacking import stack_layers

run = jax.jit(forward, static_argnums=0)


def alone(spec, params, row: Row):
    """Log-probabilities (length, vocabulary), routing logits and decisions of one row, without the library's scoring.

    Rows are padded to one shape, beyond which nothing is read, so that one program serves all.
    """
    tokens = jnp.asarray([list(row.ids) + [1] * (32 - len(row.ids))], jnp.int32)
    lengths = jnp.asarray([len(row.ids)], jnp.int32)
    out = run(spec.structure, params, tokens, lengths=lengths, policy=inference_policy(spec))
    logits = np.asarray(out.logits, np.float64)[0, : len(row.ids)]
    logp = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    gaps = np.asarray(out.routing.logits, np.float64)[0, : len(row.ids)]
    return logp, gaps[..., 1] - gaps[..., 0], np.asarray(out.routing.execute)[0, : len(row.ids)]


def test_likelihoods_are_sums_of_chosen_log_probabilities(either, rows):
    spec, params = either
    found = likelihoods(spec, params, rows, inference_policy(spec), batch_size=4)
    for index, row in enumerate(rows):
        logp, _, _ = alone(spec, params, row)
        at = np.arange(row.start, len(row.ids))
        chosen = logp[at - 1, np.asarray(row.ids)[at]]
        assert found.log_likelihood[index] == pytest.approx(chosen.sum(), abs=1e-4)
        assert found.tokens[index] == len(at)
        assert found.is_greedy[index] == bool(np.all(logp[at - 1].argmax(1) == np.asarray(row.ids)[at]))


def test_what_greedy_decoding_gives_is_greedy(routed):
    spec, params = routed
    ids = [3, 9, 4]
    for _ in range(3):
        ids.append(int(alone(spec, params, Row(ids, 1))[0][-1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 64]
    found = likelihoods(spec, params, [Row(ids, 3), Row(other, 3)], inference_policy(spec), batch_size=4)
    assert found.is_greedy.tolist() == [True, False]


@pytest.mark.parametrize(("window", "eviction"), [(None, True), (6, True), (None, False)])
def test_counts_are_those_of_counting_one_by_one(routed, rows, window, eviction):
    spec, params = routed
    architecture = spec.architecture.model_copy(update={"sliding_window": window})
    routing = spec.routing.model_copy(update={"eviction": eviction})
    spec = spec.model_copy(update={"architecture": architecture, "routing": routing})
    counted = likelihoods(spec, params, rows, inference_policy(spec), batch_size=4).counted
    tokens, executed, keys = 0, np.zeros(3), np.zeros(3)
    gaps, asked = [], []
    for row in rows:
        _, gap, execute = alone(spec, params, row)
        tokens += len(row.ids)
        asked.append(execute[row.start - 1 : -1])
        executed += execute.sum(0)
        for layer in range(3):
            left = execute if eviction else np.ones_like(execute)
            for position in np.flatnonzero(execute[:, layer]):
                keys[layer] += left[max(0, position + 1 - (window or 99)) : position + 1, layer].sum()
        gaps += np.abs(gap[2:]).ravel().tolist()
    assert counted.tokens == tokens and counted.decisions == len(gaps)
    np.testing.assert_array_equal(counted.executed, executed)
    np.testing.assert_array_equal(counted.keys, keys)
    assert counted.scored == sum(map(len, asked))
    np.testing.assert_array_equal(counted.executed_scored, np.concatenate(asked).sum(0))
    assert executed[0] == tokens > executed[2] > 0
    assert float(counted.gap) == pytest.approx(sum(gaps), rel=1e-4)
    assert float(counted.flips) == pytest.approx(sum(1 / (1 + np.exp(g)) for g in gaps), rel=1e-4)
    np.testing.assert_array_equal(counted.histogram, np.histogram(gaps, HISTOGRAM_EDGES)[0])


def test_executed_ratio_is_the_share_of_all_layers(either, rows):
    spec, params = either
    found = likelihoods(spec, params, rows, inference_policy(spec), batch_size=4)
    counted = found.counted
    assert found.executed_ratio == pytest.approx(counted.executed.sum() / counted.tokens / 3)
    if spec.routing is None:
        assert found.executed_ratio == 1.0 and counted.decisions == 0


def test_order_and_batch_size_do_not_matter(routed, rows):
    spec, params = routed
    expected = likelihoods(spec, params, rows, inference_policy(spec), batch_size=4)
    for order, size in ((list(range(len(rows)))[::-1], 4), (list(range(len(rows))), 16)):
        found = likelihoods(spec, params, [rows[i] for i in order], inference_policy(spec), batch_size=size)
        np.testing.assert_allclose(found.log_likelihood, expected.log_likelihood[order], atol=1e-4)
        np.testing.assert_array_equal(found.tokens, expected.tokens[order])
        np.testing.assert_array_equal(found.counted.executed, expected.counted.executed)
        np.testing.assert_array_equal(found.counted.keys, expected.counted.keys)


def test_padding_and_stacking_do_not_matter(routed, rows):
    spec, params = routed
    row = rows[0]
    policy, results = inference_policy(spec), []
    for width, layout in ((24, params), (32, params), (24, stack_layers(spec, params))):
        tokens = np.full((4, width), 5, np.int32)
        tokens[0, : len(row.ids)] = row.ids
        lengths, starts = np.array([len(row.ids), 0, 0, 0], np.int32), np.array([row.start, 1, 1, 1], np.int32)
        value, _, counted = batch_likelihood(spec.structure, layout, tokens, lengths, starts, policy, jnp.float32)
        results.append((float(value[0].sum()), counted.executed.tolist(), float(counted.tokens)))
        assert not np.any(value[1:])
    for value, executed, tokens in results:
        assert value == pytest.approx(results[0][0], abs=1e-5)
        assert (executed, tokens) == results[0][1:]


def test_progress_counts_rows(routed, rows):
    done = []
    likelihoods(*routed, rows, inference_policy(routed[0]), batch_size=4, progress=done.append)
    assert sum(done) == len(rows)


def test_bad_rows_are_refused(routed):
    spec, params = routed
    policy = inference_policy(spec)
    for rows in ([], [Row([1, 2], 2)], [Row([1, 2], 0)], [Row([1], 1)]):
        with pytest.raises(ValueError, match="at least one token"):
            likelihoods(spec, params, rows, policy)
    with pytest.raises(InputError, match="41 tokens, more than the model's context of 40"):
        likelihoods(spec, params, [Row([1] * 41, 1)], policy)


@given(st.lists(st.integers(2, 100), min_size=1, max_size=30), st.integers(1, 8))
def test_every_row_is_in_one_batch_of_its_length_class(sizes, batch_size):
    rows = [Row([index + 1] * size, 1) for index, size in enumerate(sizes)]
    seen = []
    for indices, tokens, lengths, starts in batches(rows, batch_size):
        assert len(indices) == len(tokens) == len(lengths) == len(starts) == batch_size
        for slot, index in enumerate(indices):
            if index < 0:
                assert lengths[slot] == 0 and not tokens[slot].any()
                continue
            seen.append(int(index))
            assert tokens.shape[1] == padded_length(sizes[index]) and lengths[slot] == sizes[index]
            assert tokens[slot].tolist() == [index + 1] * sizes[index] + [0] * (tokens.shape[1] - sizes[index])
    assert sorted(seen) == list(range(len(rows)))


def test_length_classes_are_few_and_tight():
    classes = [padded_length(n) for n in range(1, 4097)]
    assert classes == sorted(classes) and sorted(set(classes))[:6] == [16, 24, 32, 48, 64, 96]
    assert all(n <= size and (size == 16 or size <= 1.5 * n) for n, size in enumerate(classes, 1))
