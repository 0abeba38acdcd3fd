"""The one exception that users are meant to see."""

import difflib
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong: a config key, a path, a data row, a combination.

    The message is one line that says where, what was found and what is allowed. Entry points print it without a
    traceback and exit with code 2.
    """


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Returns `" (did you mean 'x'?)"` for the closest allowed name, or an empty string."""
    matches = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
