"""One line for whatever pydantic found wrong."""

from typing import Any

from pydantic import ValidationError

from qtale_jax.config import catalogue
from qtale_jax.config.document import Document
from qtale_jax.errors import nearest


def explain(error: ValidationError, document: Document, source: str) -> str:
    """Returns `where: key: found ...; allowed: ... (did you mean ...?)` for the first problem, and how many follow.

    Args:
        error: what validation of `document` raised.
        document: the values with their origins.
        source: named as the place of values without an origin.
    """
    problems = error.errors(include_url=False)
    first = problems[0]
    location = tuple(key for key in first["loc"] if key != "[key]")
    where = document.origin(location, source)
    key = f"{'.'.join(str(part) for part in location)}: " if location else ""
    rest = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{where}: {key}{_reason(first, location)}{rest}".split())


def _reason(problem: Any, location: tuple[str | int, ...]) -> str:
    kind, found = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        name, options = str(location[-1]), catalogue.names(location[:-1])
        return f"unknown key{nearest(name, options)}; allowed: {', '.join(options)}"
    if kind == "invalid_key" or problem["loc"][-1:] == ("[key]",):
        return "found a key that is no text; allowed: text"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    node = catalogue.find(location)
    expected = catalogue.allowed(node) if node else problem["msg"]
    hint = nearest(found, expected.split("|")) if isinstance(found, str) and "|" in expected else ""
    return f"found {catalogue.value_text(found)}; allowed: {expected}{hint}"
