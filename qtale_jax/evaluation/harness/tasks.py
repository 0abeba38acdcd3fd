"""From `harness.tasks` to task objects: registered names, YAML files of the harness's format, files of rows."""

import logging
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from lm_eval.api.task import ConfigurableTask, Task
from lm_eval.tasks import TaskManager

from qtale_jax.config.schema import DataConfig, HarnessConfig
from qtale_jax.data.sources import Choice, read
from qtale_jax.errors import InputError, nearest
from qtale_jax.evaluation.harness.files import FILES, check_files

ROWS = Path(__file__).with_name("rows.yaml")
"""The task that a file of {query, choices, gold} rows becomes."""

log = logging.getLogger(__name__)


def load_tasks(config: HarnessConfig) -> dict[str, Any]:
    """Builds the tasks and reads their data.

    Args:
        config: `tasks` has registered names (tasks, groups, tags), `.yaml` files, and `.json` or `.jsonl` files of
            {query, choices, gold} rows, which become tasks by `rows.yaml`, named like the file.

    Returns:
        What `lm_eval.evaluator.evaluate` takes: `tasks` by name, `groups`, `group_map`.

    Raises:
        InputError: an unknown name, a missing or malformed file, or data that cannot be had.
    """
    check_files(config)
    by_name = [name for name in config.tasks if Path(name).suffix not in FILES]
    if by_name and config.include_path is None:
        manager = _shipped_tasks()
    else:
        manager = TaskManager(include_path=config.include_path, include_defaults=bool(by_name))
    for name in by_name:
        if name not in manager.all_tasks:
            raise InputError(
                f"harness.tasks: {name!r} is unknown; allowed: a task, group or tag of lm-evaluation-harness, a YAML "
                f"file, a .jsonl file of rows{nearest(name, manager.all_tasks)}"
            )
    specs = [_row_task(Path(name)) if Path(name).suffix in (".json", ".jsonl") else name for name in config.tasks]
    built: list[Any] = []
    for name, spec in zip(config.tasks, specs, strict=True):
        built.append(spec if isinstance(spec, Task) else _build(manager, name))
    items = [item for entry in built for item in (entry if isinstance(entry, list) else [entry])]
    try:
        return dict(manager.load(items))
    except ValueError as error:  # the same task twice
        raise InputError(f"harness.tasks: {error}") from error


@lru_cache(maxsize=1)
def _shipped_tasks() -> TaskManager:
    """The harness's own tasks: reading thousands of them takes seconds, which local files need not wait for."""
    return TaskManager()


def _build(manager: TaskManager, name: str) -> Any:
    """A task, group or list of tasks; its data is read, or downloaded, by this."""
    try:
        return manager._load_spec(name)
    except InputError:
        raise
    except Exception as error:  # data sets, hubs, YAML and functions in it: whatever it is, the user named the task
        reason = str(error).strip().splitlines() or [""]
        raise InputError(
            f"harness.tasks: {name!r} cannot be loaded ({type(error).__name__}: {reason[0][:200]}); without network "
            "give a file of {query, choices, gold} rows, as harness.tasks=[PATH.jsonl], or a YAML task on local files"
        ) from error


def _row_task(file: Path) -> ConfigurableTask:
    records = read(DataConfig(kind="multiple_choice", path=str(file), evaluation_path=str(file)), "test")
    rows = [record for record in records if isinstance(record, Choice)]
    config = yaml.safe_load(ROWS.read_text(encoding="utf-8")) | {"task": file.name}
    return ConfigurableTask(config=config | {"custom_dataset": partial(_dataset, rows)})


def _dataset(rows: Sequence[Choice], **_metadata: Any) -> dict[str, Any]:
    """The rows as the `datasets` library holds them; the harness gives the task's metadata along."""
    import datasets

    found = [{"query": row.query, "choices": list(row.choices), "gold": row.gold} for row in rows]
    return {"test": datasets.Dataset.from_list(found)}
