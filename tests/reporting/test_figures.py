"""Figures as files: the panels of the page, whole and in plain colours, beside their legend."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.drawings import Drawings
from qtale_jax.reporting.figures import all_figures, quality_figures, standalone
from qtale_jax.reporting.labels import Look
from qtale_jax.reporting.logs import read_training
from qtale_jax.reporting.panels import Plot, draw_panel
from qtale_jax.reporting.results import read_evaluations

SVG = "{http://www.w3.org/2000/svg}"


def _box(found: ElementTree.Element) -> tuple[float, float, float, float]:
    width, height = map(float, found.get("viewBox", "").split()[2:])
    x, y = float(found.get("x", 0)), float(found.get("y", 0))
    if "x" in found.attrib:  # one unit of the whole is one unit of a panel
        assert (found.get("width"), found.get("height")) == (f"{width:g}", f"{height:g}")
    return x, y, x + width, y + height


@pytest.mark.parametrize("count", [1, 4, 5])
def test_panels_lie_side_by_side_inside_the_figure_below_the_legend(count):
    panels = tuple(draw_panel(f"p{index}", "t", lambda axes: axes.plot([1, 2])) for index in range(count))
    looks = tuple(Look(f"a method with a long name, number {index}", index, "o") for index in range(6))
    root = ElementTree.fromstring(standalone(Plot(panels, looks), "R < 1"))
    assert root.findtext(f"{SVG}title") == "R < 1"
    boxes = [_box(found) for found in root.findall(f"{SVG}svg")]
    whole = _box(root)
    assert len(boxes) == count
    for index, (left, top, right, bottom) in enumerate(boxes):
        assert left >= 0 and right <= whole[2] and bottom <= whole[3]
        for other in boxes[:index]:
            assert left >= other[2] or right <= other[0] or top >= other[3] or bottom <= other[1]
    places = [re.findall(r"[\d.]+", found.get("transform", "")) for found in root.findall(f"{SVG}g")]
    assert len(places) == 6 and max(float(y) + 14 for _, y in places) <= min(box[1] for box in boxes)


def test_a_report_has_each_of_its_plots_as_a_file_that_needs_nothing_else(experiment):
    evaluations = read_evaluations(experiment / "evaluation")
    summaries = summarize(evaluations)
    found = all_figures(
        summaries, Drawings(summaries, read_training(experiment, {each.row.model for each in evaluations}))
    )
    assert list(quality_figures(summaries)) == ["accuracy_by_ratio.svg", "nats_by_ratio.svg"]
    assert set(found) >= {*quality_figures(summaries), "logit_gaps.svg", "layers.svg", "training.svg"}
    for svg in found.values():
        root = ElementTree.fromstring(svg)
        ids = [each.get("id") for each in root.iter() if each.get("id")]
        assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", svg)) <= set(ids)
        assert "var(" not in svg and "<image" not in svg
