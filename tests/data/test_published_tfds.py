"""Published tasks that TFDS has: what its own builders prepare is compared with the rows that `datasets` has.

Only downloads are stand-ins, and TensorFlow, which two of the builders use while they prepare.
"""

import importlib
import json
import re
import shutil
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import tensorflow_datasets as tfds

from qtale_jax.config.schema import DataConfig
from qtale_jax.data.published import catalogue, origin
from qtale_jax.data.sources import read
from qtale_jax.errors import InputError

SPLITS = {"train": "train", "validation": "dev", "test": "test"}
"""Splits of `datasets`, and how files of most tasks are named after them."""


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def question(stem, row):
    parts = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    return {"stem": stem, "choices": [{"text": text, "label": label} for text, label in parts]}


def publish_arc(folder, rows, name):
    for split, part in rows.items():
        file = folder / "ARC-V1-Feb2018-2" / name / f"{name}-{SPLITS[split].capitalize()}.jsonl"
        lines(file, [{**row, "question": question(row["question"], row)} for row in part])


def publish_openbookqa(folder, rows, _):
    notes = {"fact1": "f", "humanScore": "1.00", "clarity": "2.00", "turkIdAnonymized": "t"}
    for split, part in rows.items():
        file = folder / "OpenBookQA-V1-Sep2018" / "Data" / "Additional" / f"{SPLITS[split]}_complete.jsonl"
        lines(file, [{**row, **notes, "question": question(row["question_stem"], row)} for row in part])


def publish_piqa(folder, rows, _):
    for split in ("train", "validation"):
        file = folder / "physicaliqa-train-dev" / f"{SPLITS[split]}.jsonl"
        lines(file, [{"id": str(i), **row} for i, row in enumerate(rows[split])])
        file.with_name(f"{SPLITS[split]}-labels.lst").write_text("".join(f"{row['label']}\n" for row in rows[split]))


def publish_boolq(folder, rows, _):
    for split, name in {**SPLITS, "validation": "val"}.items():
        part = [{**row, "idx": i, "label": bool(row["label"])} for i, row in enumerate(rows[split])]
        if split == "test":
            part = [{key: value for key, value in row.items() if key != "label"} for row in part]
        lines(folder / "BoolQ" / f"{name}.jsonl", part)


def publish_winogrande(folder, rows, _):
    numbered = {split: [{"qID": f"{split}-{i}", **row} for i, row in enumerate(part)] for split, part in rows.items()}
    for size, count in (("xs", 1), ("s", 1), ("m", 1), ("l", 1), ("xl", len(numbered["train"]))):
        lines(folder / "winogrande_1.1" / f"train_{size}.jsonl", numbered["train"][:count])
    lines(folder / "winogrande_1.1" / "dev.jsonl", numbered["validation"])
    hidden = [{key: value for key, value in row.items() if key != "answer"} for row in numbered["test"]]
    lines(folder / "winogrande_1.1" / "test.jsonl", hidden)


def publish_samsum(folder, rows, _):
    folder.mkdir(parents=True)
    for split, name in {**SPLITS, "validation": "val"}.items():
        numbered = [{"id": f"{split}-{i}", **row} for i, row in enumerate(rows[split])]
        (folder / f"{name}.json").write_text(json.dumps(numbered))


def arc(split, i):
    labels = ["12345", "ABC", "ABCDE"][i % 3]  # some are numbered; TFDS has letters for them
    texts = [f"{label}, {split} {i}" for label in labels]
    return {
        "id": f"{split}-{i}",
        "question": f"Why é {i}?",
        "choices": {"text": texts, "label": [*labels]},
        "answerKey": labels[i % len(labels)],
    }


def openbookqa(split, i):
    row = arc(split, 0)
    choices = {"text": row["choices"]["text"][:4], "label": [*"ABCD"]}
    return {"id": f"{split}-{i}", "question_stem": f"Cats {i}", "choices": choices, "answerKey": "ABCD"[i % 4]}


def winogrande(split, i):
    return {"sentence": f"{split} _ {i}", "option1": "m", "option2": "n", "answer": "12"[i % 2]}


