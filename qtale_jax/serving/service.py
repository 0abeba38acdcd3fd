"""What all requests of a server share."""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence

from qtale_jax.config.serving import ServeConfig
from qtale_jax.engine.engine import Engine
from qtale_jax.engine.options import RequestOptions
from qtale_jax.serving import errors
from qtale_jax.serving.metrics import Metrics
from qtale_jax.serving.worker import Ticket, Worker

LAST_SECONDS = 5.0
"""What requests have, when their time is over, to tell their clients."""


class Service:
    """An engine that runs, the limits of requests, and whether new ones are still taken."""

    def __init__(self, engine: Engine, name: str, config: ServeConfig, chat_template: str | None = None):
        """Starts nothing.

        Args:
            engine: warmed up, if the first request is not to wait for that.
            name: of the model in requests.
            config: limits.
            chat_template: Jinja; None: the tokenizer's.
        """
        self.engine, self.name, self.chat_template = engine, name, chat_template
        self.max_body_bytes, self.max_new_tokens = config.max_body_bytes, config.max_new_tokens
        self.timeout = config.timeout
        self.created = int(time.time())
        self.metrics, self.worker = Metrics(engine), Worker(engine)
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Counts a request while it is answered.

        Raises:
            APIError: no new ones are taken.
        """
        if self.worker.failure is not None:
            raise errors.failed()
        if self.draining:
            raise errors.shutting_down()
        self._open += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._open -= 1
            if not self._open:
                self._idle.set()

    def submit(self, prompts: Sequence[list[int]], options: Sequence[RequestOptions]) -> list[Ticket]:
        """Takes the prompts of a request, or none of them; see `Worker.submit`."""
        return self.worker.submit(prompts, options)

    async def drain(self, grace: float) -> bool:
        """Takes no new requests and waits for those that are open; after `grace` seconds they are ended.

        Returns:
            Whether all of them came to their own end.
        """
        self.draining = True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), grace)
            return True
        self.engine.cancel_all()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), LAST_SECONDS)
        return False
