"""Published tasks through the `datasets` library: rows as multiple-choice questions, by templates that are data."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from qtale_jax.errors import InputError, nearest


@functools.cache
def catalogue() -> dict[str, dict[str, Any]]:
    """The tasks of published.yaml by name."""
    return yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))


def check_tasks(tasks: Sequence[str]) -> None:
    """Refuses unknown names, and none at all.

    Raises:
        InputError: says which are allowed.
    """
    names = ", ".join(catalogue())
    if not tasks:
        raise InputError(f"data.tasks is empty, and data.kind='published' reads what it names; allowed: {names}")
    for task in tasks:
        if task not in catalogue():
            raise InputError(f"data.tasks: unknown task {task!r}; allowed: {names}{nearest(task, catalogue())}")


def questions(task: str, split: str, folder: str | None) -> Iterator[tuple[str, list[str], int]]:
    """Yields (query, choices, gold) of a split.

    Args:
        task: a name of published.yaml.
        split: "train", "validation" or "test"; which split of the data set that is, published.yaml says.
        folder: has TASK as `datasets` saves it (`DatasetDict.save_to_disk`); None: from the hub or its cache.

    Raises:
        InputError: `datasets` is not installed, the data cannot be had, or a row does not fit the template.
    """
    from jinja2 import StrictUndefined, TemplateError
    from jinja2.sandbox import SandboxedEnvironment

    entry = catalogue()[task]
    environment = SandboxedEnvironment(undefined=StrictUndefined)
    query = environment.from_string(entry["query"])
    choices, gold = (_expression(environment, entry[key]) for key in ("choices", "gold"))
    for number, row in enumerate(_rows(task, entry["splits"][split], folder), 1):
        try:
            found = query.render(row), [str(choice) for choice in choices(**row)], int(gold(**row))
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"{task}, split {split}, row {number}: does not fit published.yaml: {error}") from error
        if not 0 <= found[2] < len(found[1]):
            raise InputError(
                f"{task}, split {split}, row {number}: the answer is choice {found[2]} of {len(found[1])}; it may be "
                "hidden in this split"
            )
        yield found


def _expression(environment: Any, text: str) -> Callable[..., Any]:
    return environment.compile_expression(text, undefined_to_none=False)


def _rows(task: str, split: str, folder: str | None) -> Any:
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
