"""The text that `--help` shows for the configuration keys, generated from the schema."""

import textwrap
from collections.abc import Iterator

from qtale_jax.config.catalogue import Key, sections

_INTRODUCTION = (
    "Configuration keys, as sections of the YAML file or as key=value after it (values are read as YAML: "
    "train.steps=null, lora.targets=[query,value]). A top-level 'extends: other.yaml' starts from another file."
)


def help_text(width: int = 120) -> str:
    """Returns one entry per key: name, type with limits, default, description; at most `width` columns."""
    width = max(width, 60)
    blocks = [textwrap.fill(_INTRODUCTION, width)]
    for name, description, keys in sections():
        if keys:
            title = f"{name}: {description}" if name else description
            lines = [textwrap.fill(title, width), *(line for key in keys for line in _entry(key, width))]
            blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _entry(key: Key, width: int) -> Iterator[str]:
    """Yields a key's lines: `name  type = default  description` in columns, or the description below if too narrow."""
    head = f"  {key.name:<34} {key.type} = {key.default}"
    column = 76
    if width < column + 40:
        yield head
        yield textwrap.fill(key.description, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    else:
        description = textwrap.wrap(key.description, width - column)
        if len(head) >= column:
            yield head
        else:
            yield f"{head:<{column}}{description.pop(0)}"
        yield from (f"{'':<{column}}{line}" for line in description)
