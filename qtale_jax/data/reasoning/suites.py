"""The suites: which tasks and words belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qtale_jax.data.reasoning import study_tasks, tasks
from qtale_jax.data.reasoning.tasks import Example


@dataclass(frozen=True)
class Suite:
    """Tasks over one closed vocabulary.

    Attributes:
        tasks: name -> function of a random generator.
        words: the vocabulary; a word's index is its token id.
        max_tokens: longest sequence.
        held_out: tasks that only the training split has, unless they are asked for by name.
    """

    tasks: Mapping[str, Callable[[np.random.Generator], Example]]
    words: tuple[str, ...]
    max_tokens: int
    held_out: tuple[str, ...] = ()

    def vocabulary(self) -> dict[str, int]:
        """Returns the token id of every word; `<pad>`, `<s>` and `</s>` are 0, 1 and 2."""
        return {word: index for index, word in enumerate(self.words)}


SUITES = {
    "basic": Suite(tasks.TASKS, tasks.WORDS, tasks.MAX_TOKENS),
    "study": Suite(study_tasks.TASKS, study_tasks.WORDS, study_tasks.MAX_TOKENS, study_tasks.HELD_OUT),
}


def stream(task: str, seed: int, suite: str = "basic") -> Iterator[Example]:
    """Yields examples of one task without end, the same ones for the same seed; queries may repeat.

    Args:
      task: a task of the suite.
      seed: a non-negative integer. Different tasks draw from independent generators under the same seed.
      suite: a key of `SUITES`.
    """
    found = SUITES[suite].tasks
    if task not in found:
        raise ValueError(f"unknown task {task!r}; the tasks are {', '.join(found)}")
    rng = np.random.default_rng([seed, list(found).index(task)])
    while True:
        yield found[task](rng)


def generate(task: str, count: int, seed: int, suite: str = "basic") -> list[Example]:
    """Returns the first `count` examples of `stream(task, seed, suite)`."""
    examples = stream(task, seed, suite)
    return [next(examples) for _ in range(count)]
