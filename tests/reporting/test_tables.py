"""What the tables say."""

import dataclasses

import pytest

from qtale_jax.reporting import tables
from qtale_jax.reporting.aggregate import Estimate, Format, Summary, summarize
from qtale_jax.reporting.labels import (
    ACCURACY,
    NATS,
    OTHERS,
    count_text,
    format_label,
    looks,
    place_label,
    point_label,
)
from qtale_jax.reporting.results import read_evaluations

SUMMARY = Summary(
    model="x",
    routing="qtale",
    format=Format("none", 16, None),
    point="",
    seeds=(0,),
    theta=None,
    executed_ratio=Estimate(1.0, None, 1),
    accuracy={},
    nats_per_token=Estimate(1.0, None, 1),
    weight_bytes=1.0,
    flops_per_token=1.0,
    parts={},
    executed_per_layer=(),
    executed_ratio_scored=None,
    logit_gap=None,
    flip_rate=None,
    histogram=None,
    evaluations=(),
)


@pytest.fixture(scope="module")
def summaries(experiment):
    return summarize(read_evaluations(experiment / "evaluation"))


def _find(summaries, model, bits, point):
    return next(s for s in summaries if (s.model, s.format.bits, s.point) == (model, bits, point))


def test_quality_is_written_at_its_measured_ratio(summaries):
    table = tables.quality_table(summaries, ACCURACY)
    assert table.headers == ("method", "θ set for", "fp", "4-bit", "3-bit", "2-bit")
    assert [str(cell) for row in table.rows for cell in row[:2]][:6] == [
        "Dense",
        "all layers",
        "D-LLM",
        "θ = 0.5",
        "QTALE",
        "θ = 0.5",
    ]
    summary = _find(summaries, "qtale", 3, "ratio 0.60")
    accuracy = summary.accuracy["mean"]
    expected = f"{100 * accuracy.mean:.1f} ± {100 * accuracy.error:.1f} @ {summary.executed_ratio.mean:.2f}"
    row = next(row for row in table.rows if (row[0].text, row[1].text) == ("QTALE", "ratio 0.60"))
    assert str(row[4]) == expected
    assert table.breaks == {1, 3, 5, 7}
    assert "3 seeds" in table.note and "(Dense)" in table.note


def test_where_accuracy_is_null_nats_stand_in(summaries):
    mixed = [*summaries[:-1], dataclasses.replace(summaries[-1], accuracy={})]
    table = tables.quality_table(mixed, ACCURACY)
    assert str(table.rows[-1][-1]).startswith(f"{NATS.text(NATS.of(mixed[-1]))} nats per token @ ")


def test_a_text_experiment_has_one_table_in_nats(text_experiment):
    found = summarize(read_evaluations(text_experiment / "evaluation"))
    (table,) = tables.quality_tables(found)
    assert table.title == "Nats per token @ executed ratio"
    assert str(table.rows[0][2]) == f"{NATS.of(found[0]).mean:.4f} ± 0.0045 @ 1.00"
    assert tables.task_table(found) is None
    assert "One seed" in table.note


def test_a_missing_combination_is_a_dash(summaries):
    table = tables.quality_table([s for s in summaries if s.routing == "dense" or s.format.bits != 3], NATS)
    assert [row[4].text for row in table.rows[1:]] == ["–"] * (len(table.rows) - 1)


def test_routing_names_every_format_and_number(summaries):
    table = tables.routing_table(summaries)
    assert len(table.rows) == 32
    assert [row[0].text for row in table.rows[::8]] == ["fp", "4-bit", "3-bit", "2-bit"]
    summary = _find(summaries, "dllm", 2, "ratio 0.70")
    row = [row for row in table.rows if row[0].text == "2-bit" and row[1].text == "D-LLM"][-1]
    assert row[3].text == f"{summary.theta.mean:.3f}"
    assert row[4].text.startswith(f"{summary.executed_ratio.mean:.3f} ± ")
    assert row[5].text.startswith(f"{summary.executed_ratio_scored.mean:.3f} ± ")
    assert row[6].text.startswith(f"{summary.logit_gap.mean:.2f} ± ")
    assert row[7].text.startswith(f"{summary.flip_rate.mean:.3f} ± ")


