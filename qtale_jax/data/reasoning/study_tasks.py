"""The study suite: eight harder tasks over more numbers and longer questions, and three held out of evaluation.

Made for comparing ways to compress: wrong choices are near misses, every answer hangs on several steps, and there are
twice as many numbers as in the basic suite, so that a base of a few million parameters is not at its ceiling and 3-bit
rounding shows. `median`, `rotate` and `spread` are trained like the others, but no validation, calibration or
evaluation sees them unless it names them: they are for one last look after everything has been chosen.
"""

from __future__ import annotations

import numpy as np

from qtale_jax.data.reasoning.tasks import (
    BOS,
    EOS,
    PAD,
    Example,
    among_neighbours,
    as_text,
    keep_among,
    swapped,
    with_choices,
    without_among,
)

NUM_VALUES = 64
NUM_CHOICES = 4
MAX_TOKENS = 16
"""Longest sequence: <s>, query, one choice, </s>."""

_ORDINALS = ("first", "second", "third", "fourth", "fifth")
_BOOLEANS = ("false", "true")
_OPERATORS = ("and", "or", "xor")

WORDS: tuple[str, ...] = (
    PAD,
    BOS,
    EOS,
    *(str(value) for value in range(NUM_VALUES)),
    *_ORDINALS,
    *_BOOLEANS,
    *_OPERATORS,
    *("not", "no", "yes", "largest", "smallest", "keep", "above", "below", "without", "sum"),
    *("nearest", "sort", "reverse", "median", "rotate", "spread", ":", "="),
)


def _distinct(rng: np.random.Generator, count: int) -> list[int]:
    return rng.permutation(NUM_VALUES)[:count].tolist()


def _with_swaps(rng: np.random.Generator, task: str, query: str, right: list[int], places: list[int]) -> Example:
    """The wrong choices are the right list with two neighbours exchanged, at three different places."""
    wrong = [as_text(swapped(right, place)) for place in places[: NUM_CHOICES - 1]]
    return with_choices(rng, task, query, as_text(right), wrong)


def rank(rng: np.random.Generator) -> Example:
    """Asks for the first to fifth largest or smallest of six numbers; wrong choices are the nearest in rank."""
    values = _distinct(rng, 6)
    position, largest = int(rng.integers(len(_ORDINALS))), bool(rng.integers(2))
    ordered = sorted(values, reverse=largest)
    others = sorted((i for i in range(len(ordered)) if i != position), key=lambda i: abs(i - position))
    query = f"{_ORDINALS[position]} {'largest' if largest else 'smallest'} {as_text(values)} ="
    wrong = [str(ordered[i]) for i in others[: NUM_CHOICES - 1]]
    return with_choices(rng, "rank", query, str(ordered[position]), wrong)


def boolean(rng: np.random.Generator) -> Example:
    """Asks for the value of five literals joined by "and", "or", "xor", from left to right; up to three are negated."""
    literals, operators = rng.integers(2, size=5).tolist(), rng.integers(len(_OPERATORS), size=4).tolist()
    negated = set(rng.permutation(5)[: int(rng.integers(4))].tolist())
    words: list[str] = []
    result = 0
    for i, literal in enumerate(literals):
        value = literal ^ (i in negated)
        if i:
            words.append(_OPERATORS[operators[i - 1]])
            value = {"and": result & value, "or": result | value, "xor": result ^ value}[words[-1]]
        result = value
        words += ["not"] * (i in negated) + [_BOOLEANS[literal]]
    right, wrong = ("yes", "no") if result else ("no", "yes")
    return with_choices(rng, "boolean", f"{' '.join(words)} =", right, [wrong])


def sort(rng: np.random.Generator) -> Example:
    """Asks for six numbers in rising order; wrong choices exchange the neighbours that are closest in value."""
    values = _distinct(rng, 6)
    right = sorted(values)
    places = sorted(range(5), key=lambda i: right[i + 1] - right[i])
    return _with_swaps(rng, "sort", f"sort {as_text(values)} =", right, places)


def keep(rng: np.random.Generator) -> Example:
    """`keep_among`: three of six numbers."""
    return keep_among(rng, _distinct(rng, 6), 3)


def without(rng: np.random.Generator) -> Example:
    """`without_among`: five numbers less two."""
    return without_among(rng, _distinct(rng, 5), 2)


def total(rng: np.random.Generator) -> Example:
    """Asks for the sum of five numbers from 0 to 9."""
    values = rng.integers(10, size=5).tolist()
    return among_neighbours(rng, "sum", f"sum {as_text(values)} =", sum(values), 45)


def nearest(rng: np.random.Generator) -> Example:
    """Asks which of six numbers is nearest to a given one; ties are not asked."""
    while True:
        target, *values = _distinct(rng, 7)
        ordered = sorted(values, key=lambda value: abs(value - target))
        if abs(ordered[0] - target) < abs(ordered[1] - target):
            break
    wrong = [str(value) for value in ordered[1:NUM_CHOICES]]
    return with_choices(rng, "nearest", f"nearest {target} : {as_text(values)} =", str(ordered[0]), wrong)


def reverse(rng: np.random.Generator) -> Example:
    """Asks for six numbers from the last to the first; wrong choices exchange two neighbours."""
    values = _distinct(rng, 6)
    places = rng.permutation(5).tolist()
    return _with_swaps(rng, "reverse", f"reverse {as_text(values)} =", values[::-1], places)


def median(rng: np.random.Generator) -> Example:
    """Asks for the middle one of five numbers; wrong choices are the nearest in rank."""
    values = _distinct(rng, 5)
    ordered = sorted(values)
    wrong = [str(ordered[i]) for i in (1, 3, 0 if rng.integers(2) else 4)]
    return with_choices(rng, "median", f"median {as_text(values)} =", str(ordered[2]), wrong)


def rotate(rng: np.random.Generator) -> Example:
    """Asks for five numbers with the first few moved to the end; wrong choices exchange two neighbours."""
    values = _distinct(rng, 5)
    shift = int(rng.integers(1, 5))
    places = rng.permutation(4).tolist()
    return _with_swaps(rng, "rotate", f"rotate {shift} : {as_text(values)} =", values[shift:] + values[:shift], places)


def spread(rng: np.random.Generator) -> Example:
    """Asks for the largest less the smallest of five numbers."""
    values = _distinct(rng, 5)
    return among_neighbours(rng, "spread", f"spread {as_text(values)} =", max(values) - min(values), NUM_VALUES - 1)


TASKS = {
    "rank": rank,
    "boolean": boolean,
    "sort": sort,
    "keep": keep,
    "without": without,
    "sum": total,
    "nearest": nearest,
    "reverse": reverse,
    "median": median,
    "rotate": rotate,
    "spread": spread,
}

HELD_OUT = ("median", "rotate", "spread")
"""Trained, but in no other split than "train" unless asked for by name."""
