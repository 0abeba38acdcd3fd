"""The page: one whole HTML document that loads nothing, with everything escaped."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.logs import read_training
from qtale_jax.reporting.page import Making, build_page
from qtale_jax.reporting.results import read_evaluations
from qtale_jax.reporting.tables import all_tables

MAKING = Making(
    "python -m qtale_jax.experiment a.yaml", "seed: 3\n", "seed: 3\noutput: runs\n", {"Python": "3.12 <test>"}
)
VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = {"src", "srcset", "poster", "data", "action"}


class _Reader(HTMLParser):
    """Checks nesting, collects text, ids, links and what would be loaded."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text = [], [], [], [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            assert name not in LOADING and not name.startswith("on")
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def summaries(experiment):
    return summarize(read_evaluations(experiment / "evaluation"))


@pytest.fixture(scope="module")
def page(experiment, summaries):
    return build_page("Seven tasks", summaries, read_training(experiment, {"dllm", "qtale"}), MAKING)


def test_the_page_is_whole_and_loads_nothing(page):
    read = _Reader(page)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(read.tags)
    assert all(link.startswith("#") for link in read.links)
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert len(read.ids) == len(set(read.ids))
    assert set(re.findall(r"https?://[^\"'\s)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_the_page_has_every_section_table_and_number(page, summaries):
    read = _Reader(page)
    text = " ".join("".join(read.text).split())
    headings = ["Results", "Quality against executed ratio", "Accuracy per task", "Routing"]
    for heading in [*headings, "Which layers run for which token", "Bytes and FLOPs", "Training", "How this was made"]:
        assert heading in text
    for table in all_tables(summaries):
        for row in table.rows:
            assert all(cell.text in text for cell in row)
    assert "python -m qtale_jax.experiment a.yaml" in text and "3.12 <test>" in text
    assert "Dense, D-LLM, QTALE at fp, 4-bit, 3-bit, 2-bit: 100 evaluations, 3 seeds." in text
    assert read.tags.count("figcaption") == 6
    assert "prefers-color-scheme:dark" in page and "width=device-width" in page


def test_maps_of_first_and_last_format_stand_side_by_side(page):
    assert page.count('<div class="map">') == 2 * 4 * 2
    assert page.count('<figure class="maps">') == 2 * 4
    assert "always on, no router" in page


def test_text_is_escaped(summaries):
    evil = "<script>alert('&')</script>"
    hostile = [dataclasses.replace(s, model=evil) if s.model == "qtale" else s for s in summaries]
    page = build_page(evil, hostile, [], Making(evil, evil, evil, {evil: evil}))
    read = _Reader(page)
    assert "script" not in read.tags
    assert evil in "".join(read.text)


def test_a_dense_experiment_has_no_routing(summaries):
    read = _Reader(build_page("Dense", [s for s in summaries if s.routing == "dense"], [], MAKING))
    assert not {"routing", "maps", "training"} & set(read.ids)
    assert {"results", "ratio", "tasks", "cost", "making"} <= set(read.ids)


def test_nats_only(text_experiment):
    read = _Reader(build_page("Text", summarize(read_evaluations(text_experiment / "evaluation")), [], MAKING))
    text = "".join(read.text)
    assert "tasks" not in read.ids and "Lower is better" in text and "Higher" not in text
    assert "36 evaluations, 1 seed." in text


def test_what_is_not_changed_is_not_shown(summaries):
    page = build_page("Dense", summaries[:1], [], dataclasses.replace(MAKING, changed=""))
    assert "<h3>Configuration</h3>" not in page and "1 evaluation, 1 seed." in page


@pytest.mark.slow
def test_a_study_has_sections_of_gains_reach_and_sweeps(study):
    found = summarize(study)
    read = _Reader(build_page("Study", found, [], MAKING))
    text = " ".join("".join(read.text).split())
    assert {"paired", "reach", "sweep"} <= set(read.ids) and len(read.ids) == len(set(read.ids))
    for table in all_tables(found):
        assert table.note in text
        assert all(f"{cell.text} {cell.detail}".strip() in text for row in table.rows for cell in row)
    assert "QTALE at 0.03, 0.1, 0.3" in text and "Every panel has its own quality axis." in text


@pytest.mark.slow
def test_absent_sections_are_left_out(summaries, text_experiment):
    ids = _Reader(build_page("Tasks", summaries, [], MAKING)).ids
    assert "paired" in ids and not {"reach", "sweep"} & set(ids)
    single = summarize(read_evaluations(text_experiment / "evaluation"))
    assert not {"paired", "reach", "sweep"} & set(_Reader(build_page("Text", single, [], MAKING)).ids)