def test_tasks_are_in_percent_with_the_mean_last(summaries):
    table = tables.task_table(summaries)
    assert table is not None
    assert table.headers[-1] == "mean" and "sort" in table.headers
    summary = _find(summaries, "dllm", 2, "ratio 0.70")
    row = [row for row in table.rows if row[0].text == "2-bit" and row[1].text == "D-LLM"][-1]
    assert row[table.headers.index("sort")].text == f"{100 * summary.accuracy['sort'].mean:.1f}"
    assert row[-1].text == f"{100 * summary.accuracy['mean'].mean:.1f}"


def test_bytes_add_up_and_absent_parts_are_dashes(summaries):
    table = tables.bytes_table(summaries)
    assert table.title == "Weights, MB" and len(table.rows) == 12
    for row in table.rows:
        parts = [0.0 if cell.text == "–" else float(cell.text) for cell in row[2:]]
        assert sum(parts[:-1]) == pytest.approx(parts[-1], abs=0.003)
    dense = table.rows[0]
    assert dense[table.headers.index("routers")].text == "–"


def test_flops_are_relative_to_the_dense_model(summaries):
    table = tables.flops_table(summaries)
    assert str(table.rows[0][2]) == "681 k × 1.00"
    summary = _find(summaries, "dllm", 16, "threshold .5")
    assert table.rows[1][2].detail == f"× {summary.flops_per_token / summaries[0].flops_per_token:.2f}"
    routed = tables.flops_table([s for s in summaries if s.routing != "dense"])
    assert routed.rows[0][2].detail == ""


def test_notes_say_what_the_error_is(summaries):
    routed = [s for s in summaries if s.routing != "dense"]
    assert tables.error_note(routed) == "± is the standard error of the mean over 3 seeds."
    uneven = [*routed, dataclasses.replace(routed[0], seeds=(0, 1))]
    assert tables.error_note(uneven, "A whisker") == "A whisker is the standard error of the mean over up to 3 seeds."


def test_labels():
    eight, four, fine = Format("rtn", 8, -1), Format("rtn", 4, -1), Format("rtn", 4, 32)
    assert format_label(Format("none", 16, None)) == "fp"
    assert [format_label(each, [eight, four, fine]) for each in (eight, four, fine)] == [
        "8-bit",
        "4-bit per channel",
        "4-bit g32",
    ]
    assert format_label(four, [four, Format("gptq", 4, -1)]) == "4-bit rtn"
    assert [point_label(point) for point in ("threshold .5", "ratio 0.50", "")] == [
        "θ = 0.5",
        "ratio 0.50",
        "all layers",
    ]
    assert [count_text(value) for value in (12.0, 1234.0, 6.6e9)] == ["12", "1.23 k", "6.6 G"]
    assert NATS.text(Estimate(1.40864, None, 1)) == "1.4086"
    with pytest.raises(KeyError):
        ACCURACY.of(dataclasses.replace(SUMMARY, accuracy={}))


def test_every_model_has_its_own_look():
    named = [dataclasses.replace(SUMMARY, model=model) for model in ("qtale", "qtale-strong", "qtale-weak", "other")]
    found = looks([*named, dataclasses.replace(SUMMARY, model="only", routing="dllm")])
    assert len({look.index for look in found.values()}) == 5
    assert found["qtale"].index == 2 and found["only"].index == 1
    assert found["qtale-strong"].label == "qtale-strong"


@pytest.fixture(scope="module")
def many(study):
    return summarize(study)