TASKS = {
    "arc_easy": ("datasets.ai2_arc.ai2_arc_dataset_builder", "Builder", publish_arc, arc),
    "arc_challenge": ("datasets.ai2_arc.ai2_arc_dataset_builder", "Builder", publish_arc, arc),
    "openbookqa": ("datasets.openbookqa.openbookqa_dataset_builder", "Builder", publish_openbookqa, openbookqa),
    "piqa": (
        "datasets.piqa.piqa_dataset_builder",
        "Builder",
        publish_piqa,
        lambda split, i: {"goal": f"Sit {i}", "sol1": split, "sol2": "t", "label": i % 2},
    ),
    "boolq": (
        "text.super_glue",
        "SuperGlue",
        publish_boolq,
        lambda split, i: {"passage": f"T -- {split}.", "question": f"is it {i}", "label": i % 2},
    ),
    "winogrande": ("text.winogrande", "Winogrande", publish_winogrande, winogrande),
    "samsum": (
        "datasets.samsum.samsum_dataset_builder",
        "Builder",
        publish_samsum,
        lambda split, i: {"dialogue": f"A: hi {split}\r\nB: ho" if i else "", "summary": f"They greet {i}."},
    ),
}
"""Module and class of the builder, how the data is published, and a row as `datasets` has it."""


def published_rows(task):
    return {split: [TASKS[task][3](split, i) for i in range(12)] for split in SPLITS}


