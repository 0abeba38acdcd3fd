"""Stop strings: text that ends a generation. Looked for in decoded text, they may begin and end anywhere."""

from collections.abc import Callable, Sequence


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest of the stop strings begins in `text`; None if there is none. Empty strings never stop."""
    found = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return min(found, default=None)


def tokens_until(ids: Sequence[int], stops: Sequence[str], decode: Callable[[Sequence[int]], str]) -> int:
    """The number of tokens whose text first holds a stop string; all if it never does."""
    low, high = 1, len(ids)
    while low < high:  # more tokens never take a stop string away, so this can be bisected
        middle = (low + high) // 2
        low, high = (low, middle) if first_stop(decode(ids[:middle]), stops) is not None else (middle + 1, high)
    return low


def possible_start(text: str, stops: Sequence[str]) -> int:
    """Where the end of `text` begins that may turn out to be the beginning of a stop string; its length if none can."""
    longest = max(map(len, stops), default=0)
    for place in range(max(len(text) - longest + 1, 0), len(text)):
        if any(stop.startswith(text[place:]) for stop in stops):
            return place
    return len(text)
