"""The plots: valid SVG that says what the summaries say, one look per model, nothing from outside."""

import dataclasses
import re
import xml.etree.ElementTree as ElementTree

import pytest

from qtale_jax.reporting import plots
from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.execution_map import MOST_TOKENS, execution_map
from qtale_jax.reporting.labels import ACCURACY, NATS, OTHERS, SERIES
from qtale_jax.reporting.logs import TrainingRun, read_training
from qtale_jax.reporting.results import ExecutionMap, read_evaluations

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def summaries(experiment):
    return summarize(read_evaluations(experiment / "evaluation"))


def _title(found: ElementTree.Element) -> str:
    return found.findtext(f"{SVG}title", "")


def _texts(svg: str) -> list[str]:
    return ["".join(found.itertext()) for found in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def _check(plot: plots.Plot | None, panels: int, labels: tuple[str, ...]) -> plots.Plot:
    assert plot is not None
    assert len(plot.panels) == panels
    assert tuple(look.label for look in plot.legend) == labels
    ids: list[str] = []
    for svg in plot.panels:
        root = ElementTree.fromstring(svg)
        assert root.tag == f"{SVG}svg" and root.get("role") == "img" and root.get("viewBox")
        ids += [found.get("id", "") for found in root.iter() if found.get("id")]
        assert "<image" not in svg and "<script" not in svg
        assert set(re.findall(r"https?://[^\"' ]+", svg)) <= {
            "http://www.w3.org/2000/svg",
            "http://www.w3.org/1999/xlink",
        }
        used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
        assert used <= set(ids)
    assert len(ids) == len(set(ids))
    return plot


@pytest.mark.parametrize("metric", [ACCURACY, NATS])
def test_quality_by_ratio_has_one_panel_per_format_on_the_same_axes(summaries, metric):
    plot = _check(plots.quality_by_ratio(summaries, metric), 4, ("Dense", "D-LLM", "QTALE"))
    texts = [_texts(svg) for svg in plot.panels]
    titles = ("fp", "4-bit", "3-bit", "2-bit")
    assert all(title in found for title, found in zip(titles, texts, strict=True))
    assert all(metric.axis in found and "executed ratio" in found for found in texts)
    ticks = {tuple(text for text in found if text not in titles) for found in texts}
    assert len(ticks) == 1


def test_colours_of_the_series_are_variables_with_a_fallback(summaries):
    svg = plots.quality_by_ratio(summaries, ACCURACY).panels[0]
    for index in range(3):
        assert f"var(--series-{index}, {SERIES[index][0]})" in svg
    assert "var(--series-3" not in svg


def test_many_models_get_large_panels_with_an_axis_each_and_grey_lines(study):
    many = summarize(study)
    plot = plots.quality_by_ratio(many, ACCURACY)
    assert plot.wide and len(plot.panels) == 4 and len(plot.legend) == 15
    assert f"var(--series-{OTHERS}, {SERIES[OTHERS][0]})" in plot.panels[0]
    assert len({tuple(text for text in _texts(svg) if text.replace(".", "").isdigit()) for svg in plot.panels}) > 1
    assert "1.00" not in _texts(plot.panels[1])  # dense models are lines, and need no room at ratio 1
    few = [summary for summary in many if summary.model in ("dense", "drop_even", "qtale")]
    assert not plots.crowded(few) and not plots.quality_by_ratio(few, ACCURACY).wide


def _lines(svg: str, colour: int) -> list[list[float]]:
    """The x of the points of every line of some length in a colour."""
    drawn = re.findall(rf'<path d="([^"]+)"[^>]*stroke: var\(--series-{colour}, [^>]*>', svg)
    points = [[float(x) for x in re.findall(r"[ML] ([\d.]+) ", path)] for path in drawn]
    return [line for line in points if len(line) > 2]


def test_points_of_a_model_are_joined_by_ratio_with_whiskers_both_ways(study):
    few = [s for s in summarize(study) if s.model == "qtale" and s.format.bits == 16]
    (svg,) = plots.quality_by_ratio(few, ACCURACY).panels
    (line,) = _lines(svg, 2)
    assert len(line) == 5 and line == sorted(line)
    whiskers = re.findall(r"M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n\"[^>]*series-2", svg)
    across = [each for each in whiskers if each[1] == each[3] and each[0] != each[2]]
    upright = [each for each in whiskers if each[0] == each[2] and each[1] != each[3]]
    assert len(across) == len(upright) == 5


def test_a_model_without_some_layers_has_no_level_across_the_panel(study):
    many = summarize(study)
    dotted = [
        plots.quality_by_ratio([s for s in many if s.model == model], ACCURACY).panels[0].count("stroke-dasharray")
        for model in ("dense", "drop_even")
    ]
    assert dotted[0] > dotted[1]


def test_reach_shows_models_with_several_thetas(study, summaries):
    plot = _check(plots.threshold_reach(summarize(study)), 1, ("D-LLM", "QTALE", "qtale_plus"))
    assert plot.wide and {"θ, the same in all layers", "executed ratio", "0.50"} <= set(_texts(plot.panels[0]))
    assert plots.threshold_reach(summaries) is None


def test_a_sweep_has_one_panel_per_measure_and_format(study, summaries):
    plot = _check(plots.sweep(summarize(study)), 12, ("QTALE",))
    texts = [_texts(svg) for svg in plot.panels]
    assert all({"0.03", "0.1", "0.3"} <= set(found) for found in texts)
    assert [found[-1] for found in texts[:4]] == ["fp", "4-bit", "3-bit", "2-bit"]
    for number, label in enumerate(("accuracy, %", "mean |logit gap|", "flip rate")):
        assert all(label in found for found in texts[4 * number : 4 * number + 4])
    assert plots.sweep(summaries) is None


def test_a_sweep_leaves_out_what_was_not_measured_and_has_room_for_zero(study):
    some = [
        dataclasses.replace(s, model=s.model.replace("@0.1", "@0"), flip_rate=None)
        for s in summarize(study)
        if s.format.bits == 4 and not s.model.endswith("@0.3")
    ]
    plot = _check(plots.sweep(some), 2, ("QTALE",))
    assert {"0", "0.03"} <= set(_texts(plot.panels[0]))
    assert plots.sweep([s for s in some if s.model != "qtale@0"]) is None


def test_quality_by_bytes_writes_the_bits_into_the_markers(summaries):
    plot = _check(plots.quality_by_bytes(summaries, ACCURACY), 1, ("Dense", "D-LLM", "QTALE"))
    texts = _texts(plot.panels[0])
    assert {"fp", "4", "3", "2", "weights, MB", "ratio 0.50"} <= set(texts)


def test_gap_histograms_compare_the_routed_models(summaries):
    plot = _check(plots.gap_histograms(summaries), 4, ("D-LLM", "QTALE"))
    assert "logit gap, execute − skip" in _texts(plot.panels[0])
    assert plots.gap_histograms([dataclasses.replace(s, histogram=None) for s in summaries]) is None


def test_layer_shares_name_every_layer(summaries):
    plot = _check(plots.layer_shares(summaries), 4, ("D-LLM", "QTALE"))
    assert {str(layer) for layer in range(10)} <= set(_texts(plot.panels[0]))
    assert plots.layer_shares([s for s in summaries if s.routing == "dense"]) is None


def test_training_curves_tell_base_from_routed_runs(experiment, summaries):
    runs = read_training(experiment, {"dense", "dllm", "qtale"})
    plot = _check(plots.training_curves(runs, summaries), 5, ("Dense", "D-LLM", "QTALE"))
    assert [_texts(svg)[-1] for svg in plot.panels] == [
        "Cross-entropy, dense",
        "Cross-entropy",
        "Executed ratio",
        "Flip rate",
        "Median logit gap",
    ]
    assert plots.training_curves([], summaries) is None
    one = TrainingRun("elsewhere", None, {"cross_entropy": ((1, 2.0), (2, 1.0)), "flip_rate": ((1, 0.1),)})
    _check(plots.training_curves([one], summaries), 1, ("elsewhere",))


def test_one_seed_without_errors_draws(text_experiment):
    summaries = summarize(read_evaluations(text_experiment / "evaluation"))
    _check(plots.quality_by_ratio(summaries, NATS), 4, ("Dense", "D-LLM", "QTALE"))
    _check(plots.quality_by_ratio(summaries[:1], NATS), 1, ("Dense",))


def test_plots_are_reproducible(summaries):
    assert plots.gap_histograms(summaries) == plots.gap_histograms(summaries)


@pytest.fixture
def example():
    return ExecutionMap(
        tokens=("<s>", 'a"b', "", "tomorrow & after"),
        execute=((True, True, True), (True, False, True), (True, True, False), (True, False, False)),
        probability=((0.1, 0.2), (0.25, 0.875), (0.5, 0.0), (0.125, 0.375)),
        always_on_layers=1,
        task="sort",
    )


def test_the_map_shows_every_square_and_its_probability(example):
    root = ElementTree.fromstring(execution_map(example, "m", 2))
    squares = list(filter(_title, root.iter(f"{SVG}rect")))
    titles = list(map(_title, squares))
    assert len(titles) == 4 * 3
    assert "layer 0, “<s>”: always on, no router" in titles
    assert 'layer 1, “a"b”: skipped, p(execute) = 0.250' in titles
    assert 'layer 2, “a"b”: executed, p(execute) = 0.875' in titles
    assert sum("executed" in title for title in titles) == 4
    filled = [found for found in squares if "fill-opacity" in found.get("style", "")]
    assert len(filled) == 4
    shades = {_title(found): found.get("style", "") for found in filled}
    assert shades['layer 2, “a"b”: executed, p(execute) = 0.875'].endswith("fill-opacity: 0.90")
    hatched = [found for found in squares if found.get("fill") == "url(#m-hatch)"]
    assert len(hatched) == 4


def test_layer_zero_is_at_the_bottom_and_words_stand_below(example):
    root = ElementTree.fromstring(execution_map(example, "m", 2))
    squares = filter(_title, root.iter(f"{SVG}rect"))
    heights = {_title(found).partition(",")[0]: float(found.get("y", "nan")) for found in squares}
    assert heights["layer 0"] > heights["layer 1"] > heights["layer 2"]
    texts = [found.text for found in root.iter(f"{SVG}text")]
    assert texts == ["<s>", 'a"b', "∅", "tomorrow␣&␣…", "0", "1", "2", "layer"]


def test_long_examples_are_cut(example):
    tokens, execute, probability = (field * 30 for field in (example.tokens, example.execute, example.probability))
    long = ExecutionMap(tokens=tokens, execute=execute, probability=probability, always_on_layers=1)
    root = ElementTree.fromstring(execution_map(long, "m", 1))
    assert sum(map(bool, map(_title, root.iter(f"{SVG}rect")))) == MOST_TOKENS * 3
    assert long.executed_ratio == pytest.approx(8 / 12)
