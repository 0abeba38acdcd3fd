"""Readers: every supported format becomes documents, or prompt-response examples, or multiple-choice examples.

Each reader checks what it reads and names the file and line of the first bad row.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from qtale_jax.config.schema import DataConfig
from qtale_jax.data import published, reasoning
from qtale_jax.data.records import Choice, Document, Instruction, Record
from qtale_jax.errors import InputError, nearest

SPLITS = ("train", "calibration", "validation", "test")

STORED = {"basic": "full", "study": "study"}
"""Suites of the reasoning tasks, and the builder configuration that holds each."""


Row = TypeVar("Row")

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
"""Alpaca's prompts, used where a data set brings no prompt.json of its own."""

ANSWER_FORMAT = re.compile(r"Answer format:\s*(\S+)\s*\Z")
"""How an instruction of LLM-Adapters ends that has choices."""


def read(config: DataConfig, split: str) -> list[Record]:
    """Reads one split.

    Files without splits of their own are cut: the last `held_out` share is held out, its first half for validation and
    its second for test; as many rows just before it are for calibration, and the rest is for training. With
    `evaluation_path`, that file is validation and test. With `paths`, this is done for every file. Rows of several
    files or tasks are taken in turn, so that the first ones, which theta and quantizers are fitted to, are of all.

    Raises:
        InputError: a missing, empty or malformed file, or a split without rows.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; allowed: {', '.join(SPLITS)}{nearest(split, SPLITS)}")
    if config.kind == "reasoning":
        records = _reasoning(config, split)
    elif config.kind == "published":
        published.check_tasks(config.tasks, config.source)
        records = _in_turn([_published(config, task, split) for task in config.tasks])
    elif config.paths:
        parts = ("train", "calibration") if config.evaluation_path is not None else SPLITS
        # A file for evaluation is read once, whatever the number of files to train on.
        paths = config.paths if split in parts else config.paths[:1]
        records = _in_turn([_one(config.model_copy(update={"path": path}), split) for path in paths])
    elif config.path is None:
        raise InputError(f"data.path is missing: data.kind={config.kind!r} reads a file or folder")
    else:
        records = _one(config, split)
    if not records:
        raise InputError(
            f"data: no rows for split {split!r} in {config.path or ', '.join(config.paths) or config.kind}"
        )
    return records[: config.max_examples] if split == "train" else records


def _in_turn(parts: Sequence[Sequence[Row]]) -> list[Row]:
    """The first rows of all parts, then the second ones, and so on; where a part ends, the others go on."""
    longest = max(map(len, parts), default=0)
    return [part[index] for index in range(longest) for part in parts if index < len(part)]


def _published(config: DataConfig, task: str, split: str) -> list[Record]:
    """A split of a published task; calibration is the end of its training split.

    Tasks that have no other split are cut as a file is.
    """

    def whole(name: str) -> list[Choice | Instruction | str]:
        return list(published.rows(task, name, config.path, config.source))

    if published.is_cut(task):
        found = _part(whole("train"), config.held_out, split)
    elif split in ("train", "calibration"):
        found = _training_part(whole("train"), config.held_out, split)
    else:
        found = whole(split)
    return published.records(task, found)


def _one(config: DataConfig, split: str) -> list[Record]:
    """A split of the file or folder `path`."""
    folder = Path(config.path or "")
    if config.kind in ("instruction", "multiple_choice") and folder.is_dir():
        return _folder(folder, config, split)
    return _cut(config, split)


def reasoning_folder(config: DataConfig) -> Path:
    """Where the generated suites are kept."""
    return Path(config.path or "data/reasoning")


def _reasoning(config: DataConfig, split: str) -> list[Record]:
    suite = reasoning.SUITES[config.suite]
    unknown = [task for task in config.tasks if task not in suite.tasks]
    if unknown:
        raise InputError(
            f"data.tasks: unknown task {unknown[0]!r}; allowed: {', '.join(suite.tasks)}"
            f"{nearest(unknown[0], suite.tasks)}"
        )
    held_out = () if split == "train" else suite.held_out
    wanted = config.tasks or [task for task in suite.tasks if task not in held_out]
    count = config.max_examples if split == "train" and not config.tasks else None
    generated = _generated if split == "train" else _generated_and_kept
    return [r for r in generated(reasoning_folder(config), STORED[config.suite], split, count) if r.task in wanted]


def _generated(folder: Path, stored: str, split: str, count: int | None) -> tuple[Choice, ...]:
    """The first `count` examples of a split of a generated suite, or all."""
    source = reasoning.load(folder, split, stored)
    # One bulk read: item by item, ArrayRecord takes three times as long.
    examples = map(reasoning.decode, source.__getitems__(range(min(count or len(source), len(source)))))
    return tuple(Choice(e["task"], e["query"], tuple(e["choices"]), e["gold"]) for e in examples)


# An experiment evaluates and calibrates dozens of times in one process. The splits for that are small and never change.
_generated_and_kept = functools.lru_cache(maxsize=6)(_generated)


def _cut(config: DataConfig, split: str) -> list[Record]:
    if split in ("validation", "test") and config.evaluation_path is not None:
        return _read_file("data.evaluation_path", Path(config.evaluation_path), config)
    records = _read_file("data.path", Path(config.path or ""), config)
    return _part(records, config.held_out, split, whole=config.evaluation_path is not None)


def _part(rows: list[Row], share: float, split: str, whole: bool = False) -> list[Row]:
    """A split of rows that have none: `share` is held out at the end, unless the `whole` is for training."""
    held_out = 0 if whole else round(len(rows) * share)
    before = max(1, held_out or round(len(rows) * share))
    tail = len(rows) - held_out
    middle = tail + (held_out + 1) // 2
    start, end = {
        "train": (0, max(tail - before, 0)),
        "calibration": (max(tail - before, 0), tail),
        "validation": (tail, middle),
        "test": (middle, len(rows)),
    }[split]
    return rows[start:end]


def _training_part(rows: list[Row], share: float, split: str) -> list[Row]:
    """Training rows without their end, or that end, which is for calibration."""
    tail = len(rows) - max(1, round(len(rows) * share))
    return rows[:tail] if split == "train" else rows[tail:]


def _read_file(key: str, path: Path, config: DataConfig) -> list[Record]:
    if not path.exists():
        raise InputError(f"{key}={path}: no such file")
    if path.is_dir():
        raise InputError(f"{key}={path} is a folder; data.kind={config.kind!r} reads a file")
    if config.kind == "text":
        parts = (part.strip() for part in _content(path).split(config.separator))
        records: list[Record] = [Document(part) for part in parts if part]
    else:
        parse = _choice if config.kind == "multiple_choice" else _instruction
        records = [parse(row, where, path.stem) for where, row in rows(path)]
    if not records:
        raise InputError(f"{path} is empty")
    return records


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error


def rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (where, object) of a JSON array or a JSON-lines file; `where` names file and line or index."""
    text = _content(path)
    if text.lstrip().startswith("["):
        try:
            array = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
        numbered = ((f"{path}, row {index + 1}", row) for index, row in enumerate(array))
    else:
        # Not `splitlines`: JSON texts may hold U+2028 and other characters that it takes for ends of lines.
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        numbered = ((where, _json_line(where, line)) for where, line in lines)
    for where, row in numbered:
        if not isinstance(row, dict):
            raise InputError(f"{where}: expected an object, found {type(row).__name__}")
        yield where, row


