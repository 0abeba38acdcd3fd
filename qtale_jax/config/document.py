"""Configuration as plain nested data: reading YAML files, merging them, applying `key=value`.

Nothing here knows which keys exist; `loading` validates the result. Every value remembers the file that it came from,
so that a message can name it.
"""

import copy
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import ComposerError

from qtale_jax.errors import InputError

COMMAND_LINE = "command line"

KeyPath = tuple[str, ...]


@dataclass
class Document:
    """Nested values and, for each leaf, where it was written."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[KeyPath, str] = field(default_factory=dict)

    def origin(self, path: Sequence[Any], default: str) -> str:
        """Returns where the value at `path`, or the nearest one around or below it, was written."""
        path = tuple(str(key) for key in path)
        for length in range(len(path), 0, -1):
            for known, origin in self.origins.items():
                if known[:length] == path[:length]:
                    return origin
        return default


class _Loader(yaml.SafeLoader):
    """YAML 1.1 without its two traps: duplicate keys are errors, and 1e-3 is a number."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise ComposerError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add((key.tag, key.value))
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Returns the data of one YAML document.

    Raises:
        InputError: invalid YAML or a duplicate key; names `source` and, for texts of several lines, the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark and "\n" in text else ""
        raise InputError(f"{source}{line}: invalid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{source}: invalid YAML: {' '.join(str(error).split())}") from None


def read_document(path: str | Path, _chain: tuple[Path, ...] = ()) -> Document:
    """Reads a YAML file and the files that it extends.

    A top-level `extends: other.yaml` (relative to the file) is read first; this file's values are merged over it.

    Raises:
        InputError: a file that is missing, unreadable, empty, not a mapping, invalid, or that extends itself.
    """
    path = Path(path)
    if path.resolve() in _chain:
        raise InputError(f"{path}: 'extends' leads back to this file through {_chain[-1].name}")
    values = _read_mapping(path)
    parent = values.pop("extends", None)
    if parent is None:
        document = Document()
    elif isinstance(parent, str):
        parent_path = path.parent / parent
        if not parent_path.exists():
            raise InputError(f"{path}: extends: no such file: {parent_path}")
        document = read_document(parent_path, (*_chain, path.resolve()))
    else:
        raise InputError(f"{path}: extends: found {parent!r}; allowed: the name of one YAML file")
    document.values = merge(document.values, values)
    for leaf in _leaves(values):
        document.origins = {key: value for key, value in document.origins.items() if key[: len(leaf)] != leaf}
        document.origins[leaf] = str(path)
    return document


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"; there is {', '.join(others[:8])}" if others else ""
        raise InputError(f"{path}: no such configuration file{hint}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file in UTF-8; expected YAML") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    values = parse_yaml(text, str(path))
    if values is None:
        raise InputError(f"{path}: the file is empty; expected YAML with sections such as 'train:'")
    if not isinstance(values, dict):
        raise InputError(f"{path}: found a {type(values).__name__} at the top; expected sections such as 'train:'")
    return values


def merge(base: Any, over: Any) -> Any:
    """Returns `over` laid on `base`: mappings are merged key by key, everything else is replaced.

    A new `routing.method` drops an inherited `routing.entropy_weight` that it has no use for: the weight belongs to the
    method that it was written for. Under `experiment.methods`, null removes an inherited entry.
    """
    merged = _merge(base, over)
    if isinstance(over, dict):
        routing = over.get("routing")
        if isinstance(routing, dict) and "method" in routing:
            train = over.get("train")
            given = {("routing", name) for name in routing} | {("train", name) for name in train or ()}
            drop_refused(merged, given)
        experiment = merged.get("experiment")
        if isinstance(experiment, dict) and isinstance(experiment.get("methods"), dict):
            methods = experiment["methods"]
            experiment["methods"] = {name: value for name, value in methods.items() if value is not None}
    return merged


def _merge(base: Any, over: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return copy.deepcopy(over)
    merged = {key: copy.deepcopy(value) for key, value in base.items() if key not in over}
    return merged | {key: _merge(base.get(key), value) for key, value in over.items()}


def drop_refused(values: dict[str, Any], given: Collection[tuple[str, ...]]) -> None:
    """Removes keys that a new `routing.method` has no use for, unless they are `given` together with it."""
    routing, train = values["routing"], values.get("train")
    weight, method = routing.get("entropy_weight"), routing.get("method")
    refused = (method == "dllm" and weight != 0) or (method == "qtale" and weight == 0)
    if refused and ("routing", "entropy_weight") not in given:
        routing.pop("entropy_weight", None)
    if method in ("dense", "random") and isinstance(train, dict) and ("train", "skipped_share") not in given:
        train.pop("skipped_share", None)


def parse_assignment(text: str) -> tuple[KeyPath, Any]:
    """Splits `a.b=value` into the key path and the value, read as YAML.

    Raises:
        InputError: no `=`, an empty part of the key, an empty value, or invalid YAML.
    """
    key, equals, value = text.partition("=")
    path = tuple(part.strip() for part in key.split("."))
    if not equals or not all(path):
        raise InputError(f"{COMMAND_LINE}: found {text!r}; expected key=value, such as train.steps=100")
    if not value.strip():
        raise InputError(
            f"{COMMAND_LINE}: {key} has no value; write {key}=null for none or {key}='\"\"' for empty text"
        )
    return path, parse_yaml(value, f"{COMMAND_LINE}: {key}")


def assign(values: dict[str, Any], path: KeyPath, value: Any, defaults: dict[str, Any]) -> None:
    """Sets the value at `path` in place; missing sections appear, list elements are named by their index.

    `defaults` fills in the free-form containers (such as `experiment.methods`) that `path` goes into and the file does
    not mention, so that changing one entry keeps the others.

    Raises:
        InputError: `path` goes through a value that is no section, or past the end of a list.
    """
    node: Any = values
    for depth in range(len(path)):
        key = _place(node, path, depth)
        if depth == len(path) - 1:
            node[key] = value
        elif isinstance(node, dict) and node.get(key) is None:
            container = None if key in node else _container(defaults, path[: depth + 1])
            node[key] = {} if container is None else container
        node = node[key]


def _place(node: Any, path: KeyPath, depth: int) -> Any:
    """Returns what indexes `node` for `path[depth]`: the key of a mapping, the number of a list element."""
    key, where = path[depth], ".".join(path[:depth])
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise InputError(f"{COMMAND_LINE}: {'.'.join(path)}: {where} holds {node!r}, no section")
    if not key.isdecimal() or int(key) >= len(node):
        raise InputError(f"{COMMAND_LINE}: {where}: found index {key!r}; allowed: 0 to {len(node) - 1}")
    return int(key)


def _container(defaults: Any, path: KeyPath) -> Any:
    for key in path:
        defaults = defaults.get(key) if isinstance(defaults, dict) else None
    return copy.deepcopy(defaults)


def _leaves(values: Any, path: KeyPath = ()) -> Iterator[KeyPath]:
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from _leaves(value, (*path, str(key)))
    else:
        yield path
