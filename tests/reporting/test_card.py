"""The model card: front matter that the Hub's own reader takes, and every number from the evaluations."""

import jax
import pytest
import yaml
from huggingface_hub import ModelCard

from qtale_jax.artifact import save_model
from qtale_jax.config.schema import Config
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.reporting.aggregate import summarize
from qtale_jax.reporting.card import build_card, quantization_table, read_models, threshold_table
from qtale_jax.reporting.results import read_evaluations

CONFIG = Config.model_validate({"experiment": {"title": "Seven tasks"}})


@pytest.fixture(scope="module")
def summaries(experiment):
    return summarize(read_evaluations(experiment / "evaluation"))


@pytest.fixture(scope="module")
def card(summaries):
    return build_card(CONFIG, summaries, {}, "python -m qtale_jax.report a.yaml")


def test_the_front_matter_holds_what_was_measured(card, summaries):
    data = ModelCard(card).data
    assert data.library_name == "qtale-jax" and {"dllm", "qtale"} <= set(data.tags)
    index = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert len(index) == len(summaries)
    last, shown = summaries[-1], index[-1]
    assert shown["name"] == "QTALE, 2-bit, ratio 0.70"
    values = {metric["name"]: metric["value"] for metric in shown["results"][0]["metrics"]}
    assert values["accuracy, mean"] == round(last.accuracy["mean"].mean, 5)
    assert values["executed share of tokens and layers"] == round(last.executed_ratio.mean, 5)
    assert shown["results"][0]["dataset"] == {"type": "reasoning", "name": "reasoning", "split": "test"}


def test_the_tables_are_there(card, summaries):
    text = card.split("---\n", 2)[2]
    assert text.index("# Seven tasks") < text.index("## Accuracy") < text.index("## Threshold")
    assert "python -m qtale_jax.report a.yaml" in text
    rows = threshold_table(summaries).rows
    assert len(rows) == 2 * 4 and all(cell.text in text for row in rows for cell in row)
    found = {row[0].text: [cell.text for cell in row[1:3]] for row in quantization_table(summaries).rows}
    assert found == {"fp": ["–", "–"], **{f"{b}-bit": ["rtn", g] for b, g in GROUPS.items()}}


GROUPS = {4: "output channel", 3: "output channel", 2: "output channel"}


def test_model_directories_are_listed_with_where_they_come_from(summaries, tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    architecture = Architecture(vocab_size=64, num_layers=2, max_length=32, **shape)
    routing = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.375,)})
    spec = ModelSpecification(architecture=architecture, routing=routing)
    provenance = {
        "stage": "train",
        "seed": 7,
        "parent": {"path": "runs/old/base", "fingerprint": "f"},
        "huggingface": {"name": "tiny-llama"},
    }
    save_model(tmp_path / "qtale-seed7" / "trained", spec, initialize(spec, jax.random.key(0)), provenance=provenance)
    (tmp_path / ".half.partial").mkdir()
    (tmp_path / ".half.partial" / "model.json").write_text("{")
    text = build_card(CONFIG, summaries, read_models(tmp_path), "")
    line = next(line for line in text.splitlines() if "qtale-seed7/trained" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "train",
        "base of tiny-llama",
        "float32",
        "0.375",
        "7",
    ]