def prepare(folder, task, file_format="array_record"):
    """Lets the builder of TFDS prepare a task, as its documentation says, in `folder`."""
    module_name, class_name, publish, _ = TASKS[task]
    module = importlib.import_module(f"tensorflow_datasets.{module_name}")
    config = catalogue()[task]["tfds"]["name"].partition("/")[2]
    publish(folder / "published" / task, published_rows(task), config)
    tfds.disable_progress_bar()
    builder = getattr(module, class_name)(data_dir=str(folder), config=config or None, file_format=file_format)
    there = folder / "published" / task
    builder._make_download_manager = lambda **_: SimpleNamespace(
        download_and_extract=lambda url: str(there), manual_dir=str(there), downloaded_size=0
    )
    builder.download_and_prepare()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every task that TFDS has, as it prepares it."""
    from tensorflow_datasets.datasets.samsum import samsum_dataset_builder
    from tensorflow_datasets.text import super_glue

    path = tmp_path_factory.mktemp("tfds")
    with pytest.MonkeyPatch.context() as patch:
        # Two of the builders use TensorFlow: for the name of a type, and to open a file.
        patch.setattr(super_glue, "tf", np)
        patch.setattr(
            samsum_dataset_builder, "tf", SimpleNamespace(io=SimpleNamespace(gfile=SimpleNamespace(GFile=open)))
        )
        for task in TASKS:
            prepare(path, task)
    return path


def save(folder, task):
    """The same rows as `datasets` saves them."""
    names = catalogue()[task]["splits"].values()
    parts = {split: datasets.Dataset.from_list(rows) for split, rows in published_rows(task).items() if split in names}
    if task == "boolq":
        label = datasets.ClassLabel(names=["False", "True"])
        parts = {split: part.cast_column("label", label) for split, part in parts.items()}
    datasets.DatasetDict(parts).save_to_disk(folder / task)


def config(path, *tasks, source="tfds") -> DataConfig:
    path = None if path is None else str(path)
    return DataConfig(kind="published", path=path, tasks=tasks, source=source, held_out=0.25)


def test_every_task_that_tfds_has_is_tried():
    assert set(TASKS) == {task for task, entry in catalogue().items() if "tfds" in entry}


@pytest.mark.parametrize("task", TASKS)
def test_records_are_those_of_the_rows_that_datasets_has(folder, tmp_path, task):
    save(tmp_path, task)
    before = "tensorflow" in sys.modules  # where it is installed, something else may have imported it
    for splits in (("train", "calibration"), ("validation",), ("test",)):
        here, there = (
            [read(config(path, task, source=source), split) for split in splits]
            for path, source in ((folder, "tfds"), (tmp_path, "datasets"))
        )
        records = sorted(repr(record) for part in here for record in part)
        # TFDS stores rows in an order of its own.
        assert records == sorted(repr(record) for part in there for record in part)
        assert [len(part) for part in here] == [len(part) for part in there]
        assert len(set(records)) == (11 if task == "samsum" else 12)  # one dialogue is empty
    assert ("tensorflow" in sys.modules) == before


def test_auto_takes_what_tfds_has_prepared_and_the_rest_through_datasets(folder, tmp_path, monkeypatch):
    siqa = {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "2"}
    datasets.DatasetDict({"validation": datasets.Dataset.from_list([siqa])}).save_to_disk(tmp_path / "siqa")
    (tmp_path / "piqa").symlink_to(folder / "piqa")
    save(tmp_path, "openbookqa")
    auto = config(tmp_path, "piqa", "siqa", "openbookqa", source="auto")
    in_turn = ["piqa", "siqa", "openbookqa"] + ["piqa", "openbookqa"] * 11
    assert [record.task for record in read(auto, "test")] == in_turn
    assert origin(auto.tasks, auto.path, "auto") == (
        f"piqa from {tmp_path}/piqa/1.0.0, siqa from {tmp_path}/siqa, openbookqa from {tmp_path}/openbookqa"
    )
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))
    assert origin(["piqa", "siqa"], None, "auto") == f"piqa from {folder}/piqa/1.0.0, siqa from the datasets library"
    assert origin(["piqa"], None, "datasets") == "piqa from the datasets library"
    assert read(config(None, "piqa"), "test") == read(config(folder, "piqa"), "test")


def test_the_newest_prepared_version_is_taken(folder, tmp_path):
    for version in ("1.0.0", "1.10.0", "1.9.0"):
        shutil.copytree(folder / "piqa" / "1.0.0", tmp_path / "piqa" / version)
    left = tmp_path / "piqa" / "incomplete.ABCDEF_2.0.0"
    left.mkdir()
    (left / "dataset_info.json").write_text("{")
    assert origin(["piqa"], str(tmp_path), "tfds") == f"piqa from {tmp_path}/piqa/1.10.0"


def test_what_tfds_does_not_have_is_one_line(folder, tmp_path, monkeypatch):
    has = r"^data.source='tfds': TFDS does not have 'siqa', it has arc_easy, .*samsum; allowed for others: data.source"
    with pytest.raises(InputError, match=has):
        read(config(folder, "piqa", "siqa"), "test")
    nothing = f"'boolq' is not prepared, there is no super_glue/boolq in data.path={tmp_path}; prepare it where"
    with pytest.raises(InputError, match=nothing) as missing:
        read(config(tmp_path, "boolq"), "test")
    command = re.search(r'python -c "(.*)", and set data.path=', str(missing.value))[1]
    assert command.endswith(
        f"tfds.builder('super_glue/boolq', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()"
    )
    compile(command, "command", "exec")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    nowhere = r"'piqa' is not prepared, there is no piqa in TFDS's default folder; .*data_dir='FOLDER'"
    with pytest.raises(InputError, match=nowhere):
        read(config(None, "piqa"), "test")
    with pytest.raises(ValueError, match=r"source='tfds' would do nothing with kind='text'; allowed: kind=published"):
        DataConfig(kind="text", path="a.txt", source="tfds")


def copied(folder, tmp_path, name):
    """The only version in a copy that may be damaged."""
    shutil.copytree(folder / name, tmp_path / name)
    return next((tmp_path / name).rglob("dataset_info.json")).parent


def cut(content):
    return content[: len(content) // 2]


def flipped(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("samsum-test.array_record-00000-of-00001", cut, r"split 'test', row 1 is empty"),
        ("samsum-test.array_record-00000-of-00001", flipped, r"split 'test' cannot be read \(RuntimeError: Corrupted"),
        ("samsum-test.array_record-00000-of-00001", None, r"split 'test' cannot be read \(.*No such file"),
        ("dataset_info.json", cut, r"cannot be opened \(ParseError: "),
        ("features.json", None, r"cannot be opened \(ValueError: "),
    ],
)
def test_damaged_files_are_one_line(folder, tmp_path, name, damage, message):
    version = copied(folder, tmp_path, "samsum")
    if damage:
        (version / name).write_bytes(damage((version / name).read_bytes()))
    else:
        (version / name).unlink()
    with pytest.raises(InputError, match=message) as error:
        read(config(tmp_path, "samsum"), "test")
    assert str(error.value).startswith(str(version)) and "\n" not in str(error.value)


def test_formats_that_need_tensorflow_are_refused_or_left_alone(folder, tmp_path, monkeypatch):
    version = copied(folder, tmp_path, "openbookqa")
    for file in version.iterdir():  # the files of a data set in TFDS's default format have the same names but for this
        content = file.read_bytes().replace(b'"array_record"', b'"tfrecord"')
        file.with_name(file.name.replace("array_record", "tfrecord")).write_bytes(content)
    message = (
        rf"^{version} is stored as tfrecord, which only TensorFlow reads; prepare it .*'openbookqa', data_dir='FOLDER'"
    )
    for source in ("tfds", "auto"):
        with pytest.raises(InputError, match=message):
            read(config(tmp_path, "openbookqa", source=source), "test")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
    assert origin(["openbookqa"], None, "auto") == "openbookqa from the datasets library"
    save(tmp_path, "openbookqa")  # beside it: TFDS's folder is that of its version
    assert len(read(config(tmp_path, "openbookqa", source="auto"), "test")) == 12
