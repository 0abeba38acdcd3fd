"""Predictions from a table of measured parts: they follow the shares, and the theta found meets the budget."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.calibration.latency import LatencyTable, LayerSeconds, decoding_shares, size_probabilities
from qtale_jax.calibration.threshold import OutOfReach, search_budget
from qtale_jax.inference.skipping import ROW_SHARES, sizes

LAYERS = 5
"""The first one is always on; the others are of two makes."""


@st.composite
def tables(draw) -> LatencyTable:
    """Any table that could be measured, noise included."""
    rows = draw(st.integers(1, 40))
    of_batch = sizes(rows, ROW_SHARES)
    seconds = st.tuples(st.just(0.0), *[st.floats(-1e-5, 1e-2)] * (len(of_batch) - 1))
    layers = (LayerSeconds((1, 3), draw(seconds)), LayerSeconds((2, 4), draw(seconds)))
    idle = draw(st.floats(1e-4, 1e-2))
    return LatencyTable("chip", {"jax": "0"}, "digest", rows, 16, 3, of_batch, idle, idle / 2, 1e-6, layers)


def table(rows: int, seconds: tuple[float, ...]) -> LatencyTable:
    """One in which the four routed layers are alike."""
    return LatencyTable(
        "chip",
        {},
        "digest",
        rows,
        16,
        3,
        sizes(rows, ROW_SHARES),
        1.0,
        0.5,
        0.0,
        (LayerSeconds((1, 2, 3, 4), seconds),),
    )


shares = st.lists(st.floats(0, 1), min_size=LAYERS, max_size=LAYERS)


@given(tables(), shares, shares)
def test_executing_more_is_never_predicted_to_be_faster(found, one, other):
    less, more = np.minimum(one, other), np.maximum(one, other)
    assert found.step_seconds(less) <= found.step_seconds(more) * (1 + 1e-12)
    assert found.tokens_per_second(found.step_seconds(less)) > 0


@given(tables())
def test_nothing_and_everything_take_what_was_measured(found):
    assert found.step_seconds(np.zeros(LAYERS)) == found.idle
    most = sum(len(make.layers) * max(0.0, *make.seconds) for make in found.layers)
    assert found.step_seconds(np.ones(LAYERS)) == pytest.approx(found.idle + most)


@given(st.integers(1, 40), st.floats(0, 1))
def test_how_many_rows_execute_is_binomial(rows, share):
    of_batch = sizes(rows, ROW_SHARES)
    expected = np.zeros(len(of_batch))
    for count in range(rows + 1):
        size = next(index for index, size in enumerate(of_batch) if size >= count)
        expected[size] += math.comb(rows, count) * share**count * (1 - share) ** (rows - count)
    np.testing.assert_allclose(size_probabilities(np.array([share]), of_batch)[0], expected, atol=1e-9)


def test_between_sizes_it_is_interpolated_by_how_often_they_are_needed():
    alone = table(1, (0.0, 2.0))
    assert alone.step_seconds([1.0, 0.25, 0.25, 0.25, 0.25]) == pytest.approx(1.0 + 4 * 0.25 * 2.0)
    four = table(4, (0.0, 1.0, 2.0, 3.0, 4.0))  # where time follows the rows, their mean number decides
    assert four.step_seconds([1.0, 0.5, 0.5, 0.0, 0.0]) == pytest.approx(1.0 + 2 * 2.0)
    eight = table(8, (0.0, 1.0, 2.0, 3.0, 4.0))
    between = eight.step_seconds([0.0, 0.3, 0.0, 0.0, 0.0]) - 1.0
    assert 1.5 < between < 2.0  # 2.4 rows: mostly size 4, sometimes 1 or none


def test_a_larger_size_that_seems_faster_counts_as_the_smaller_one():
    found = table(4, (0.0, 1.0, 2.0, 1.5, 1.9))
    assert found.step_seconds(np.ones(LAYERS)) == pytest.approx(1.0 + 4 * 2.0)


def routed(theta: float) -> np.ndarray:
    """Shares as decided routers give them: every layer another one, falling as theta rises."""
    return np.array([1.0, *(1 / (1 + math.exp(9 * (theta - middle))) for middle in (0.2, 0.4, 0.5, 0.7))])


@given(tables(), st.floats(0, 1), st.sampled_from([0.0, 0.005, 0.1]))
def test_the_theta_found_meets_the_budget_and_a_smaller_one_does_not(found, where, tolerance):
    def predict(theta: float) -> tuple[float, float]:
        return found.step_seconds(routed(theta)), float(routed(theta).mean())

    slowest, fastest = predict(0.0)[0], predict(0.999)[0]
    budget = fastest + where * (slowest - fastest)
    chosen = search_budget(predict, budget, tolerance, 0.999)
    assert chosen.step_seconds == predict(chosen.theta)[0] <= budget
    if chosen.theta == 0:
        return
    smaller = max(theta for theta, _ in chosen.path if theta < chosen.theta)
    assert predict(smaller)[0] > budget
    assert predict(smaller)[1] - chosen.ratio <= tolerance or chosen.theta - smaller < 1e-5


def test_what_is_met_by_executing_everything_is_not_searched():
    found = search_budget(lambda theta: (1.0 - theta, 1.0 - theta), 1.0, 0.01, 0.999)
    assert (found.theta, found.ratio, found.path, found.seconds) == (0.0, 1.0, ((0.0, 1.0),), (1.0,))


def test_a_budget_out_of_reach_gives_the_range():
    with pytest.raises(OutOfReach) as caught:
        search_budget(lambda theta: (2.0 - theta, 1.0), 0.5, 0.01, 1.0)
    assert (caught.value.slowest, caught.value.fastest) == (2.0, 1.0)


def test_first_tokens_that_execute_everything_are_left_out():
    # Of rows of 10, 6 and 1 tokens 2 + 2 + 1 execute everything; 12 are routed.
    executed = np.array([17.0, 5.0, 11.0])
    np.testing.assert_allclose(decoding_shares(executed, 17.0, [(0, 10), (0, 6), (0, 1)], 2), [1.0, 0.0, 0.5])
    # Of those that count one is among the first two.
    np.testing.assert_allclose(decoding_shares(np.array([5.0, 3.0]), 5.0, [(1, 4), (5, 7)], 2), [1.0, 0.5])
    np.testing.assert_array_equal(decoding_shares(np.full(3, 4.0), 4.0, [(0, 2), (0, 2)], 2), np.ones(3))


@given(tables())
def test_a_table_is_the_same_after_it_was_stored(found):
    assert LatencyTable.of(json.loads(json.dumps(found.document()))) == found


@pytest.mark.parametrize("change", [{"sizes": [0, 1]}, {"layers": None}, {"unknown": 1}, {"idle": ...}])
def test_what_is_no_table_is_refused(change):
    document = {**table(4, (0.0, 1.0, 2.0, 3.0, 4.0)).document(), **change}
    document = {name: value for name, value in document.items() if value is not ...}
    with pytest.raises((KeyError, TypeError, ValueError)):
        LatencyTable.of(document)
