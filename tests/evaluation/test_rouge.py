"""ROUGE against values worked out by hand, and of what a model really writes."""

import json

import pytest

from qtale_jax.config.schema import Config
from qtale_jax.data.records import Choice, Instruction
from qtale_jax.errors import InputError
from qtale_jax.evaluation.evaluate import evaluate
from qtale_jax.evaluation.rouge import make_scorer, prompts_that_fit, rouge
from qtale_jax.model import Model
from qtale_jax.reporting.results import read_evaluation

PROMPTS = ("largest 12 14 25 =", "sum 3 4 =", "second largest 16 13 26 =", "first largest 12 14 =")


def test_f_measures():
    """'the cats sat' of 'a cat sat on the mat': words cat, sat, the; pairs cat sat; in order cat sat."""
    found = rouge(make_scorer(), ["a cat sat on the mat", "x y"], ["the cats sat", "x y"])
    one, two, longest = 2 * 3 / (6 + 3), 2 * 1 / (5 + 2), 2 * 2 / (6 + 3)
    expected = {"rouge1": (one + 1) / 2, "rouge2": (two + 1) / 2, "rougeL": (longest + 1) / 2}
    assert found == pytest.approx(expected)


def config(path, **evaluate) -> Config:
    data = {"kind": "instruction", "path": str(path), "length": 40}
    return Config.model_validate({"data": data, "evaluate": {"rouge": True, "batch_size": 4, "maps": 0, **evaluate}})


def folder(path, responses):
    """Prompts of the suite's words as they are, and responses, all in the test split."""
    path.mkdir()
    (path / "prompt.json").write_text(json.dumps({"prompt": "{instruction}"}))
    rows = [{"instruction": p, "output": f" {r}"} for p, r in zip(PROMPTS, responses, strict=True)]
    (path / "test.json").write_text(json.dumps([row for row in rows for _ in (0, 1)]))  # half of it is validation
    return path


@pytest.mark.slow
def test_a_model_that_writes_the_reference_gets_all_of_it(loaded, tmp_path):
    """The references are what the skipping engine writes; the others share some words with it."""
    model = Model(loaded.spec, loaded.params, loaded.tokenizer, {})
    written = model.generate(PROMPTS, max_new_tokens=8)
    result = evaluate(loaded, config(folder(tmp_path / "same", [one.text for one in written]), max_new_tokens=8))
    scores = result["written"]
    assert [scores[name] for name in ("rouge1", "rougeL")] == pytest.approx([1.0, 1.0])
    assert (scores["examples"], scores["dropped"]) == (4, 0) and 0 < scores["executed_ratio"] < 1
    result = evaluate(loaded, config(folder(tmp_path / "other", ["12", "7", "13 16 26", "14"]), max_new_tokens=8))
    assert result["written"]["rouge1"] < 0.5
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(result, allow_nan=False))
    assert read_evaluation(file).written.rougeL == result["written"]["rougeL"]


def test_prompts_that_leave_no_room_are_dropped_and_data_without_responses_refused(loaded, tmp_path):
    records = [Instruction(prompt, "1") for prompt in PROMPTS]
    settings = config(tmp_path, max_new_tokens=34)  # of a context of 40
    kept = prompts_that_fit(records, loaded.tokenizer, 40, settings)
    assert [record.prompt for record, _ in kept] == [p for p in PROMPTS if len(p.split()) + 1 <= 6]
    assert 0 < len(kept) < 4
    with pytest.raises(InputError, match=r"leaves 0 of 40 tokens of context for prompts"):
        prompts_that_fit(records, loaded.tokenizer, 40, config(tmp_path, max_new_tokens=60))
    with pytest.raises(InputError, match=r"compares written responses, and the data has none"):
        prompts_that_fit([Choice("a", "q", ("x", "y"), 0)], loaded.tokenizer, 40, settings)


def test_settings_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match=r"data.kind='reasoning' does not have; allowed: instruction or published"):
        Config.model_validate({"evaluate": {"rouge": True}})
    with pytest.raises(ValueError, match=r"evaluate.max_new_tokens=9 would do nothing without evaluate.rouge=true"):
        Config.model_validate({"evaluate": {"max_new_tokens": 9}})
