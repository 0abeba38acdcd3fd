"""The one exception that users are meant to see."""

import difflib
import errno
import math
import os
from collections.abc import Iterable


class InputError(Exception):
    """Something the user gave is wrong: a config key, a path, a data row, a combination.

    The message is one line that says where, what was found and what is allowed. Entry points print it without a
    traceback and exit with code 2.
    """


DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.ENAMETOOLONG}
"""What a file system may answer to a program that is right."""


def disk_error(error: BaseException) -> str | None:
    """One line about the disk, if that is what the error, or one that it came from, is about.

    Libraries that write in the background wrap what the system said, some of them as text.
    """
    waiting: list[BaseException | None] = [error]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if isinstance(found, OSError) and found.errno in DISK:
            return f"{found.filename or 'output'}: {found.strerror}"
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            if os.strerror(number) in str(found):
                return f"output: {os.strerror(number)}"
        waiting += [found.__context__, found.__cause__]
    return None


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