def _json_line(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON: {error.msg}") from error


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} has to be text, found {value!r}; the row has {sorted(row)}")
    return value


def _choice(row: dict[str, Any], where: str, task: str, prompts: dict[str, str] | None = None) -> Choice:
    if "query" not in row and "instruction" in row:
        return _adapters_choice(row, where, task, prompts)
    query, choices, gold = _text(row, "query", where), row.get("choices"), row.get("gold")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) for c in choices):
        raise InputError(f"{where}: 'choices' has to be a list of two or more texts, found {choices!r}")
    if type(gold) is not int or not 0 <= gold < len(choices):
        raise InputError(f"{where}: 'gold' has to be an index from 0 to {len(choices) - 1}, found {gold!r}")
    return Choice(str(row.get("task", task)), query, tuple(choices), gold)


def _adapters_choice(row: dict[str, Any], where: str, task: str, prompts: dict[str, str] | None) -> Choice:
    """A question in the layout of LLM-Adapters: choices are named after "Answer format:".

    A response is what the row has as output, with the name of its choice at the end.
    """
    found, answer = ANSWER_FORMAT.search(_text(row, "instruction", where)), _text(row, "answer", where)
    names = tuple(found[1].split("/")) if found else ()
    if answer not in names or len(names) < 2:
        raise InputError(
            f"{where}: the instruction of a question ends with 'Answer format: NAME/NAME', and 'answer' is one of the "
            f"names; found {names} and {answer!r}"
        )
    example = _instruction(row, where, task, prompts)
    before = example.response.removesuffix(answer) if example.response.endswith(answer) else ""
    return Choice(task, example.prompt.rstrip(), tuple(before + name for name in names), names.index(answer))


