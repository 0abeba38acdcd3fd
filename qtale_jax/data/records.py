"""What readers give and all stages work from: questions, instructions, and plain text."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A multiple-choice question: the response is the choice that `gold` points to."""

    task: str
    query: str
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class Instruction:
    """A prompt and the response to learn."""

    prompt: str
    response: str


@dataclass(frozen=True)
class Document:
    """Plain text, all of which is learned.

    A `continuous` one is a whole corpus: it has no end, and is cut into pieces of the length of a row, not down to one.
    """

    text: str
    continuous: bool = False


Record = Choice | Instruction | Document


def is_continuous(records: Sequence[Record]) -> bool:
    """Whether records are a corpus that is cut into pieces, rather than examples."""
    return isinstance(records[0], Document) and records[0].continuous
