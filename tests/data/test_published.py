"""Published tasks, read from data sets that are built here with the fields of the real ones and saved by `datasets`."""

import datasets
import pytest
import tensorflow_datasets as tfds

from qtale_jax.config.schema import DataConfig
from qtale_jax.data.published import catalogue
from qtale_jax.data.records import Choice, Document, Instruction
from qtale_jax.data.sources import PROMPT, PROMPT_WITH_INPUT, read
from qtale_jax.errors import InputError

ARC = {"id": "x", "question": "Why?", "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}, "answerKey": "C"}
BOOLEAN = datasets.Features(
    {
        "passage": datasets.Value("string"),
        "question": datasets.Value("string"),
        "label": datasets.ClassLabel(names=["False", "True"]),
    }
)
ROWS = {
    "arc_easy": (ARC, ("Question: Why?\nAnswer:", ("a", "b", "c"), 2)),
    "arc_challenge": (ARC, ("Question: Why?\nAnswer:", ("a", "b", "c"), 2)),
    "openbookqa": ({"question_stem": "Cats", **ARC, "answerKey": "A"}, ("Cats", ("a", "b", "c"), 0)),
    "piqa": ({"goal": "Sit", "sol1": "s", "sol2": "t", "label": 1}, ("Question: Sit\nAnswer:", ("s", "t"), 1)),
    "siqa": (
        {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"},
        ("Q: C. Q?\nA:", ("x", "y", "z"), 1),
    ),
    "boolq": ({"passage": "P.", "question": "is it", "label": 1}, ("P.\nQuestion: is it?\nAnswer:", ("no", "yes"), 1)),
    "winogrande": (
        {"sentence": "A _ B", "option1": "m", "option2": "n", "answer": "2"},
        (
            "Please choose the correct answer to fill in the blank to complete the given sentence: A _ B\n\n"
            "Option1: m Option2: n\n\nAnswer format: option1/option2\n\nthe correct answer is",
            ("option1", "option2"),
            1,
        ),
    ),
    "mmlu": (
        {"question": " Q ", "subject": "s", "choices": ["w", "x", "y", "z"], "answer": 3},
        ("Q\nA. w\nB. x\nC. y\nD. z\nAnswer:", ("A", "B", "C", "D"), 3),
    ),
}


@pytest.fixture
def folder(tmp_path):
    """Every task with ten rows in each of its splits."""
    for task, (row, _) in ROWS.items():
        features = BOOLEAN if task == "boolq" else None
        splits = set(catalogue()[task]["splits"].values())
        rows = datasets.Dataset.from_list([row] * 10, features=features)
        datasets.DatasetDict({split: rows for split in splits}).save_to_disk(tmp_path / task)
    return tmp_path


def config(path, *tasks) -> DataConfig:
    return DataConfig(kind="published", path=None if path is None else str(path), tasks=tasks, held_out=0.2)


def test_every_published_task_becomes_questions(folder):
    assert set(ROWS) == {task for task, entry in catalogue().items() if "query" in entry}
    for task, (_, question) in ROWS.items():
        for split, count in (("train", 8), ("calibration", 2), ("validation", 10), ("test", 10)):
            assert read(config(folder, task), split) == [Choice(task, *question)] * count
    assert [record.task for record in read(config(folder, "piqa", "boolq"), "test")] == ["piqa", "boolq"] * 10


def test_what_cannot_be_read_is_one_line_that_says_what_to_put_where(folder, monkeypatch):
    with pytest.raises(InputError, match=r"unknown task 'piqe'; allowed: arc_easy.*did you mean 'piqa'"):
        read(config(folder, "piqe"), "test")
    with pytest.raises(InputError, match=r"data.tasks is empty.*allowed: arc_easy"):
        read(config(folder), "test")
    with pytest.raises(InputError, match=r"no folder piqa in it; save it .*load_dataset\('baber/piqa', None\)"):
        read(config(folder / "arc_easy", "piqa"), "test")
    hidden = {**ROWS["piqa"][0], "label": -1}
    rows = datasets.Dataset.from_list([hidden])
    datasets.DatasetDict({"train": rows, "validation": rows}).save_to_disk(folder / "other" / "piqa")
    with pytest.raises(InputError, match=r"piqa, split test, row 1: the answer is choice -1 of 2; it may be hidden"):
        read(config(folder / "other", "piqa"), "test")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    with pytest.raises(InputError, match=r"'piqa', split 'validation' cannot be read .*put that folder to FOLDER/piqa"):
        read(config(None, "piqa"), "test")
    with pytest.raises(
        InputError, match=r"no folder samsum in it; save it .*load_dataset\('knkarthick/samsum', None\)"
    ):
        read(config(folder, "samsum"), "test")


def saved(folder, task, **splits):
    """A data set as `datasets` saves it, with the given rows."""
    rows = {split: datasets.Dataset.from_list(found) for split, found in splits.items()}
    datasets.DatasetDict(rows).save_to_disk(folder / task)
    return folder


def test_alpaca_is_cut_as_a_file_is_and_has_its_own_prompts(tmp_path):
    rows = [{"instruction": f"Say {i}", "input": "x, y" if i % 2 else "", "output": str(i)} for i in range(20)]
    rows.insert(3, {"instruction": "Say nothing", "input": "", "output": " "})  # there are some: nothing to learn
    folder = saved(tmp_path, "alpaca", train=rows)
    found = {split: read(config(folder, "alpaca"), split) for split in ("train", "calibration", "validation", "test")}
    assert {split: len(part) for split, part in found.items()} == {
        "train": 12,
        "calibration": 4,
        "validation": 2,
        "test": 2,
    }
    assert [record.response for part in found.values() for record in part] == [str(i) for i in range(20)]
    assert found["train"][:2] == [
        Instruction(PROMPT.format(instruction="Say 0"), "0"),
        Instruction(PROMPT_WITH_INPUT.format(instruction="Say 1", input="x, y"), "1"),
    ]


def test_samsum(tmp_path):
    row = {"id": "1", "dialogue": "A: hi\r\nB: ho", "summary": "A and B greet."}
    folder = saved(tmp_path, "samsum", train=[row] * 10, validation=[row], test=[row, {**row, "dialogue": ""}])
    expected = Instruction("Summarize this dialog:\nA: hi\r\nB: ho\n---\nSummary:\n", "A and B greet.")
    for split, count in (("train", 8), ("calibration", 2), ("validation", 1), ("test", 1)):
        assert read(config(folder, "samsum"), split) == [expected] * count


def test_wikitext_is_one_text_per_split(tmp_path):
    rows = [{"text": ""}, {"text": " = A = \n"}, {"text": " a b \n"}, {"text": ""}, {"text": " c \n"}]
    folder = saved(tmp_path, "wikitext2", train=rows * 2, validation=rows, test=rows)
    test = Document("\n\n = A = \n\n\n a b \n\n\n\n\n c \n", continuous=True)
    assert read(config(folder, "wikitext2"), "test") == [test]
    train, calibration = (read(config(folder, "wikitext2"), split)[0].text for split in ("train", "calibration"))
    assert calibration == "\n\n c \n" and train.endswith(" a b \n") and len(train) > len(test.text)
    with pytest.raises(InputError, match=r"'wikitext2' is plain text, which does not go with other tasks"):
        read(config(folder, "piqa", "wikitext2"), "test")
