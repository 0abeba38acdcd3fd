"""Paired differences: which rows stand against each other, the sign, and the interval worked out by hand."""

import dataclasses
import json
import math

import pytest

from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.labels import ACCURACY, NATS
from qtale_jax.reporting.paired import (
    adjusted,
    against,
    all_differences,
    base_model,
    references,
    several_seeds,
    t_interval,
    write_differences,
)
from qtale_jax.reporting.results import Evaluation


def _evaluation(model, seed, accuracy, routing="qtale", ratio=0.5, point="ratio 0.50", bits=16, nats=1.0):
    row = {
        "model": model,
        "routing": routing,
        "quantizer": "none" if bits == 16 else "rtn",
        "bits": bits,
        "group_size": None,
        "theta": None if routing == "dense" else 0.5,
        "executed_ratio": ratio,
        "accuracy": None if accuracy is None else {"mean": accuracy},
        "standard_error": None,
        "nats_per_token": nats,
        "weight_bytes": 1,
        "flops_per_token": 1,
        "seed": seed,
    }
    return Evaluation.model_validate({"row": row, "point": "" if routing == "dense" else point})


def _dense(model, seed, accuracy, ratio=1.0, **settings):
    return _evaluation(model, seed, accuracy, routing="dense", ratio=ratio, **settings)


def _seeds(model, accuracies, **settings):
    return [_evaluation(model, seed, accuracy, **settings) for seed, accuracy in enumerate(accuracies)]


def test_the_interval_of_one_two_and_three_points():
    # Mean 2, deviation 1, standard error 1/√3 = 0.57735. Student's t with two degrees of freedom at 97.5 % is 4.30265,
    # so the interval is 2 ± 2.48414. Its t is 2√3 = 3.46410, and with two degrees p = 1 - t / √(t² + 2) = 0.07418.
    summaries = summarize(_seeds("dllm", (0.80, 0.70, 0.60), routing="dllm") + _seeds("qtale", (0.81, 0.72, 0.63)))
    (found,) = against(summaries, ACCURACY, "dllm")
    assert (found.model, found.reference, found.point, found.seeds) == ("qtale", "dllm", "ratio 0.50", (0, 1, 2))
    assert found.values == pytest.approx((1.0, 2.0, 3.0))
    assert found.mean == pytest.approx(2.0) and found.error == pytest.approx(0.57735, abs=1e-5)
    assert found.low == pytest.approx(-0.48414, abs=1e-5) and found.high == pytest.approx(4.48414, abs=1e-5)
    assert found.p == pytest.approx(0.07418, abs=1e-5)
    assert found.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))


def test_two_seeds_have_the_wide_interval_of_one_degree_of_freedom():
    low, high, p = t_interval((1.0, 3.0))
    # t with one degree is 12.7062; p = 1 - 2/π arctan(t), with t = 2 / 1.
    assert (low, high) == pytest.approx((2 - 12.7062, 2 + 12.7062), abs=1e-4)
    assert p == pytest.approx(1 - 2 / math.pi * math.atan(2))


def test_positive_is_better_in_points_and_in_nats():
    worse, better = _seeds("dllm", (0.5, 0.5), routing="dllm", nats=1.5), _seeds("qtale", (0.6, 0.6), nats=1.25)
    summaries = summarize(worse + better)
    assert [found.mean for found in against(summaries, ACCURACY, "dllm")] == [pytest.approx(10.0)]
    assert [found.mean for found in against(summaries, NATS, "dllm")] == [pytest.approx(0.25)]
    assert [found.mean for found in against(summaries, NATS, "qtale")] == [pytest.approx(-0.25)]


def test_equal_differences_of_unequal_numbers_have_no_error_and_no_test():
    summaries = summarize(_seeds("dllm", (0.7, 0.8, 0.3), routing="dllm") + _seeds("qtale", (0.8, 0.9, 0.4)))
    (found,) = against(summaries, ACCURACY, "dllm")
    assert found.error == 0.0 and found.low == found.high == found.mean == pytest.approx(10.0) and found.p is None


def test_one_pair_has_no_interval():
    (found,) = against(
        summarize(_seeds("dllm", (0.5,), routing="dllm") + _seeds("qtale", (0.6, 0.7))), ACCURACY, "dllm"
    )
    assert found.seeds == (0,) and found.mean == pytest.approx(10.0)
    assert (found.error, found.low, found.high, found.p) == (None, None, None, None)


def test_only_shared_seeds_points_and_formats_are_paired():
    other = [_evaluation("dllm", seed, 0.5, routing="dllm") for seed in (1, 2, 7)]
    mine = [*_seeds("qtale", (0.6, 0.7, 0.9)), *_seeds("qtale", (0.9, 0.9), point="ratio 0.60")]
    mine += _seeds("qtale", (0.9, 0.9), bits=4)
    (found,) = against(summarize(other + mine), ACCURACY, "dllm")
    assert found.seeds == (1, 2) and found.values == pytest.approx((20.0, 40.0))
    assert against(summarize([*_seeds("dllm", (None, None), routing="dllm"), *mine]), ACCURACY, "dllm") == []


