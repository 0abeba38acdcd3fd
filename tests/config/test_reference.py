"""The reference page names every key of the schema, with its type and default."""

import re

from qtale_jax.config import Config, resolve
from qtale_jax.config.catalogue import sections
from qtale_jax.config.reference import anchor, markdown


def leaves(values, path=()):
    """Dotted names of the keys below `values`."""
    for name, value in values.items():
        if isinstance(value, dict) and path + (name,) != ("experiment", "methods"):
            yield from leaves(value, (*path, name))
        else:
            yield ".".join((*path, name))


def test_every_key_is_there():
    page = markdown()
    found = re.findall(r"^\| `([\w.]+)` \|", page, flags=re.MULTILINE)
    assert len(found) == len(set(found)) > 100
    assert set(leaves(resolve(Config()))) <= set(found)


def test_rows_have_type_default_and_meaning():
    page = markdown()
    row = "| `routing.target` | number >= 0, &lt;= 1 | `0.5` | executed share that the rate loss aims at |"
    assert row in page.splitlines()
    assert "| `quantize.bits` | 2, 3, 4, 8, 16 | `4` | bits per weight |" in page.splitlines()
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.replace("\\|", "").count("|") == 5 for line in rows)


def test_every_section_can_be_linked_to():
    page = markdown()
    for name, _, keys in sections():
        assert (f"({anchor(name)})=" in page) == bool(keys)
