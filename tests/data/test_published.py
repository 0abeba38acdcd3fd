"""Published tasks, read from data sets that are built here with the fields of the real ones and saved by `datasets`."""

import datasets
import pytest

from qtale_jax.config.schema import DataConfig
from qtale_jax.data.published import catalogue
from qtale_jax.data.sources import Choice, read
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
    assert set(ROWS) == set(catalogue())
    for task, (_, question) in ROWS.items():
        for split, count in (("train", 8), ("calibration", 2), ("validation", 10), ("test", 10)):
            assert read(config(folder, task), split) == [Choice(task, *question)] * count
    assert [record.task for record in read(config(folder, "piqa", "boolq"), "test")] == ["piqa"] * 10 + ["boolq"] * 10


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
    with pytest.raises(InputError, match=r"'piqa', split 'validation' cannot be read .*put that folder to FOLDER/piqa"):
        read(config(None, "piqa"), "test")
