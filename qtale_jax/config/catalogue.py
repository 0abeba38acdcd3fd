"""The keys of the schema as data: names, types, limits, defaults. Help and error messages are made from it."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qtale_jax.config.schema import Config

Node = dict[str, Any]


@dataclass(frozen=True)
class Key:
    """One line of help."""

    name: str
    type: str
    default: str
    description: str


@functools.cache
def _schema() -> Node:
    return Config.model_json_schema()


def _resolve(node: Node) -> Node:
    """Returns the node that a reference points to."""
    return _schema()["$defs"][node["$ref"].rsplit("/", 1)[1]] if "$ref" in node else node


def _alternatives(node: Node) -> list[Node]:
    return [_resolve(choice) for choice in node.get("anyOf", [node])]


def find(path: Sequence[str | int]) -> Node | None:
    """Returns the schema of the value at `path`; None where the schema says nothing."""
    node: Node | None = _schema()
    for key in path:
        children = (_child(choice, key) for choice in _alternatives(node))
        node = next((child for child in children if child is not None), None)
        if node is None:
            return None
    return node


def _child(node: Node, key: str | int) -> Node | None:
    if node.get("type") == "array":
        return node.get("items") or node["prefixItems"][0]  # a pair: both entries are alike
    extra = node.get("additionalProperties")
    return node.get("properties", {}).get(key, extra if isinstance(extra, dict) else None)


def names(path: Sequence[str | int]) -> list[str]:
    """Returns the keys of the section at `path`; empty if it is no section."""
    node = find(path)
    return [name for choice in _alternatives(node) for name in choice.get("properties", {})] if node else []


def allowed(node: Node) -> str:
    """Returns the values that a node accepts, in words: `integer > 0 or null`."""
    return " or ".join(_words(choice) for choice in _alternatives(node))


def _words(node: Node) -> str:
    node = _resolve(node)
    if "enum" in node:
        return "|".join(str(choice) for choice in node["enum"])
    if "const" in node:
        return str(node["const"])
    kind = node.get("type")
    if "prefixItems" in node:
        return f"pair of {allowed(node['prefixItems'][0])}"
    if kind == "array":
        return f"list of {allowed(node['items'])}"
    if kind == "object":
        return "section" if "properties" in node else "mapping"
    kind = {"string": "text", "boolean": "true|false"}.get(str(kind), kind)
    return f"{kind}{_limits(node)}"


def _limits(node: Node) -> str:
    limits = {">": "exclusiveMinimum", ">=": "minimum", "<": "exclusiveMaximum", "<=": "maximum"}
    parts = [f" {sign} {node[name]:.12g}" for sign, name in limits.items() if name in node]
    return ",".join(parts)


def value_text(value: Any) -> str:
    """Returns a value on one line, as YAML's flow style would write it, at most 60 characters."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    elif isinstance(value, list | tuple):
        text = f"[{', '.join(value_text(element) for element in value)}]"
    elif isinstance(value, dict):
        text = f"{{{', '.join(f'{key}: {value_text(element)}' for key, element in value.items())}}}"
    else:
        text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def sections() -> Iterator[tuple[str, str, list[Key]]]:
    """Yields (dotted name, description, keys) of every section, the top level first with an empty name."""
    yield from _sections((), Config.model_json_schema())


def _sections(path: tuple[str, ...], node: Node) -> Iterator[tuple[str, str, list[Key]]]:
    keys, nested = [], []
    for name, child in node["properties"].items():
        section = next((choice for choice in _alternatives(child) if "properties" in choice), None)
        if section is not None:
            nested.append(((*path, name), section, child))
        if section is None or "anyOf" in child:
            keys.append(_key((*path, name), child))
    yield ".".join(path), node.get("description", "").splitlines()[0], keys
    for nested_path, section, _ in nested:
        yield from _sections(nested_path, section)


def _key(path: tuple[str, ...], node: Node) -> Key:
    default = node.get("default")
    is_section = isinstance(default, dict) and any("properties" in choice for choice in _alternatives(node))
    return Key(
        name=".".join(path),
        type=allowed(node),
        default="section below" if is_section else value_text(default),
        description=node.get("description", ""),
    )
