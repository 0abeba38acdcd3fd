"""Means and standard errors over seeds, grouping, order, and the operating point shown where only one fits."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.reporting.aggregate import (
    Format,
    at_reference,
    estimate,
    families,
    formats,
    merge_histograms,
    point_order,
    reference_point,
    runs_all_layers,
    summarize,
    swept,
    theta_series,
    threshold_of,
)
from qtale_jax.reporting.labels import NATS
from qtale_jax.reporting.results import Histogram, read_evaluations


@pytest.fixture(scope="module")
def evaluations(experiment):
    return read_evaluations(experiment / "evaluation")


def test_a_known_standard_error():
    found = estimate([1.0, 2.0, 3.0, 6.0])
    assert found.mean == 3.0 and found.count == 4
    assert found.error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))


def test_one_value_keeps_the_error_of_its_measurement():
    assert estimate([0.9], 0.02).error == 0.02
    assert estimate([0.9]).error is None


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8))
def test_estimate_agrees_with_the_textbook(values):
    found = estimate(values, 5.0)
    assert found.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert found.error == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_seeds_are_grouped_and_nothing_else(evaluations):
    summaries = summarize(evaluations)
    assert len(summaries) == 4 + 2 * 4 * 4
    assert {len(summary.seeds) for summary in summaries if summary.routing == "dense"} == {1}
    assert {summary.seeds for summary in summaries if summary.routing != "dense"} == {(0, 1, 2)}
    assert summarize(reversed(evaluations)) == summaries


def test_the_numbers_of_one_group(evaluations):
    summary = next(s for s in summarize(evaluations) if (s.model, s.format.bits, s.point) == ("qtale", 3, "ratio 0.60"))
    rows = [e.row for e in evaluations if (e.row.model, e.row.bits, e.point) == ("qtale", 3, "ratio 0.60")]
    means = [row.accuracy["mean"] for row in rows]
    assert summary.accuracy["mean"].mean == pytest.approx(statistics.fmean(means))
    assert summary.accuracy["mean"].error == pytest.approx(statistics.stdev(means) / math.sqrt(3))
    assert summary.accuracy["sort"].mean == pytest.approx(statistics.fmean(row.accuracy["sort"] for row in rows))
    assert summary.executed_ratio.mean == pytest.approx(statistics.fmean(row.executed_ratio for row in rows))
    assert NATS.of(summary).error == pytest.approx(
        statistics.stdev([row.nats_per_token for row in rows]) / math.sqrt(3)
    )
    assert summary.histogram is not None and sum(summary.histogram.counts) == 3 * 4000


def test_the_error_of_a_row_belongs_to_accuracy_or_else_to_nats(evaluations, text_experiment):
    dense = summarize(evaluations)[0]
    assert dense.accuracy["mean"].error == 0.0045 and dense.accuracy["sort"].error is None
    assert NATS.of(dense).error is None
    text = summarize(read_evaluations(text_experiment / "evaluation"))[0]
    assert text.accuracy == {} and NATS.of(text).error == 0.0045


def test_order_is_dense_then_points_then_methods(evaluations):
    summaries = summarize(evaluations)
    order = list(dict.fromkeys((summary.point, summary.model) for summary in summaries))
    assert order[:5] == [
        ("", "dense"),
        ("threshold .5", "dllm"),
        ("threshold .5", "qtale"),
        ("ratio 0.50", "dllm"),
        ("ratio 0.50", "qtale"),
    ]
    assert [found.bits for found in formats(summaries)] == [16, 4, 3, 2]


def test_formats_and_points_sort_by_their_numbers():
    found = [Format("rtn", 4, 32), Format("none", 16, None), Format("rtn", 8, -1), Format("rtn", 4, -1)]
    assert sorted(found, key=lambda each: each.order) == [found[1], found[2], found[3], found[0]]
    points = ["ratio 0.60", "other", "ratio 0.5", "threshold .5", ""]
    assert sorted(points, key=point_order) == ["", "threshold .5", "ratio 0.5", "ratio 0.60", "other"]


def test_the_reference_is_the_shared_ratio_nearest_one_half(evaluations):
    summaries = summarize(evaluations)
    assert reference_point(summaries) == "ratio 0.50"
    assert {summary.point for summary in at_reference(summaries)} == {"", "ratio 0.50"}
    thresholds = [summary for summary in summaries if summary.point in ("", "threshold .5")]
    assert reference_point(thresholds) == "threshold .5"
    assert reference_point([summary for summary in summaries if summary.routing == "dense"]) == ""
    alone = [s for s in summaries if s.model == "qtale" or s.point != "ratio 0.50"]
    assert reference_point(alone) == "ratio 0.60"


def test_histograms_add_up_also_over_different_edges():
    first = Histogram(edges=(0.0, 1.0, 2.0), counts=(1, 3))
    assert merge_histograms([]) is None
    assert merge_histograms([first, first]) == Histogram(edges=first.edges, counts=(2, 6))
    wider = Histogram(edges=(0.0, 2.0, 4.0), counts=(4, 2))
    merged = merge_histograms([first, wider])
    assert merged is not None and merged.edges == (0.0, 2.0, 4.0)
    assert merged.counts == pytest.approx((8.0, 2.0))


def test_thresholds_are_read_from_points():
    assert [threshold_of(point) for point in ("threshold 0.10", "threshold .5", "ratio 0.50", "quality", "")] == [
        0.1,
        0.5,
        None,
        None,
        None,
    ]


def test_theta_series_need_three_thetas_at_full_precision(study):
    summaries = summarize(study)
    found = theta_series(summaries)
    assert {model: list(series) for model, series in found.items()} == {
        model: [0.1, 0.3, 0.5] for model in ("dllm", "qtale", "qtale_plus")
    }
    assert theta_series([summary for summary in summaries if summary.point != "threshold 0.30"]) == {}


def test_families_are_names_with_several_values(study):
    assert [swept(model) for model in ("qtale@0.03", "a@b@1e-2", "qtale", "qtale@x")] == [
        ("qtale", 0.03),
        ("a@b", 0.01),
        None,
        None,
    ]
    summaries = summarize(study)
    assert families(summaries) == {"qtale": {"qtale@0.03": 0.03, "qtale@0.1": 0.1, "qtale@0.3": 0.3}}
    assert families([summary for summary in summaries if summary.model not in ("qtale@0.1", "qtale@0.3")]) == {}


def test_dense_does_not_mean_all_layers(study):
    whole = {summary.model: runs_all_layers(summary) for summary in summarize(study) if summary.format.bits == 16}
    assert [model for model, all_layers in whole.items() if all_layers] == ["dense", "dense_qat"]
