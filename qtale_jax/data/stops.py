"""What ends a generation: tokens, and stop strings, which are looked for in decoded text and may begin anywhere."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qtale_jax.errors import InputError


def end_ids(tokenizer: Any, provenance: Mapping[str, Any]) -> tuple[int, ...]:
    """Tokens that end a continuation: the tokenizer's end token, and those of the checkpoint's generation_config.json.

    Chat models end their turns with tokens that stand only there. A checkpoint without that file has them in
    config.json, as transformers does. `provenance` is that of the model, which what is made of a converted checkpoint
    inherits.

    Raises:
        InputError: the file has something else there than token ids.
    """
    checkpoint = provenance.get("huggingface") or {}
    file = "generation_config" if "generation_config" in checkpoint else "config"
    found = (checkpoint.get(file) or {}).get("eos_token_id")
    listed = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in listed):
        raise InputError(f"{file}.json: eos_token_id={found!r}; allowed: a token id, or a list of them")
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*own, *listed]))


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
