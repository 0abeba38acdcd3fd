"""The engine: requests go in, text comes out, chunk by chunk."""

import itertools
import threading
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from qtale_jax.engine.batch import Batch, Decoded, entry
from qtale_jax.engine.options import EngineOptions, RequestOptions
from qtale_jax.engine.requests import FinishReason, Listener, Request, Stream, TooLong, Update
from qtale_jax.engine.schedule import Schedule
from qtale_jax.engine.statistics import Counters, Statistics
from qtale_jax.engine.text import RunningText
from qtale_jax.engine.tokenizer import Message, SharedTokenizer
from qtale_jax.errors import InputError

if TYPE_CHECKING:
    from qtale_jax.model import Model


class Part(NamedTuple):
    """A part of a prompt that ran: whose, before which interruption, its tokens, what they executed (on the device)."""

    request: Request
    interruptions: int
    tokens: int
    execute: Array


class Engine:
    """Continuous batching for one model.

        engine = Engine(model)
        streams = [engine.submit(prompt, RequestOptions(max_new_tokens=20)) for prompt in prompts]
        for piece in streams[0]: ...          # iterating steps the engine, for all of them
        streams[1].result().text

    Requests join and leave a batch of fixed shape between chunks, in the order of their arrival. `submit`, `cancel` and
    `statistics` may be called from any thread; `step` runs in one at a time.
    """

    def __init__(self, model: "Model", options: EngineOptions | None = None):
        """Allocates the KV cache; nothing is compiled before the first request, or `warm_up`.

        Args:
            model: what continues.
            options: sizes.

        Raises:
            InputError: the model has no tokenizer, or options that do not fit it.
        """
        self.options = options or EngineOptions()
        if model.tokenizer is None:
            raise InputError("the model directory has no tokenizer")
        self.model, self._ends = model, model.end_ids
        self._tokenizer = SharedTokenizer(model.tokenizer, self._ends)
        shape = self.options.shape(model.spec)
        self.context = shape.context
        self._layers = model.spec.architecture.num_layers
        self._batch = Batch(
            model.spec,
            model.params,
            shape,
            jnp.dtype(model.compute_dtype),
            jnp.dtype(jnp.int8) if self.options.kv_cache == "int8" else None,
            self._ends,
        )
        self._schedule = Schedule(self.options.rows, self.options.queue)
        self._counters = Counters()
        self._numbers = itertools.count()
        self._changed = threading.Condition()  # guards the schedule, and tells of requests and cancellations
        self._stepping = threading.Lock()

    def warm_up(self) -> None:
        """Compiles everything that requests will need."""
        with self._stepping:
            self._batch.warm_up()

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt.

        Raises:
            InputError: the tokenizer cannot encode it, or it is empty and there is no beginning-of-sequence token.
        """
        return self._tokenizer.encode(prompt)

    def encode_chat(self, messages: Sequence[Message], template: str | None = None) -> list[int]:
        """Token ids of a conversation; `template` is Jinja, by default the tokenizer's.

        The answer is a text of its own: `RequestOptions(continues=False)`.

        Raises:
            InputError: there is no template, or it refuses the conversation.
        """
        return self._tokenizer.encode_chat(messages, template)

    def submit(
        self, prompt: str | Sequence[int], options: RequestOptions | None = None, listener: Listener | None = None
    ) -> Stream:
        """Takes a request; it runs in `step`.

        Args:
            prompt: text, or token ids.
            options: how it is continued.
            listener: told of its updates instead of the stream, which then cannot be iterated.

        Raises:
            InputError: a prompt or options that cannot be.
            TooLong: prompt and new tokens exceed the context.
            QueueFull: too many requests wait.
        """
        options = options or RequestOptions()
        options.check()
        thresholds = options.thresholds(self.model.spec)
        ids = self.encode(prompt) if isinstance(prompt, str) else list(prompt)
        vocabulary = self.model.spec.architecture.vocab_size
        if not ids or not all(0 <= token < vocabulary for token in ids):
            raise InputError(f"a prompt needs one token or more; allowed: ids from 0 to {vocabulary - 1}")
        if len(ids) + options.max_new_tokens > self.context:
            raise TooLong(
                f"a prompt of {len(ids)} tokens and {options.max_new_tokens} new ones exceed the context of "
                f"{self.context}"
            )
        updates: deque[Update] = deque()
        running = RunningText(self._tokenizer.decode, tuple(options.stop), ids if options.continues else ())
        with self._changed:
            number = next(self._numbers)
            request = Request(number, ids, options, thresholds, listener or updates.append, running)
            self._schedule.add(request)
            self._changed.notify_all()
        return Stream(self, updates, request)

    def cancel(self, request: Request) -> None:
        """Has a request end at the next step."""
        with self._changed:
            request.cancelled = True
            self._changed.notify_all()

    def cancel_all(self) -> None:
        """Has all requests end at the next step."""
        with self._changed:
            for request in self._schedule.requests:
                request.cancelled = True
            self._changed.notify_all()

    @property
    def busy(self) -> bool:
        """Whether requests run or wait."""
        return bool(self._schedule.running or self._schedule.waiting)

    def wait(self, timeout: float) -> bool:
        """Waits for something to do, at most `timeout` seconds or until `wake`; returns whether there is."""
        with self._changed:
            if not self.busy:
                self._changed.wait(timeout)
            return self.busy

    def wake(self) -> None:
        """Ends every `wait`."""
        with self._changed:
            self._changed.notify_all()

    def step(self) -> bool:
        """Lets requests leave and join, runs parts of their prompts, then a chunk for all rows.

        Returns:
            Whether anything is left to do.
        """
        with self._stepping:
            self._drop_cancelled()
            with self._changed:
                self._schedule.admit(self._has_room_for)
            parts = self._run_prompts()
            self._collect(parts, self._decode())
            return self.busy

    def run(self) -> None:
        """Steps until nothing is left to do."""
        while self.step():
            pass

    def abandon(self, reason: FinishReason = "failed") -> None:
        """Ends all requests as they are, without touching the device: nothing can be run after that."""
        with self._changed:
            for request in list(self._schedule.requests):
                self._end(request, reason, 0)
            self._schedule = Schedule(0, 0)
            self._changed.notify_all()

    def statistics(self) -> Statistics:
        """What has been done, and is held."""
        with self._changed:
            running, waiting = len(self._schedule.running), len(self._schedule.waiting)
        counters, batch = self._counters, self._batch
        return Statistics(
            running=running,
            waiting=waiting,
            rows=self.options.rows,
            kv_bytes=batch.used * batch.growth.bytes_per_page,
            kv_bytes_held=batch.held_bytes,
            prompt_tokens=counters.prompt_tokens,
            new_tokens=counters.new_tokens,
            executed_layers=counters.executed_layers,
            layers=counters.layers,
            interruptions=counters.interruptions,
            finished=dict(counters.finished),
            tokens_per_second=counters.tokens_per_second(),
        )

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = [request for request in self._schedule.waiting if request.cancelled]
            for request in dropped:
                self._schedule.waiting.remove(request)
        for request in dropped:
            self._end(request, "cancelled", 0)
        rows = {row: request for row, request in self._schedule.running.items() if request.cancelled}
        for row, request in rows.items():
            self._end(request, "cancelled", self._batch.pages(row))
        self._free(list(rows))

    def _has_room_for(self, request: Request) -> bool:
        """Whether it can start without taking pages that those before it will need in the next chunk."""
        running = self._schedule.running
        if not running:
            return True
        chunk = self.options.chunk
        new = np.zeros(self.options.rows, np.int32)
        for row, other in running.items():
            new[row] = other.unstarted + chunk
        unused = next(row for row in range(self.options.rows) if row not in running)
        new[unused] = request.unstarted + chunk
        return self._batch.fits(new)

    def _run_prompts(self) -> list[Part]:
        """Runs about `width` tokens of prompts, the oldest request's first; whose prompt is done joins the decoding."""
        parts, budget, width = [], self._batch.shape.width, self._batch.shape.width
        while budget > 0:
            starting = {row: other for row, other in self._schedule.running.items() if not other.decoding}
            if not starting:
                break
            row = min(starting, key=lambda row: starting[row].number)
            request = starting[row]
            ids = request.ids[request.started : request.started + width]
            if not self._make_room({row: len(ids)}):
                continue  # it was the youngest, and has lost its row
            execute = self._batch.run_prompt(row, np.asarray(ids, np.int32), request.started, request.thresholds)
            parts.append(Part(request, request.interruptions, len(ids), execute))
            request.started += len(ids)
            if request.unstarted == 0:
                self._join(row, request)
            # Short prompts cost more than their tokens; an eighth is the smallest size that is computed.
            budget -= max(len(ids), width // 8)
        return parts

    def _join(self, row: int, request: Request) -> None:
        options = request.options
        self._batch.join(
            row,
            entry(
                position=request.started,
                threshold=request.thresholds,
                limit=options.max_new_tokens,
                count=len(request.tokens),
                ignore_end=options.ignore_eos,
                seed=options.seed,
                temperature=options.temperature,
                top_p=options.top_p,
            ),
        )
        request.decoding = True

    def _make_room(self, new: dict[int, int]) -> bool:
        """Takes rows from the youngest requests until there are pages for new tokens of some rows.

        Returns:
            Whether all of those rows are still there.
        """
        while True:
            counts = np.zeros(self.options.rows, np.int32)
            rows = [row for row in new if row in self._schedule.running]
            counts[rows] = [new[row] for row in rows]
            if self._batch.fits(counts):
                return len(rows) == len(new)
            with self._changed:
                row = self._schedule.youngest()
                self._schedule.put_back(row).interrupt()
            self._batch.leave([row])
            self._counters.interruptions += 1

    def _decode(self) -> Decoded | None:
        decoding = {row: 1 for row, request in self._schedule.running.items() if request.decoding}
        self._make_room(decoding)
        active = np.zeros(self.options.rows, np.bool_)
        active[[row for row in decoding if row in self._schedule.running]] = True
        if active.any():
            return self._batch.decode(active)
        self._batch.settle()
        return None

    def _collect(self, parts: list[Part], decoded: Decoded | None) -> None:
        """Counts what was executed, and hands new tokens to their requests; those that have ended leave."""
        for part, execute in zip(parts, jax.device_get([part.execute for part in parts]), strict=True):
            executed = int(execute.sum())
            self._counters.ran(executed, part.tokens * self._layers)
            self._counters.prompt_tokens += part.tokens
            if part.interruptions == part.request.interruptions:  # otherwise it will run again
                part.request.count(executed, part.tokens)
        if decoded is None:
            return
        ended = []
        for row, request in self._schedule.running.items():
            if request.decoding and self._advance(row, request, decoded):
                ended.append(row)
        self._free(ended)

    def _advance(self, row: int, request: Request, decoded: Decoded) -> bool:
        """Hands a row's new tokens to its request; returns whether that has ended."""
        tokens = decoded.tokens[row]
        tokens = tokens[tokens >= 0].tolist()
        done = bool(decoded.done[row])
        piece = request.running.add(tokens)
        request.tokens += tokens[: piece.tokens]
        # The last token of a row that is done has not run.
        ran = min(piece.tokens, len(tokens) - done)
        self._counters.gave(piece.tokens)
        executed = int(decoded.execute[row, :ran].sum())
        self._counters.ran(executed, ran * self._layers)
        request.count(executed, ran)
        if not (done or piece.stopped):
            request.say(piece.text)
            return False
        at_end_token = done and tokens[-1] in self._ends and not request.options.ignore_eos
        reason = "stop" if piece.stopped or at_end_token else "length"
        self._end(request, reason, self._batch.pages(row), piece.text)
        return True

    def _end(self, request: Request, reason: FinishReason, pages: int, text: str = "") -> None:
        request.finish(reason, self._layers, pages * self._batch.growth.bytes_per_page, text)
        self._counters.finished[reason] += 1

    def _free(self, rows: list[int]) -> None:
        if rows:
            self._batch.leave(rows)
            with self._changed:
                for row in rows:
                    self._schedule.release(row)
