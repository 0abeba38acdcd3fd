"""The one exception that users are meant to see."""

import difflib
import math
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


def mended_group_size(key: str, found: int, inputs: Iterable[int]) -> str:
    """Returns `"allowed: key=64, or key=-1 (one group)"`: what to write instead of a group size that does not divide.

    Args:
        key: the configuration key.
        found: its value.
        inputs: of all linears that it counts for; the size that is named divides every one of them.
    """
    common = math.gcd(*inputs)
    divisors = [size for size in range(2, common + 1) if common % size == 0]
    whole = f"{key}=-1 (one group)"
    if not divisors:
        return f"allowed: {whole}"
    return f"allowed: {key}={min(divisors, key=lambda size: abs(size - found))}, or {whole}"
