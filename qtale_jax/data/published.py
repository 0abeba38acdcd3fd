"""Published tasks, from TFDS or the `datasets` library: rows become questions, instructions or text, by templates."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtale_jax.data import published_tfds
from qtale_jax.data.records import Choice, Document, Instruction, Record
from qtale_jax.errors import InputError, nearest


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """The tasks of published.yaml by name."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def check_tasks(tasks: Sequence[str], source: str = "auto") -> None:
    """Refuses unknown names, none at all, text together with tasks that have prompts, and what a source does not have.

    Raises:
        InputError: says which are allowed.
    """
    names = ", ".join(catalogue())
    if not tasks:
        raise InputError(f"data.tasks is empty, and data.kind='published' reads what it names; allowed: {names}")
    for task in tasks:
        if task not in catalogue():
            raise InputError(f"data.tasks: unknown task {task!r}; allowed: {names}{nearest(task, catalogue())}")
    text = [task for task in tasks if "text" in catalogue()[task]]
    if text and len(tasks) > 1:
        raise InputError(
            f"data.tasks: {text[0]!r} is plain text, which does not go with other tasks; allowed: it alone"
        )
    prepared = [task for task, entry in catalogue().items() if "tfds" in entry]
    missing = [task for task in tasks if task not in prepared]
    if source == "tfds" and missing:
        raise InputError(
            f"data.source='tfds': TFDS does not have {missing[0]!r}, it has {', '.join(prepared)}; allowed for others: "
            "data.source=auto or datasets"
        )


def is_cut(task: str) -> bool:
    """Whether a task has a single split, of which a part has to be held out."""
    return set(catalogue()[task]["splits"]) == {"train"}


def rows(task: str, split: str, folder: str | None, source: str = "auto") -> Iterator[Choice | Instruction | str]:
    """Yields a question, an instruction or a line of text for every row of a split.

    Args:
        task: a name of published.yaml.
        split: "train", "validation" or "test"; which split of the data set that is, published.yaml says.
        folder: has TASK as `datasets` saves it (`DatasetDict.save_to_disk`), or is a `data_dir` of TFDS; None: from
            TFDS's default folder, or from the hub or its cache.
        source: `data.source`.

    Raises:
        InputError: `datasets` is not installed, the data cannot be had, or a row does not fit the template.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    entry = catalogue()[task]
    environment = SandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    convert = _converter(task, entry, environment)
    wanted = _expression(environment, entry.get("where", "true"))
    directory, fields = prepared(task, folder, source), {}
    if directory is None:
        stored = _saved(task, entry["splits"][split], folder)
    else:
        there = entry["tfds"]
        stored = published_tfds.rows(directory, {**entry["splits"], **there.get("splits", {})}[split])
        fields = {name: _expression(environment, text) for name, text in there.get("fields", {}).items()}
    for number, row in enumerate(stored, 1):
        try:
            row = {**row, **{name: field(**row) for name, field in fields.items()}}
            found = convert(row) if wanted(**row) else None
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"{task}, split {split}, row {number}: does not fit published.yaml: {error}") from error
        if isinstance(found, Choice) and not 0 <= found.gold < len(found.choices):
            raise InputError(
                f"{task}, split {split}, row {number}: the answer is choice {found.gold} of {len(found.choices)}; it "
                "may be hidden in this split"
            )
        if found is not None:
            yield found


def prepared(task: str, folder: str | None, source: str) -> Path | None:
    """The folder of the prepared data set that a task is read from; None: it is read through `datasets`.

    Args:
        task: a name of published.yaml.
        folder: as in `rows`.
        source: `data.source`; with "auto", what TFDS has prepared goes first, if it can be read without TensorFlow.

    Raises:
        InputError: `source` is "tfds" and nothing is prepared, or what describes it is damaged.
    """
    entry = catalogue()[task]
    if source == "datasets" or "tfds" not in entry:
        return None
    name = entry["tfds"]["name"]
    found = published_tfds.find(name, folder)
    if source == "tfds" and found is None:
        where = "TFDS's default folder" if folder is None else f"data.path={folder}"
        raise InputError(
            f"data.tasks: {task!r} is not prepared, there is no {name} in {where}; "
            f"{published_tfds.how_to_prepare(name, folder)}"
        )
    if source == "tfds" or found is None or published_tfds.is_readable(found):
        return found
    # Where nothing else can be meant, reading says what is wrong with it.
    alternative = folder is None or (Path(folder) / task / "dataset_dict.json").exists()
    return None if alternative else found


def origin(tasks: Sequence[str], folder: str | None, source: str) -> str:
    """Where tasks are read from, in words; the arguments as in `rows`.

    Raises:
        InputError: as `check_tasks` and `prepared`.
    """
    check_tasks(tasks, source)

    def place(task: str) -> Path | str:
        return prepared(task, folder, source) or (Path(folder) / task if folder else "the datasets library")

    return ", ".join(f"{task} from {place(task)}" for task in tasks)


def records(task: str, found: Sequence[Choice | Instruction | str]) -> list[Record]:
    """What stages work from: the rows themselves, or one text made of all of them."""
    lines = [row for row in found if isinstance(row, str)]
    if lines:
        return [Document(catalogue()[task]["join"].join(lines), continuous=True)]
    return [row for row in found if not isinstance(row, str)]


def _converter(task: str, entry: dict[str, Any], environment: Any) -> Callable[[dict[str, Any]], Any]:
    """From a row of a data set to what it means, by the templates that the entry has."""

    def template(key: str) -> Callable[[dict[str, Any]], str]:
        return environment.from_string(entry[key]).render

    if "text" in entry:
        return template("text")
    if "prompt" in entry:
        prompt, response = template("prompt"), template("response")
        return lambda row: Instruction(prompt(row), response(row))
    query = template("query")
    choices, gold = (_expression(environment, entry[key]) for key in ("choices", "gold"))
    return lambda row: Choice(task, query(row), tuple(map(str, choices(**row))), int(gold(**row)))


def _expression(environment: Any, text: str) -> Callable[..., Any]:
    return environment.compile_expression(text, undefined_to_none=False)


def _saved(task: str, split: str, folder: str | None) -> Any:
    path, name = catalogue()[task]["dataset"]
    where = Path(folder or ".") / task
    instead = (
        f"save it where there is a network, with datasets.load_dataset({path!r}, {name!r}).save_to_disk({task!r}), "
        f"put that folder to {where if folder else 'FOLDER/' + task} and set data.path={folder or 'FOLDER'}"
    )
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise InputError(f'data.tasks: {task!r} needs the datasets library: pip install "qtale-jax[eval]"') from error
    if folder is not None and not where.is_dir():
        raise InputError(f"data.path={folder}: no folder {task} in it; {instead}")
    try:
        found = datasets.load_dataset(path, name) if folder is None else datasets.load_from_disk(str(where))
        return found[split]
    except Exception as error:  # hubs, caches and networks fail in many ways; what the user can do is the same
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise InputError(
            f"data.tasks: {task!r}, split {split!r} cannot be read ({type(error).__name__}: {reason}); {instead}"
        ) from error
