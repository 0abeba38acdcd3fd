"""The process: a socket, signals, an end that lets accepted requests finish."""

import asyncio
import socket
import sys
import traceback
from types import FrameType

import uvicorn

from qtale_jax.errors import InputError
from qtale_jax.serving.app import application
from qtale_jax.serving.service import Service

BACKLOG = 2048
"""Connections that wait for the event loop."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that has its address, and on which nothing is accepted yet; port 0: any that is free.

    Raises:
        InputError: the address is not to be had.
    """
    found = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        return found
    except (OSError, UnicodeError) as error:
        found.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"serve.host={host}, serve.port={port}: {reason}; allowed: a free port of this machine"
        ) from error


def address(listener: socket.socket) -> str:
    """The URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Server(uvicorn.Server):
    """Uvicorn, but for SIGTERM and SIGINT: first accepted requests finish while new ones get 503; then it ends.

    A second signal ends it at once.
    """

    def __init__(self, service: Service, grace: float):
        config = uvicorn.Config(
            application(service),
            # Uvicorn's logging configuration would close the handlers of everyone else.
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            backlog=BACKLOG,
            timeout_graceful_shutdown=5,
        )
        super().__init__(config)
        self._service, self._grace = service, grace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the engine, listens, and says where."""
        self._loop = asyncio.get_running_loop()
        self._service.worker.on_failure = self._failed
        self._service.worker.start()
        await super().startup(sockets)
        for listener in sockets or []:
            print(f"serving {self._service.name} on {address(listener)}", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to end; called for every signal."""
        if self._loop is None or self._service.draining:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin_to_end)

    def _begin_to_end(self) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._end())

    async def _end(self) -> None:
        print("shutting down: accepted requests finish, new ones are refused", file=sys.stderr, flush=True)
        if not await self._service.drain(self._grace):
            print(f"requests were ended after serve.grace={self._grace:g} seconds", file=sys.stderr, flush=True)
        self.should_exit = True

    def _failed(self, error: BaseException) -> None:
        """In the engine's thread: nothing can be answered any more."""
        traceback.print_exception(error)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._begin_to_end)


def serve(service: Service, listener: socket.socket, grace: float) -> int:
    """Answers requests until a signal; returns the exit code: 0, or 1 if the engine failed.

    Args:
        service: what answers; its worker is started and stopped here.
        listener: a bound socket.
        grace: seconds that accepted requests have after the signal.
    """
    Server(service, grace).run([listener])
    service.worker.stop()
    return 1 if service.worker.failure else 0
