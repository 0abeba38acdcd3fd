"""Seven synthetic multiple-choice reasoning tasks over a closed vocabulary of words.

Every task is a function of a NumPy random generator that returns one `Example`: a query that ends in "=", two or four
distinct choices, and the index of the right one. Nearly all queries are about small integers, one word each, and most
answers hang on a comparison or a sum that a network has to hold as an analogue quantity. The wrong choices are the
nearest misses there are (the neighbour in rank, a total that is off by one), so a small error in the logits, such as
weight quantization makes, changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

NUM_VALUES = 32  # Numbers are the words "0" .. "31".
NUM_CHOICES = 4  # Choices of every task but `boolean`, which has two.
MAX_TOKENS = 19  # Longest sequence: <s>, query, one choice, </s>.

PAD, BOS, EOS = "<pad>", "<s>", "</s>"
_ORDINALS = ("first", "second", "third")
_BOOLEANS = ("false", "true")
_OPERATORS = ("and", "or")

WORDS: tuple[str, ...] = (
    PAD,
    BOS,
    EOS,
    *(str(value) for value in range(NUM_VALUES)),
    *_ORDINALS,
    *("largest", "smallest"),
    *_BOOLEANS,
    *_OPERATORS,
    *("not", "no", "yes"),
    *("count", "keep", "above", "below"),
    *("without", "sum", "nearest"),
    *(":", "="),
)


class Example(TypedDict):
    """One multiple-choice question: `choices[gold]` is the right continuation of `query`."""

    task: str
    query: str
    choices: list[str]
    gold: int


def as_text(values: Sequence[int]) -> str:
    """The numbers as words."""
    return " ".join(map(str, values))


def _distinct_values(rng: np.random.Generator, count: int) -> list[int]:
    return rng.permutation(NUM_VALUES)[:count].tolist()


def swapped(values: list[int], first: int) -> list[int]:
    """`values` with the one at `first` and its right neighbour exchanged."""
    return [*values[:first], values[first + 1], values[first], *values[first + 2 :]]


def with_choices(rng: np.random.Generator, task: str, query: str, right: str, wrong: Sequence[str]) -> Example:
    """Puts the right choice among the wrong ones at a uniformly drawn place."""
    choices = [right, *wrong]
    order = rng.permutation(len(choices)).tolist()
    return Example(task=task, query=query, choices=[choices[i] for i in order], gold=order.index(0))


def among_neighbours(rng: np.random.Generator, task: str, query: str, right: int, largest: int) -> Example:
    """Offers four consecutive integers in [0, largest], one of them right, in a random order.

    Where the window starts is random too, so the middle of the offered range says little about the answer.
    """
    lowest_start = max(0, right - NUM_CHOICES + 1)
    highest_start = min(right, largest - NUM_CHOICES + 1)
    start = int(rng.integers(lowest_start, highest_start + 1))
    wrong = [str(value) for value in range(start, start + NUM_CHOICES) if value != right]
    return with_choices(rng, task, query, str(right), wrong)


def rank(rng: np.random.Generator) -> Example:
    """Asks for the first, second or third largest or smallest of six numbers.

    Hard because every number has to be compared with all others in few layers, and because the wrong choices are the
    numbers next to the right one in sorted order.
    """
    values = _distinct_values(rng, 6)
    position = int(rng.integers(len(_ORDINALS)))
    largest = bool(rng.integers(2))
    ordered = sorted(values, reverse=largest)
    others = sorted((i for i in range(len(ordered)) if i != position), key=lambda i: abs(i - position))
    query = f"{_ORDINALS[position]} {'largest' if largest else 'smallest'} {as_text(values)} ="
    return with_choices(
        rng, "rank", query, str(ordered[position]), [str(ordered[i]) for i in others[: NUM_CHOICES - 1]]
    )


def boolean(rng: np.random.Generator) -> Example:
    """Asks for the value of six literals joined by "and" and "or", evaluated from left to right.

    Hard because it is a chain of steps (operators have equal precedence, "not" binds to its literal only) that has to
    be unrolled over the layers; with two choices, guessing gives 50 %.
    """
    num_literals = 6
    literals = rng.integers(2, size=num_literals).tolist()
    operators = rng.integers(len(_OPERATORS), size=num_literals - 1).tolist()
    # At most three negations keep the sequence short.
    negated = set(rng.permutation(num_literals)[: int(rng.integers(4))].tolist())
    words: list[str] = []
    result = 0
    for i, literal in enumerate(literals):
        value = literal ^ (i in negated)
        if i == 0:
            result = value
        else:
            operator = _OPERATORS[operators[i - 1]]
            result = result & value if operator == "and" else result | value
            words.append(operator)
        if i in negated:
            words.append("not")
        words.append(_BOOLEANS[literal])
    right, wrong = ("yes", "no") if result else ("no", "yes")
    return with_choices(rng, "boolean", f"{' '.join(words)} =", right, [wrong])


def count(rng: np.random.Generator) -> Example:
    """Asks how many of eight numbers lie strictly above a threshold.

    Hard because eight comparisons have to be added up exactly: the choices are four consecutive counts.
    """
    values = _distinct_values(rng, 8)
    threshold = int(rng.integers(6, NUM_VALUES - 6))
    right = sum(value > threshold for value in values)
    return among_neighbours(rng, "count", f"count above {threshold} : {as_text(values)} =", right, len(values))


def keep_among(rng: np.random.Generator, values: list[int], num_kept: int) -> Example:
    """Asks for the `num_kept` numbers above (or below) a threshold, in the order given.

    Hard because the wrong choices exchange one number on the right side of the threshold for one on the wrong side,
    both as close to it as possible, and leave the rest alone.
    """
    ordered = sorted(values)
    below = bool(rng.integers(2))
    if below:
        threshold = int(rng.integers(ordered[num_kept - 1] + 1, ordered[num_kept] + 1))
    else:
        threshold = int(rng.integers(ordered[-num_kept - 1], ordered[-num_kept]))
    inside = {value for value in values if (value < threshold if below else value > threshold)}
    by_distance = sorted(values, key=lambda value: abs(value - threshold))
    kept = [value for value in by_distance if value in inside]
    dropped = [value for value in by_distance if value not in inside]

    def in_order(members: set[int]) -> str:
        return as_text([value for value in values if value in members])

    exchanges = ((kept[0], dropped[0]), (kept[0], dropped[1]), (kept[1], dropped[0]))
    wrong = [in_order(inside - {out} | {into}) for out, into in exchanges]
    query = f"keep {'below' if below else 'above'} {threshold} : {as_text(values)} ="
    return with_choices(rng, "keep", query, in_order(inside), wrong)


def without_among(rng: np.random.Generator, values: list[int], num_named: int) -> Example:
    """Asks for the numbers less `num_named` of them that are named first, in the order given.

    Hard because each number has to be looked up among the named ones; of the wrong choices two let one named number
    in for a number that stays, one swaps two neighbours of the right answer.
    """
    named = [values[i] for i in rng.permutation(len(values))[:num_named].tolist()]
    stays = [value for value in values if value not in named]

    def exchange(out: int, into: int) -> str:
        return as_text([value for value in values if value == into or (value in stays and value != out)])

    outgoing = rng.permutation(len(stays)).tolist()
    wrong = [exchange(stays[i], named[i % num_named]) for i in outgoing[:2]]
    wrong.append(as_text(swapped(stays, int(rng.integers(len(stays) - 1)))))
    return with_choices(rng, "without", f"without {as_text(named)} : {as_text(values)} =", as_text(stays), wrong)


def keep(rng: np.random.Generator) -> Example:
    """`keep_among`: four of eight numbers."""
    return keep_among(rng, _distinct_values(rng, 8), 4)


def without(rng: np.random.Generator) -> Example:
    """`without_among`: seven numbers less four."""
    return without_among(rng, _distinct_values(rng, 7), 4)


def total(rng: np.random.Generator) -> Example:
    """Asks for the sum of five numbers between 0 and 6.

    Hard because the sum is held as a magnitude in the residual stream and the choices are four consecutive totals.
    """
    num_values, largest = 5, 6
    values = rng.integers(largest + 1, size=num_values).tolist()
    return among_neighbours(rng, "sum", f"sum {as_text(values)} =", sum(values), num_values * largest)


def nearest(rng: np.random.Generator) -> Example:
    """Asks which of six numbers is nearest to a given one; ties are not asked.

    Hard because distances on both sides have to be compared; the wrong choices are the next nearest numbers.
    """
    while True:
        target, *values = _distinct_values(rng, 7)
        ordered = sorted(values, key=lambda value: abs(value - target))
        if abs(ordered[0] - target) < abs(ordered[1] - target):
            break
    query = f"nearest {target} : {as_text(values)} ="
    return with_choices(rng, "nearest", query, str(ordered[0]), [str(value) for value in ordered[1:NUM_CHOICES]])


TASKS: dict[str, Callable[[np.random.Generator], Example]] = {
    "rank": rank,
    "boolean": boolean,
    "count": count,
    "keep": keep,
    "without": without,
    "sum": total,
    "nearest": nearest,
}
