"""What notebooks show: whole HTML that loads nothing, escapes text, and leaves colours to the theme."""

import re
import xml.etree.ElementTree as ElementTree

import pytest

import qtale_jax
from qtale_jax.errors import InputError
from qtale_jax.reporting.execution_map import MOST_TOKENS
from qtale_jax.reporting.labels import INK, PAPER
from qtale_jax.reporting.notebook import facts_html, routing_html, tables_html
from qtale_jax.reporting.results import ExecutionMap

TOKENS = ("<s>", "the", "cat & co", "\n")


@pytest.fixture
def example():
    """Four tokens, three layers, two of them routed."""
    probability = [[0.9, 0.2], [0.51, 0.49], [0.125, 0.875], [1.0, 0.0]]
    execute = [[True, p >= 0.5, q >= 0.5] for p, q in probability]
    content = {"tokens": TOKENS, "execute": execute, "probability": probability, "always_on_layers": 1}
    return ExecutionMap.model_validate(content)


def parsed(html: str) -> ElementTree.Element:
    """The HTML as a tree: it is well-formed, loads nothing, and fixes neither ink nor paper."""
    root = ElementTree.fromstring(html)
    tags = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert not tags & {"script", "link", "iframe", "img", "object"}
    assert set(re.findall(r"https?://[^\"'\s)]+", html)) <= {"http://www.w3.org/2000/svg"}
    assert "--ink:currentColor" in html
    assert INK not in re.sub(r"var\(--ink, #\w+\)", "", html) and PAPER not in html
    return root


def test_every_square_tells_its_probability(example):
    root = parsed(routing_html(example))
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 4 * 3
    assert "layer 1, “cat & co”: skipped, p(execute) = 0.125" in titles
    assert "layer 2, “cat & co”: executed, p(execute) = 0.875" in titles
    assert sum(title.endswith("always on, no router") for title in titles if title) == 4
    assert "66.7 % of 4 tokens × 3 layers executed" in "".join(root.itertext())


def test_two_maps_on_one_page_share_no_ids(example):
    other = example.model_copy(update={"tokens": (*TOKENS[:3], "dog")})
    ids = [set(re.findall(r'\bid="([^"]+)"', routing_html(each))) for each in (example, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_long_texts_say_that_they_are_cut(example):
    count = MOST_TOKENS + 1
    content = {"tokens": ("a",) * count, "execute": ((True,),) * count, "probability": ((),) * count}
    long = ExecutionMap.model_validate({**content, "always_on_layers": 1})
    assert f"The first {MOST_TOKENS} tokens are drawn." in routing_html(long)
    assert "are drawn" not in routing_html(example)


def test_facts_are_escaped():
    root = parsed(facts_html("<b>", {"a&b": "<script>"}))
    assert [element.text for element in root.iter("td")] == ["<script>"]
    assert [element.text for element in root.iter("th")] == ["a&b"]


def test_results_show_the_quality_table(experiment):
    found = qtale_jax.results(experiment)
    assert len(found.rows) == len(found.evaluations) == 100
    root = parsed(found._repr_html_())
    text = "".join(root.itertext())
    for row in found.tables[0].rows:
        assert all(cell.text in text for cell in row)
    assert repr(found).startswith("## Accuracy, % @ executed ratio")
    assert tables_html(found.tables) == found._repr_html_()


def test_models_of_several_experiments_stay_apart(experiment, text_experiment):
    found = qtale_jax.results(experiment, text_experiment)
    assert {row.model for row in found.rows} >= {"run/qtale", "text/qtale", "text/dense"}
    assert len(found.rows) == 136
    with pytest.raises(InputError, match="no evaluation found"):
        qtale_jax.results(experiment / "nowhere")