def test_the_base_stands_against_every_seed_and_point():
    base = [_dense("dense", 0, 0.9)]
    routed = _seeds("qtale", (0.8, 0.85)) + _seeds("qtale", (0.9, 0.95), point="ratio 0.70", ratio=0.7)
    summaries = summarize(base + routed)
    found = against(summaries, ACCURACY, "dense")
    assert [(each.point, each.seeds) for each in found] == [("ratio 0.50", (0, 1)), ("ratio 0.70", (0, 1))]
    assert found[0].values == pytest.approx((-10.0, -5.0))
    (reverse, _) = against(summaries, ACCURACY, "qtale")
    assert reverse.model == "dense" and reverse.values == pytest.approx((10.0, 5.0))


def test_a_dense_model_with_seeds_is_paired_by_seed():
    dense = [_dense("dense", 0, 0.9), *(_dense("dense_qat", seed, 0.8 + 0.05 * seed) for seed in (0, 1))]
    summaries = summarize(dense + _seeds("qtale", (0.7, 0.7, 0.7)))
    qtale = next(each for each in against(summaries, ACCURACY, "dense_qat") if each.model == "qtale")
    assert qtale.seeds == (0, 1) and qtale.values == pytest.approx((-10.0, -15.0))
    unfinished = summarize([*dense[:2], *_seeds("qtale", (0.7, 0.7, 0.7))])
    qtale = next(each for each in against(unfinished, ACCURACY, "dense_qat") if each.model == "qtale")
    assert qtale.seeds == (0,)  # one seed of several is not the base


@pytest.mark.parametrize(("ratio", "equal"), [(0.5, True), (0.52, True), (0.48, True), (0.53, False)])
def test_ratios_are_equal_within_two_hundredths(ratio, equal):
    dropped = [_dense("drop_even", seed, 0.6, ratio=ratio) for seed in (0, 1)]
    (found,) = against(summarize(dropped + _seeds("dllm", (0.5, 0.5), routing="dllm")), ACCURACY, "dllm")
    assert found.equal_ratio is equal and (found.ratio, found.reference_ratio) == (ratio, 0.5)
    assert found.point == "ratio 0.50"  # a dense model has none of its own


def test_references_are_base_dense_qat_and_dllm_as_far_as_they_occur(study):
    summaries = summarize(study)
    assert references(summaries) == ["dense", "dense_qat", "dllm"] and base_model(summaries) == "dense"
    assert references([summary for summary in summaries if summary.model in ("drop_even", "qtale")]) == []
    assert base_model([summary for summary in summaries if summary.model != "dense"]) == "dense_qat"
    assert several_seeds(summaries) and not several_seeds(summaries[:1])


def test_all_pairs_are_written_once_and_read_as_json(tmp_path, study):
    summaries = [s for s in summarize(study) if s.model in ("dense", "dllm", "qtale") and s.format.bits == 4]
    found = all_differences(summaries)
    # Two measures, three pairs, two ratios.
    assert len(found) == 2 * 3 * 2
    write_differences(tmp_path / "paired.json", found)
    written = json.loads((tmp_path / "paired.json").read_text())
    keys = "metric model reference quantizer bits group_size point executed_ratio reference_ratio equal_ratio seeds"
    assert tuple(written[0]) == (
        *keys.split(),
        *["differences", "mean", "standard_error", "low", "high", "p_value", "p_adjusted"],
    )
    first = written[0]
    assert (first["model"], first["reference"], first["bits"], first["equal_ratio"]) == ("dllm", "dense", 4, False)
    assert (
        first["low"] < first["mean"] < first["high"] and 0 <= first["p_value"] <= 1 and len(first["differences"]) == 3
    )
    assert all(row["p_adjusted"] is None or row["p_value"] <= row["p_adjusted"] <= 1 for row in written)


def test_p_values_are_adjusted_within_their_family():
    """Benjamini & Hochberg by hand: the k-th smallest of n times n / k, no smaller one above a larger one."""
    summaries = summarize(_seeds("dllm", (0.80, 0.70, 0.60), routing="dllm") + _seeds("qtale", (0.81, 0.72, 0.63)))
    (one,) = against(summaries, ACCURACY, "dllm")
    found = adjusted([dataclasses.replace(one, p=p) for p in (0.04, None, 0.01, 0.03, 0.5)])
    assert found == [pytest.approx(0.04 * 4 / 3), None, pytest.approx(0.04), pytest.approx(0.04 * 4 / 3), 0.5]
    assert adjusted([dataclasses.replace(one, p=None)]) == [None]
