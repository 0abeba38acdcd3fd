"""The text of a row while its tokens come: whole characters, nothing of a stop string, nothing given out twice."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qtale_jax.data.stops import first_stop, possible_start, tokens_until

WINDOW = 32
"""Tokens after which earlier ones are no longer decoded again."""

UNFINISHED = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to while the others are missing."""


@dataclass(frozen=True)
class Piece:
    """What some tokens add: text to give out, how many of the tokens count, whether a stop string has ended it."""

    text: str
    tokens: int
    stopped: bool


@dataclass
class RunningText:
    """Decodes tokens as they come.

    Tokens mean text only together with their neighbours, so a window of the last ones is decoded again each time, and
    what it gives beyond what it gave before is new. Text that may be the beginning of a stop string waits.

    Attributes:
        decode: from token ids to text, without special tokens.
        stop: strings that end the text.
    """

    decode: Callable[[Sequence[int]], str]
    stop: Sequence[str] = ()
    _window: list[int] = field(default_factory=list)
    _whole: int = 0  # tokens of the window at the last call after which no character was unfinished
    _taken: int = 0  # characters of the window's text that have been taken from it
    _held: str = ""  # taken, and not given out as a stop string may begin with it

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
        rest = self._held + self.decode(self._window)[self._taken :]
        self._held, self._window, self._taken = "", [], 0
        return rest

    def _take(self, tokens: Sequence[int]) -> str:
        """What the tokens add to the text, but for an unfinished character at its end."""
        self._window += tokens
        text = self.decode(self._window)
        whole = text.rstrip(UNFINISHED)
        new = whole[self._taken :]
        self._taken = max(self._taken, len(whole))
        if len(whole) == len(text):
            if len(self._window) > WINDOW:
                # The window begins anew where the text was whole before: some tokens stay as neighbours of the next.
                self._window = self._window[self._whole :]
                self._taken = len(self.decode(self._window))
            self._whole = len(self._window)
        return new
