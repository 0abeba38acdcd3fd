"""The text of a row while its tokens come: whole characters, nothing of a stop string, nothing given out twice."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field

from qtale_jax.data.stops import first_stop, possible_start, tokens_until

WINDOW = 32
"""Tokens after which earlier ones are no longer decoded again."""

NEIGHBOURS = 8
"""Tokens of a prompt that new ones are decoded beside: the last one would do, but for those without text."""

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to while the others are missing."""


@dataclass(frozen=True)
class Piece:
    """What some tokens add: text to give out, how many of the tokens count, whether a stop string has ended it."""

    text: str
    tokens: int
    stopped: bool


def neighbours(decode: Callable[[Sequence[int]], str], ids: Sequence[int]) -> tuple[list[int], str]:
    """The last tokens of a prompt and their text, which is not empty and begins with a whole character if one does."""
    # The bytes of a character may come in four tokens, so that one of the first four sizes begins with its first one.
    sizes = itertools.chain(range(NEIGHBOURS, NEIGHBOURS + 4), (NEIGHBOURS << n for n in itertools.count(1)))
    size = next(sizes)
    while True:
        last = list(ids[-size:])
        text = decode(last)
        if size >= len(ids) or (text and not text.startswith(UNFINISHED)):
            return last, text
        size = next(sizes)


@dataclass
class RunningText:
    """Decodes tokens as they come.

    Tokens mean text only together with their neighbours, so a window of the last ones is decoded again each time, and
    what it gives beyond what it gave before is new. Text that may be the beginning of a stop string waits.

    Attributes:
        decode: from token ids to text, without special tokens.
        stop: strings that end the text.
        after: tokens that the text goes on from; there are tokenizers with which the first word has no space before it.
    """

    decode: Callable[[Sequence[int]], str]
    stop: Sequence[str] = ()
    after: InitVar[Sequence[int]] = ()
    _window: list[int] = field(default_factory=list)
    _whole: int = 0  # tokens of the window at the last call after which no character was unfinished
    _taken: int = 0  # characters of the window's text that have been taken from it
    _held: str = ""  # taken, and not given out as a stop string may begin with it
    _before: str = ""  # text of `after`, if new tokens may finish the character at its end

    def __post_init__(self, after: Sequence[int]):
        if not after:
            return
        self._window, text = neighbours(self.decode, after)
        whole = text.rstrip(UNFINISHED)
        self._taken = len(whole)
        if len(whole) == len(text):
            self._whole = len(self._window)
        else:
            self._before = text

    def add(self, tokens: Sequence[int]) -> Piece:
        """Takes the next tokens; after `stopped` there must be no more."""
        window, taken, held = list(self._window), self._taken, self._held
        text = held + self._take(tokens)
        place = first_stop(text, self.stop)
        if place is None:
            ready = possible_start(text, self.stop)
            self._held = text[ready:]
            return Piece(text[:ready], len(tokens), False)
        kept = tokens_until(tokens, self.stop, lambda part: held + self.decode([*window, *part])[taken:])
        self._held, self._window, self._taken = "", [], 0
        return Piece(text[:place], kept, True)

    def end(self) -> str:
        """What is still held back, for a text that ends here."""
        text = self.decode(self._window)
        rest = self._held + text[self._start(text) :]
        self._held, self._window, self._taken = "", [], 0
        return rest

    def _start(self, text: str) -> int:
        """Where the text of the window goes on from what has been taken."""
        # What looked unfinished at the end of the prompt may be what was written there.
        return len(self._before) if self._before and text.startswith(self._before) else self._taken

    def _take(self, tokens: Sequence[int]) -> str:
        """What the tokens add to the text, but for an unfinished character at its end."""
        self._window += tokens
        text = self.decode(self._window)
        whole = text.rstrip(UNFINISHED)
        new = whole[self._start(whole) :]
        if len(whole) > self._taken:
            self._taken, self._before = len(whole), ""
        if len(whole) == len(text):
            if len(self._window) > WINDOW:
                # The window begins anew where the text was whole before: some tokens stay as neighbours of the next.
                self._window = self._window[self._whole :]
                self._taken = len(self.decode(self._window))
            self._whole = len(self._window)
        return new
