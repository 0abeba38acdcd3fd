import contextlib
import json

import pytest

from qtale_jax.config.schema import DataConfig
from qtale_jax.data.sources import PROMPT, PROMPT_WITH_INPUT, SPLITS, Choice, Document, Instruction, read
from qtale_jax.errors import InputError


def config(kind: str, path, **settings) -> DataConfig:
    return DataConfig.model_validate({"kind": kind, "path": str(path), **settings})


def everything(data: DataConfig) -> list:
    """The records of all splits that have any."""
    found = []
    for split in SPLITS:
        with contextlib.suppress(InputError):
            found += read(data, split)
    return found


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def choice(index: int) -> dict:
    return {"query": f"q{index}", "choices": ["a", "b"], "gold": index % 2}


@pytest.mark.parametrize("held_out", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("count", [20, 31])
def test_splits_are_disjoint_and_complete(tmp_path, held_out, count):
    file = tmp_path / "text.txt"
    file.write_text("<|endoftext|>".join(f"document {i}" for i in range(count)))
    data = config("text", file, held_out=held_out)
    sizes = {split: len(read(data, split)) for split in SPLITS}
    assert [record.text for record in everything(data)] == [f"document {i}" for i in range(count)]
    held = round(count * held_out)
    assert sizes["calibration"] == held == sizes["validation"] + sizes["test"]
    assert 0 <= sizes["validation"] - sizes["test"] <= 1


def test_a_file_for_evaluation_leaves_the_rest_to_training(tmp_path):
    main, other = jsonl(tmp_path / "a.jsonl", map(choice, range(10))), jsonl(tmp_path / "b.jsonl", [choice(77)])
    data = config("multiple_choice", main, evaluation_path=str(other))
    assert read(data, "test") == read(data, "validation") == [Choice("b", "q77", ("a", "b"), 1)]
    queries = [record.query for split in ("train", "calibration") for record in read(data, split)]
    assert queries == [f"q{i}" for i in range(10)] and len(read(data, "calibration")) == 1
    with pytest.raises(InputError, match=r"data.evaluation_path=.*gone.jsonl: no such file"):
        read(config("multiple_choice", main, evaluation_path=str(tmp_path / "gone.jsonl")), "test")


def test_several_files_are_each_cut_and_one_for_evaluation_is_read_once(tmp_path):
    files = [
        str(jsonl(tmp_path / f"{name}.jsonl", [{**choice(i), "query": f"{name}{i}"} for i in range(10)]))
        for name in "ab"
    ]
    data = DataConfig.model_validate({"kind": "multiple_choice", "paths": files, "held_out": 0.2})
    found = {split: [record.query for record in read(data, split)] for split in SPLITS}
    assert found["train"] == [f"{name}{i}" for i in range(6) for name in "ab"]
    assert found["calibration"] == ["a6", "b6", "a7", "b7"]
    assert (found["validation"], found["test"]) == (["a8", "b8"], ["a9", "b9"])
    # the first rows are of all files, where one is longer than the others too
    files.append(str(jsonl(tmp_path / "short.jsonl", [{**choice(0), "query": "s0"}] * 4)))
    several = data.model_copy(update={"paths": tuple(files), "max_examples": 5})
    assert [record.query for record in read(several, "train")] == ["a0", "b0", "s0", "a1", "b1"]
    other = jsonl(tmp_path / "c.jsonl", [choice(5)])
    data = data.model_copy(update={"evaluation_path": str(other)})
    assert [record.query for record in read(data, "test")] == ["q5"]
    assert len(read(data, "train") + read(data, "calibration")) == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "text", "paths": ["a"]}, "paths does not go with kind='text'"),
        ({"kind": "instruction", "paths": ["a"], "path": "b"}, "path and paths are both given"),
        ({"kind": "instruction"}, "needs path"),
    ],
)
def test_several_files_go_with_rows_and_without_path(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(settings)


def test_max_examples_limits_training_only(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", map(choice, range(20)))
    data = config("multiple_choice", file, max_examples=3, held_out=0.4)
    assert len(read(data, "train")) == 3 and len(read(data, "calibration")) == 8


def test_multiple_choice_rows(tmp_path):
    rows = [{**choice(0), "task": "arc"}, {"query": "q", "choices": ["x", "y", "z"], "gold": 2}]
    file = jsonl(tmp_path / "piqa.jsonl", rows)
    file.write_text(file.read_text().replace("\n", "\n\n"))  # empty lines are no rows
    assert read(config("multiple_choice", file, held_out=0.6), "calibration") == [Choice("arc", "q0", ("a", "b"), 0)]
    assert read(config("multiple_choice", file, held_out=0.6), "validation") == [
        Choice("piqa", "q", ("x", "y", "z"), 2)
    ]


def test_line_separators_inside_a_text_end_no_row(tmp_path):
    rows = [{**choice(i), "query": "one\u2028two\x85three"} for i in range(3)]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert [record.query for record in read(config("multiple_choice", file), "calibration")] == [rows[0]["query"]]


def test_instructions_of_llm_adapters(tmp_path):
    rows = [
        {"instruction": "Say a", "input": "", "output": "a", "answer": "1"},
        {"instruction": "Repeat", "input": "b", "output": "b"},
        {"instruction": "Count", "answer": 3},
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    assert everything(config("instruction", file, held_out=0.34)) == [
        Instruction(PROMPT.format(instruction="Say a"), "a"),
        Instruction(PROMPT_WITH_INPUT.format(instruction="Repeat", input="b"), "b"),
        Instruction(PROMPT.format(instruction="Count"), "3"),
    ]


def test_questions_of_llm_adapters(tmp_path):
    """A folder per task, named like it; choices and the answer are names, the response is a sentence with one."""
    question = "Is it?\n\nAnswer1: yes Answer2: no\n\nAnswer format: answer1/answer2"
    row = {"instruction": question, "input": "", "output": "the correct answer is answer2", "answer": "answer2"}
    for task in ("siqa", "piqa"):
        (tmp_path / task).mkdir()
        (tmp_path / task / "train.json").write_text(json.dumps([row] * 10))
        (tmp_path / task / "test.json").write_text(json.dumps([row] * 4))
    data = DataConfig.model_validate(
        {"kind": "multiple_choice", "paths": [str(tmp_path / "siqa"), str(tmp_path / "piqa")], "held_out": 0.2}
    )
    prompt = PROMPT.format(instruction=question).rstrip()
    choices = ("the correct answer is answer1", "the correct answer is answer2")
    for split, count in (("train", 8), ("calibration", 2), ("validation", 2), ("test", 2)):
        assert read(data, split) == [
            Choice(task, prompt, choices, 1) for _ in range(count) for task in ("siqa", "piqa")
        ]
    file = tmp_path / "one.json"
    file.write_text(json.dumps([{**row, "output": "no"}]))
    assert read(config("multiple_choice", file, evaluation_path=str(file)), "test")[0].choices == ("answer1", "answer2")
    for changes, found in (({"answer": "answer3"}, "answer3"), ({"instruction": "Is it?"}, r"found \(\)")):
        file.write_text(json.dumps([row | changes]))
        with pytest.raises(InputError, match=rf"row 1: the instruction of a question ends with .*{found}"):
            read(config("multiple_choice", file), "train")


@pytest.fixture
def folder(tmp_path):
    """D-LLM's layout."""
    train = [{"instruction": f"i{n}", "input": "x" * (n % 2), "output": f"o{n}"} for n in range(20)]
    test = [{"instruction": f"t{n}", "input": "", "output": f"p{n}"} for n in range(5)]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    prompts = {"prompt_wo_input": "Q {instruction} A", "prompt_with_input": "Q {instruction} {input} A"}
    (tmp_path / "prompt.json").write_text(json.dumps(prompts))
    return tmp_path


def test_dllm_folder(folder):
    data = config("instruction", folder)
    assert read(data, "train")[:2] == [Instruction("Q i0 A", "o0"), Instruction("Q i1 x A", "o1")]
    assert [r.response for s in ("train", "calibration") for r in read(data, s)] == [f"o{n}" for n in range(20)]
    assert len(read(data, "calibration")) == 2
    assert [r.response for s in ("validation", "test") for r in read(data, s)] == [f"p{n}" for n in range(5)]
    (folder / "prompt.json").write_text('{"prompt": "{input}|{instruction}"}')
    assert read(data, "train")[1] == Instruction("x|i1", "o1")
    (folder / "prompt.json").unlink()
    assert read(data, "train")[0] == Instruction(PROMPT.format(instruction="i0"), "o0")
    (folder / "test.json").unlink()
    with pytest.raises(InputError, match="test.json is missing"):
        read(data, "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{oops", "prompt.json, line 1: not valid JSON"),
        ("[]", "prompt.json: expected an object"),
        ('{"prompt": "{story}"}', "train.json, row 1: the prompt template asks for 'story'"),
        ('{"prompt": "{"}', "row 1: prompt.json: the prompt template cannot be filled in"),
        ('{"prompt": 3}', "prompt.json: .*text"),
    ],
)
def test_bad_prompt_files_are_named(folder, text, message):
    (folder / "prompt.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read(config("instruction", folder), "train")


GOOD = json.dumps(choice(0))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops", "not valid JSON"),
        ("3", "expected an object, found int"),
        ('{"choices": ["a", "b"], "gold": 0}', "'query' has to be text, found None"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "'choices' has to be a list of two or more"),
        ('{"query": "q", "choices": "ab", "gold": 0}', "'choices' has to be a list"),
        ('{"query": "q", "choices": ["a", 1], "gold": 0}', "'choices' has to be a list"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "'gold' has to be an index from 0 to 1, found 2"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "'gold'.*found -1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "'gold'.*found True"),
        ('{"query": "q", "choices": ["a", "b"], "gold": "a"}', "'gold'.*found 'a'"),
    ],
)
def test_bad_choices_name_file_and_line(tmp_path, bad, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    with pytest.raises(InputError, match=rf"rows\.jsonl, line 3: {message}"):
        read(config("multiple_choice", file), "train")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"instruction": "i"}, "'output' or 'answer' is missing"),
        ({"instruction": "i", "output": ""}, "'output' or 'answer' is missing or empty"),
        ({"output": "o"}, "'instruction' has to be text, found None"),
        ({"instruction": 4, "output": "o"}, "'instruction' has to be text, found 4"),
        ([], "expected an object, found list"),
    ],
)
def test_bad_instructions_name_file_and_row(tmp_path, bad, message):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"instruction": "i", "output": "o"}, bad]))
    with pytest.raises(InputError, match=rf"rows\.json, row 2: {message}"):
        read(config("instruction", file), "train")


