"""Requests as the engine keeps them, and what their owners see of them."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float32

from qtale_jax.engine.options import RequestOptions
from qtale_jax.engine.text import RunningText
from qtale_jax.errors import InputError

FinishReason = Literal["stop", "length", "cancelled", "failed"]
"""Why a request ended: an end token or a stop string; its most tokens; its owner; the engine."""


class QueueFull(InputError):
    """As many requests wait as may."""


class TooLong(InputError):
    """A prompt and its new tokens exceed the context."""


@dataclass(frozen=True)
class Completion:
    """A finished continuation.

    Attributes:
        text: without the stop string that ended it.
        tokens: the new tokens; the end token, or the last one of a stop string, is among them.
        finish_reason: why it ended.
        prompt_tokens: tokens of the prompt.
        executed_layers: layers that its tokens executed, those of the prompt included.
        layers: layers that they could have executed; the last new token may not have run.
        kv_bytes: of the pages that it had at its end.
    """

    text: str
    tokens: list[int]
    finish_reason: FinishReason
    prompt_tokens: int
    executed_layers: int
    layers: int
    kv_bytes: int

    @property
    def executed_ratio(self) -> float:
        """Executed share of all layers; 0 if nothing ran."""
        return self.executed_layers / self.layers if self.layers else 0.0


@dataclass(frozen=True)
class Update:
    """What a chunk adds to a request: text, and the completion once it is finished. The text may be empty."""

    text: str
    completion: Completion | None = None


Listener = Callable[[Update], None]
"""Told of every update, in the thread that steps the engine; it must neither block nor fail."""


@dataclass(eq=False)
class Request:
    """A prompt on its way: waiting, running its prompt, decoding, finished.

    Attributes:
        number: in order of arrival.
        prompt: token ids.
        options: how it is continued.
        thresholds: theta of each routed layer.
        listener: of its updates.
        running: its text so far.
        tokens: new ones so far.
        pieces: text given out so far.
        started: tokens of prompt, and new ones from before an interruption, that have run.
        decoding: all of those have run.
        executed: layers that its tokens executed.
        ran: tokens that ran.
        interruptions: times that it lost its row.
        cancelled: its owner has no more use for it.
        completion: once it is finished.
    """

    number: int
    prompt: list[int]
    options: RequestOptions
    thresholds: Float32[np.ndarray, " r"]
    listener: Listener
    running: RunningText
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    started: int = 0
    decoding: bool = False
    executed: int = 0
    ran: int = 0
    interruptions: int = 0
    cancelled: bool = False
    completion: Completion | None = None

    @property
    def ids(self) -> list[int]:
        """What has to run before it decodes."""
        return self.prompt + self.tokens

    @property
    def unstarted(self) -> int:
        """How many tokens of that have not run yet."""
        return 0 if self.decoding else len(self.prompt) + len(self.tokens) - self.started

    def interrupt(self) -> None:
        """It has lost its row: everything has to run again."""
        self.started = self.executed = self.ran = 0
        self.decoding = False
        self.interruptions += 1

    def count(self, executed: int, tokens: int) -> None:
        """Layers that some more tokens executed."""
        self.executed += executed
        self.ran += tokens

    def say(self, text: str) -> None:
        """Gives text out."""
        if text:
            self.pieces.append(text)
            self.listener(Update(text))

    def finish(self, reason: FinishReason, layers: int, kv_bytes: int, text: str = "") -> None:
        """Ends it with a last piece of text, and whatever was held back.

        Args:
            reason: why.
            layers: of the model.
            kv_bytes: of the pages that it has.
            text: the last piece.
        """
        text += self.running.end()
        whole, total = "".join([*self.pieces, text]), layers * self.ran
        completion = Completion(whole, self.tokens, reason, len(self.prompt), self.executed, total, kv_bytes)
        # In this order, so that whoever sees the completion has the last update, too.
        self.listener(Update(text, completion))
        self.completion = completion


class Driver(Protocol):
    """What a stream needs of its engine."""

    def step(self) -> bool:
        """Runs a chunk; returns whether anything is left to do."""
        ...

    def cancel(self, request: Request) -> None:
        """Has a request end at the next step."""
        ...


@dataclass(eq=False)
class Stream:
    """The continuation of one prompt. Iterating gives pieces of text, and steps the engine while there are none."""

    _engine: Driver
    _updates: deque[Update]
    _request: Request

    def __iter__(self) -> Iterator[str]:
        while True:
            finished = self.completion is not None
            while self._updates:
                if text := self._updates.popleft().text:
                    yield text
            if finished:
                return
            self._engine.step()

    @property
    def completion(self) -> Completion | None:
        """The whole continuation; None while it is not finished."""
        return self._request.completion

    def result(self) -> Completion:
        """Steps the engine until the continuation is finished, and returns it."""
        while self._request.completion is None:
            self._engine.step()
        return self._request.completion

    def cancel(self) -> None:
        """Gives up: the row is free at the next step. Nothing happens if the continuation is finished."""
        self._engine.cancel(self._request)