def _instruction(row: dict[str, Any], where: str, _task: str, prompts: dict[str, str] | None = None) -> Instruction:
    prompts = prompts or {}
    fields = {"instruction": row.get("instruction", ""), "input": row.get("input", ""), **row}
    template = prompts.get("prompt")
    if template is None:
        with_input = bool(fields["input"])
        fallback = PROMPT_WITH_INPUT if with_input else PROMPT
        template = prompts.get("prompt_with_input" if with_input else "prompt_wo_input", fallback)
        _text(row, "instruction", where)
    response = row.get("output", row.get("answer"))
    if response is None or response == "":
        raise InputError(f"{where}: 'output' or 'answer' is missing or empty; the row has {sorted(row)}")
    try:
        return Instruction(template.format_map(fields), str(response))
    except KeyError as error:
        raise InputError(f"{where}: the prompt template asks for {error}, the row has {sorted(row)}") from error
    except (ValueError, IndexError) as error:
        raise InputError(f"{where}: prompt.json: the prompt template cannot be filled in: {error}") from error


def _prompts(file: Path) -> dict[str, str]:
    """The templates of a prompt.json; none if it is not there."""
    if not file.exists():
        return {}
    try:
        prompts = json.loads(_content(file))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if not isinstance(prompts, dict):
        raise InputError(f"{file}: expected an object, found {type(prompts).__name__}")
    for key in ("prompt", "prompt_with_input", "prompt_wo_input"):
        if not isinstance(prompts.get(key, ""), str):
            raise InputError(f"{file}: {key!r} has to be text, found {prompts[key]!r}")
    return prompts


def _folder(folder: Path, config: DataConfig, split: str) -> list[Record]:
    """The layout of D-LLM, and of a task of LLM-Adapters: train.json, test.json, and prompt.json for own prompts.

    Calibration is the end of train.json, validation the first half of test.json.
    """
    prompts = _prompts(folder / "prompt.json")
    file = folder / ("train.json" if split in ("train", "calibration") else "test.json")
    if not file.exists():
        raise InputError(f"data.path={folder}: {file.name} is missing (expected train.json, test.json, prompt.json)")
    parse = _choice if config.kind == "multiple_choice" else _instruction
    records: list[Record] = [parse(row, where, folder.name, prompts) for where, row in rows(file)]
    if split in ("validation", "test"):
        half = (len(records) + 1) // 2
        return records[:half] if split == "validation" else records[half:]
    return _training_part(records, config.held_out, split)
