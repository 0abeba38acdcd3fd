"""What an engine has done and holds, counted as it goes."""

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = 10.0
"""Length of the time that a rate is taken over."""


@dataclass(frozen=True)
class Statistics:
    """A snapshot.

    Attributes:
        running: requests that have rows.
        waiting: requests that wait for one.
        rows: how many there are.
        kv_bytes: of pages in use.
        kv_bytes_held: of the whole cache.
        prompt_tokens: tokens of prompts that have run, repeated ones included.
        new_tokens: tokens that were given out.
        executed_layers: layers that tokens executed.
        layers: layers that they could have executed.
        interruptions: times that a request lost its row because the pool had no page left.
        finished: requests by the reason of their end.
        tokens_per_second: new tokens over the last seconds.
    """

    running: int
    waiting: int
    rows: int
    kv_bytes: int
    kv_bytes_held: int
    prompt_tokens: int
    new_tokens: int
    executed_layers: int
    layers: int
    interruptions: int
    finished: dict[str, int]
    tokens_per_second: float

    @property
    def executed_ratio(self) -> float:
        """Executed share of all layers over all tokens that ran; 0 before the first."""
        return self.executed_layers / self.layers if self.layers else 0.0


class Counters:
    """The counts behind `Statistics` that only grow."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.prompt_tokens = self.new_tokens = self.executed_layers = self.layers = self.interruptions = 0
        self.finished: Counter[str] = Counter()
        self._clock = clock
        self._recent: deque[tuple[float, int]] = deque()

    def ran(self, executed: int, layers: int) -> None:
        """Layers that some tokens executed, of those that they could have."""
        self.executed_layers += executed
        self.layers += layers

    def gave(self, tokens: int) -> None:
        """New tokens, now."""
        self.new_tokens += tokens
        now = self._clock()
        self._recent.append((now, tokens))
        self._forget(now)

    def tokens_per_second(self) -> float:
        """New tokens over the last seconds."""
        now = self._clock()
        self._forget(now)
        # Another thread may be counting.
        return sum(tokens for _, tokens in list(self._recent)) / SECONDS

    def _forget(self, now: float) -> None:
        while self._recent and self._recent[0][0] <= now - SECONDS:
            self._recent.popleft()