def test_a_truncated_array_names_the_line(tmp_path):
    file = tmp_path / "rows.json"
    file.write_text('[\n{"instruction": "i", "output": "o"},\n{"instruction": ')
    with pytest.raises(InputError, match=r"rows\.json, line 3: not valid JSON"):
        read(config("instruction", file), "train")


@pytest.mark.parametrize("kind", ["text", "instruction", "multiple_choice"])
@pytest.mark.parametrize("content", ["", "\n \n", "[]"])
def test_empty_files_are_refused(tmp_path, kind, content):
    file = tmp_path / "empty.json"
    file.write_text("" if kind == "text" else content)
    with pytest.raises(InputError, match="empty.json is empty"):
        read(config(kind, file), "train")


@pytest.mark.parametrize("kind", ["text", "instruction", "multiple_choice"])
def test_files_that_are_no_text_are_refused(tmp_path, kind):
    file = tmp_path / "binary.json"
    file.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InputError, match="binary.json.*UTF-8"):
        read(config(kind, file), "train")


def test_missing_files_folders_and_splits(tmp_path):
    with pytest.raises(InputError, match=r"data.path=.*nowhere: no such file"):
        read(config("text", tmp_path / "nowhere"), "train")
    with pytest.raises(InputError, match="is a folder"):
        read(config("text", tmp_path), "train")
    with pytest.raises(InputError, match="split 'tset' is unknown.*did you mean 'test'"):
        read(config("text", tmp_path), "tset")
    (tmp_path / "one.txt").write_text("alone")
    assert read(config("text", tmp_path / "one.txt"), "calibration") == [Document("alone")]
    with pytest.raises(InputError, match="no rows for split 'validation'"):
        read(config("text", tmp_path / "one.txt"), "validation")


def test_unknown_tasks_are_refused(tmp_path):
    data = DataConfig.model_validate({"path": str(tmp_path), "tasks": ["ranc"]})
    with pytest.raises(InputError, match="unknown task 'ranc'.*did you mean 'rank'"):
        read(data, "train")


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [("arc_challenge.jsonl", "multiple_choice", 1172), ("ARC-Challenge_train.json", "instruction", 1119)],
)
def test_real_files(shared_data, name, kind, count):
    assert len(everything(config(kind, shared_data / "csqa" / name))) == count