def test_five_routings_and_many_models_get_looks_and_the_rest_is_grey(many):
    found = looks(many)
    assert list(found)[:4] == ["dense", "dense_qat", "drop_even", "drop_influence"]
    firsts = [found[model] for model in ("dense", "dllm", "qtale", "mod", "random")]
    assert [look.index for look in firsts] == [0, 1, 2, 3, 4]
    assert [look.label for look in firsts] == ["Dense", "D-LLM", "QTALE", "MoD", "Random"]
    coloured = [model for model, look in found.items() if look.index != OTHERS]
    assert len(coloured) == len({found[model].index for model in coloured}) == 8
    assert {"dense_qat", "dllm_55", "qtale_plus"} <= set(coloured)  # the second of each routing, no sweep
    grey = [look for look in found.values() if look.index == OTHERS]
    assert len({look.marker for look in grey}) == len(grey) == 7


def test_a_model_without_some_layers_is_not_said_to_run_all(many):
    places = {summary.model: place_label(summary) for summary in many if summary.routing == "dense"}
    assert places == {
        "dense": "all layers",
        "dense_qat": "all layers",
        "drop_even": "fixed layers",
        "drop_influence": "fixed layers",
    }
    shown = {row[0].text: row[1].text for row in tables.quality_table(many, ACCURACY).rows[:4]}
    assert shown["Dense"] == "all layers" and shown["drop_even"] == "fixed layers"


def test_reach_is_the_ratio_at_both_ends_and_their_difference(many, summaries):
    table = tables.reach_table(many)
    assert [row[0].text for row in table.rows] == ["D-LLM", "QTALE", "qtale_plus"]
    row = table.rows[1]
    low, high = (_find(many, "qtale", 16, point).executed_ratio for point in ("threshold 0.10", "threshold 0.50"))
    assert [row[1].text, row[3].text] == ["0.1", "0.5"]
    assert row[2].text.startswith(f"{low.mean:.3f} ± ") and row[4].text.startswith(f"{high.mean:.3f} ± ")
    assert row[5].text.startswith(f"{low.mean - high.mean:.3f} ± ")
    assert tables.reach_table(summaries) is None  # one threshold


def test_all_tables_have_the_new_ones_only_where_they_say_something(many, summaries, text_experiment):
    titles = [table.title for table in tables.all_tables(many)]
    gains = [f"Gain over {name}: accuracy, points" for name in ("Dense", "dense_qat", "D-LLM")]
    assert titles[2] == "The paper's claims" and titles[3:6] == gains and "Reach of θ" in titles
    assert "Reach of θ" not in [table.title for table in tables.all_tables(summaries)]
    single = summarize(read_evaluations(text_experiment / "evaluation"))
    assert not [table for table in tables.all_tables(single) if table.title.startswith("Gain")]


def test_gains_over_a_dense_model_stand_at_every_ratio(many):
    table = tables.paired_table(many, ACCURACY, "dense")
    assert table.headers == ("method", "at", "fp", "4-bit", "3-bit", "2-bit")
    assert {row[1].text for row in table.rows} == {"all layers", "fixed layers", "ratio 0.50", "ratio 0.70"}
    row = next(row for row in table.rows if (row[0].text, row[1].text) == ("D-LLM", "ratio 0.50"))
    gain = 100 * (_find(many, "dllm", 2, "ratio 0.50").accuracy["mean"].mean - many[3].accuracy["mean"].mean)
    assert row[-1].text == f"{gain:+.1f}".replace("-", "−") and row[-1].detail.startswith("[−")
    assert "over 3 seeds" in table.note and "Dense is one model" in table.note and "differ" not in table.note


def test_gains_over_a_routed_model_are_at_equal_ratio(many):
    table = tables.paired_table(many, ACCURACY, "dllm")
    shown = {(row[0].text, row[1].text) for row in table.rows}
    assert ("drop_even", "ratio 0.50") in shown and ("drop_even", "ratio 0.70") not in shown
    assert not {"Dense", "dense_qat", "D-LLM"} & {name for name, _ in shown}
    assert "by no more than 0.02" in table.note and "one model" not in table.note


def test_no_gains_where_nothing_is_left(many):
    dense = [summary for summary in many if summary.model in ("dense", "dllm")]
    assert tables.paired_table(dense, ACCURACY, "dllm") is None
    assert tables.paired_table(many, ACCURACY, "dllm_none") is None
