"""SIGTERM: the loop saves and leaves, all processes after the same step, and without a queue of steps to wait for."""

import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point


class Interrupted(Exception):
    """SIGTERM arrived; the state has been saved."""


@contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the number of finished steps: whether to save now and leave.

    It has to be asked after every step. With several processes, JAX listens for the signal, and lets them agree in the
    background on a step that none of them has passed; asking costs nothing. In one process only the main thread may
    install handlers; in others the answer is never.
    """
    if jax.process_count() > 1:
        yield reached_preemption_sync_point
        return
    stop, previous = threading.Event(), None
    if threading.current_thread() is threading.main_thread():
        previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield lambda step: stop.is_set()
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


class RunAhead:
    """Bounds how many steps are dispatched before an earlier one is done.

    Dispatching returns at once, so a host would queue all steps up to the next one whose numbers it reads, and could
    not save before they are done. Two steps keep devices busy, and SIGTERM waits for no more than those.
    """

    def __init__(self, steps: int = 2):
        """`steps` may be under way when the next one is dispatched."""
        self._steps = steps
        self._under_way: deque[jax.Array] = deque()

    def dispatched(self, result: jax.Array) -> None:
        """Notes a result of the step that was dispatched last; waits for that of the one `steps` before it."""
        self._under_way.append(result)
        if len(self._under_way) > self._steps:
            jax.block_until_ready(self._under_way.popleft())
