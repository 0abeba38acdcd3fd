"""The thread in which the engine runs, and what the event loop sees of it."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from qtale_jax.engine.engine import Engine
from qtale_jax.engine.options import RequestOptions
from qtale_jax.engine.requests import Stream, Update

IDLE = 1.0
"""Seconds after which a thread without work looks whether it is to end."""


@dataclass(eq=False)
class Ticket:
    """A request that was taken, for the event loop: its updates, and how to give it up."""

    stream: Stream
    _updates: asyncio.Queue[Update] = field(repr=False)

    def __aiter__(self) -> AsyncIterator[Update]:
        return self._until_finished()

    async def _until_finished(self) -> AsyncIterator[Update]:
        while True:
            update = await self._updates.get()
            yield update
            if update.completion is not None:
                return

    def cancel(self) -> None:
        """Gives the row back; nothing happens if the request is finished."""
        self.stream.cancel()


class Worker:
    """Steps an engine in a thread of its own while there is something to do."""

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None] = lambda error: None):
        """Starts nothing yet.

        Args:
            engine: what is stepped.
            on_failure: called in the thread if a step raises; all requests have ended by then.
        """
        self.engine, self.on_failure = engine, on_failure
        self.failure: BaseException | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its step, and waits for that."""
        self._stopping.set()
        self.engine.wake()
        self._thread.join()

    def submit(self, prompts: Sequence[list[int]], options: Sequence[RequestOptions]) -> list[Ticket]:
        """Takes several requests, or none of them; called in an event loop.

        Raises:
            InputError: as `Engine.submit`.
        """
        loop = asyncio.get_running_loop()
        tickets: list[Ticket] = []
        try:
            for ids, one in zip(prompts, options, strict=True):
                updates: asyncio.Queue[Update] = asyncio.Queue()

                def tell(update: Update, updates: asyncio.Queue[Update] = updates) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens
                        loop.call_soon_threadsafe(updates.put_nowait, update)

                tickets.append(Ticket(self.engine.submit(ids, one, tell), updates))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return tickets

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self.engine.wait(IDLE):
                    self.engine.step()
        except BaseException as error:
            self.failure = error
            self.engine.abandon()
            self.on_failure(error)
