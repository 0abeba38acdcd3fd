"""The reference page of the configuration keys, in Markdown, generated from the schema.

python -m qtale_jax.config.reference > configuration.md
"""

from qtale_jax.config.catalogue import Key, sections

_HEAD = """# Configuration

Every key, generated from the types in `qtale_jax/config/`. A stage takes a YAML file with these sections and
any number of `key=value` after it, such as `train.steps=100 lora.targets=[query,value]`; values are read as YAML,
`null` is none. A top-level `extends: other.yaml`, relative to the file, starts from another file. Unknown keys, values
of another type and combinations that cannot work are refused with one line that names the file, the key and what is
allowed.
"""


def anchor(section: str) -> str:
    """The name by which other pages link to a section."""
    return f"config-{section.replace('.', '-')}" if section else "config-top"


def markdown() -> str:
    """The page: one heading and one table per section."""
    parts = [_HEAD]
    for name, description, keys in sections():
        if keys:
            title = f"`{name}`" if name else "Top level"
            rows = [_row(key) for key in keys]
            table = "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows])
            parts.append(f"({anchor(name)})=\n## {title}\n\n{description}\n\n{table}\n")
    return "\n".join(parts)


def _row(key: Key) -> str:
    cells = (f"`{key.name}`", key.type.replace("|", ", "), f"`{key.default}`", key.description)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*") for cell in cells) + " |"


if __name__ == "__main__":
    print(markdown(), end="")
