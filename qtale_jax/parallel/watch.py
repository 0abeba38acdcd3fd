"""The end of a run in several processes: when one fails or falls silent, all end, each with the reason in one line.

A process that waits in a collective operation for one that is gone may wait for ever, and cannot be interrupted from
Python. So every process has a thread that tells the others that it lives, listens for what has failed, and ends its
process. Everything goes through the key-value store of `jax.distributed`, which process 0 keeps; process 0 therefore
leaves last, and also watches for processes that have fallen silent. When process 0 itself is killed, JAX ends the
others at once, with a message of its own.
"""

import contextlib
import itertools
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from qtale_jax.errors import InputError

_ALIVE, _FAILED, _SEEN = "qtale_jax/alive/", "qtale_jax/failed", "qtale_jax/seen/"
_FAREWELL_S = 5.0
"""How long process 0 keeps the store up for those that have not heard yet."""

_GONE = (
    "is gone: killed, out of memory, or cut off; the last checkpoint is kept, and the same command in all processes "
    "goes on from it"
)

Heard = dict[int, tuple[str, float]]
"""By process: its last sign of life, and when it was new here."""


class ProcessesError(Exception):
    """The processes of a run did not come together, or lost each other; the message is one line."""


@dataclass(frozen=True)
class Failure:
    """What ended a run: the line that all processes print, and their exit code."""

    text: str
    code: int


class Watch:
    """The thread that speaks and listens for one process.

    Args:
        client: of the key-value store.
        process: number of this process, from 0.
        processes: how many there are.
        timeout_s: seconds without a sign of life after which a process counts as gone.
    """

    def __init__(self, client: Any, process: int, processes: int, timeout_s: float):
        self._client, self._process, self._processes, self._timeout_s = client, process, processes, timeout_s
        self._period = min(max(timeout_s / 20, 0.5), 2.0)
        self._stopping, self._leaving = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self.listen, name="qtale_jax watch", daemon=True)

    def start(self) -> None:
        """Speaks and listens in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; from then on nothing ends this process."""
        self._stopping.set()
        self._thread.join(self._period)

    def fail(self, error: BaseException) -> NoReturn:
        """Ends this process, and with it all others, for an error that it ran into."""
        self._leaving.acquire()  # and never released: the thread is not to end this process meanwhile
        failure = None
        if isinstance(error, InputError):
            own = Failure(_line(error), 2)
        elif isinstance(error, KeyboardInterrupt):
            own = Failure("interrupted", 130)
        else:  # perhaps only the consequence of what happened in another process
            failure = self._cause()
            own = Failure(_line(error) if isinstance(error, ProcessesError) else repr(error)[:500], 1)
            if failure is None and not isinstance(error, ProcessesError):
                traceback.print_exception(error)
        if failure is None:
            self._tell(Failure(f"{self._name(self._process)}: {own.text}", own.code))
        self._exit(failure or own)

    def listen(self) -> None:
        """Speaks and listens until it is stopped, or ends this process."""
        heard: Heard = {}
        for beat in itertools.count():
            try:
                self._client.key_value_set(f"{_ALIVE}{self._process}", str(beat), allow_overwrite=True)
                failure = self._told()
                if failure is None and self._process == 0 and (failure := self._silent(heard, self._timeout_s)):
                    self._tell(failure)
            except RuntimeError:  # the store is gone, and with it process 0: JAX ends this process
                return
            if failure is not None:
                self._leaving.acquire()  # waits for ever where the main thread is ending this process
                self._exit(failure)
            if self._stopping.wait(self._period):
                return

    def _tell(self, failure: Failure) -> None:
        """Lets the others know; what was told first stays."""
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(_FAILED, json.dumps(asdict(failure)))

    def _told(self) -> Failure | None:
        """What has been told, if anything."""
        try:
            return Failure(**json.loads(self._client.key_value_try_get(_FAILED)))
        except RuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    def _silent(self, heard: Heard, timeout_s: float) -> Failure | None:
        """A process whose last sign of life, among those in `heard`, is older than `timeout_s`."""
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get(_ALIVE):
            process = int(key.rsplit("/", 1)[-1])
            last, since = heard.get(process, (None, now))
            if last != beat:
                heard[process] = beat, now
            elif now - since > timeout_s:
                return Failure(f"{self._name(process)} {_GONE}", 1)
        return None

    def _cause(self) -> Failure | None:
        """What happened elsewhere, as far as it shows within a few signs of life."""
        heard: Heard = {}
        end = time.monotonic() + 5 * self._period
        with contextlib.suppress(RuntimeError):
            while time.monotonic() < end:
                if failure := self._told():
                    return failure
                if failure := self._silent(heard, 3.5 * self._period):
                    self._tell(failure)
                    return failure
                time.sleep(self._period / 4)
        return None

    def _exit(self, failure: Failure) -> NoReturn:
        """Ends this process without what Python does at exit, which would wait for the others."""
        print(failure.text if failure.code == 130 else f"error: {failure.text}", file=sys.stderr)
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{_SEEN}{self._process}", "", allow_overwrite=True)
            end = time.monotonic() + _FAREWELL_S
            while self._process == 0 and time.monotonic() < end:
                if len(self._client.key_value_dir_get(_SEEN)) == self._processes:
                    break
                time.sleep(0.1)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(failure.code)

    def _name(self, process: int) -> str:
        return f"process {process} of {self._processes}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
