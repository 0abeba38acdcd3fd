"""The schema itself: sane defaults, immutability, and a line of help for every key."""

import pytest
from pydantic import ValidationError

from qtale_jax.config.catalogue import allowed, find, names, sections, value_text
from qtale_jax.config.help import help_text
from qtale_jax.config.schema import Config, RoutingConfig


def test_defaults_are_valid_and_frozen():
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("method", "weight"), [("dense", 0.0), ("dllm", 0.0), ("qtale", 0.3), ("mod", 0.0), ("random", 0.0)]
)
def test_only_qtale_has_an_entropy_term(method, weight):
    assert RoutingConfig(method=method).effective_entropy_weight == weight


def test_every_key_has_a_description_a_type_and_a_place():
    listed = {key.name: key for _, _, keys in sections() for key in keys}
    assert len(listed) > 100
    for name, key in listed.items():
        assert key.description, name
        assert "None" not in key.type, name
        assert find(name.split(".")) is not None, name


def test_every_section_has_a_description():
    assert all(description for _, description, _ in sections())


def test_help_has_every_key_once_and_fits():
    for width in (60, 80, 140):
        lines = help_text(width).splitlines()
        heads = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
        assert sorted(heads) == sorted(key.name for _, _, keys in sections() for key in keys)
    assert max(map(len, help_text(140).splitlines())) <= 140


def test_help_shows_limits_choices_and_defaults():
    text = " ".join(help_text(140).split())
    assert "routing.method dense|dllm|qtale|mod|random = 'qtale'" in text
    assert "routing.target_range pair of number >= 0, <= 1 or null = null lowest and highest share" in text
    assert "train.steps integer > 0 or null = null optimizer steps; none: from epochs" in text
    assert "lora.dropout number >= 0, < 1 = 0.05" in text
    assert "lora section or null = section below" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("seed",), "integer >= 0, < 2147483648"),
        (("lora", "targets", 0), "query|key|value|output|gate|up|down"),
        (("experiment", "quantizers"), "list of section"),
        (("experiment", "methods", "anything"), "mapping"),
        (("model", "architecture", "rope_scaling", "factor"), "number > 0"),
    ],
)
def test_allowed_values_in_words(path, words):
    node = find(path)
    assert node is not None
    assert allowed(node) == words


def test_unknown_places_have_neither_schema_nor_names():
    assert find(("train", "nothing", "here")) is None
    assert names(("train", "nothing")) == []
    assert names(("train", "steps")) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (0, "0"),
        ([1, None], "[1, null]"),
        ({"a": "b"}, "{a: 'b'}"),
        ("x" * 90, "'" + "x" * 56 + "..."),
    ],
)
def test_values_are_shown_as_yaml(value, text):
    assert value_text(value) == text
