"""Who waits and who has which row: first come, first served, without overtaking."""

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain

from qtale_jax.engine.requests import QueueFull, Request


class Schedule:
    """Requests that wait, in the order of their arrival, and those that have rows. Not thread-safe."""

    def __init__(self, rows: int, queue: int):
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}
        self._free = set(range(rows))
        self._queue = queue

    @property
    def free(self) -> int:
        """Rows that nobody has."""
        return len(self._free)

    @property
    def requests(self) -> Iterable[Request]:
        """Everyone."""
        return chain(self.running.values(), self.waiting)

    def add(self, request: Request) -> None:
        """Lets a request wait.

        Raises:
            QueueFull: it would be one too many.
        """
        if len(self.waiting) >= self._queue + self.free:
            raise QueueFull(
                f"the queue is full: {len(self.running)} requests run and {len(self.waiting)} wait; "
                f"allowed: {self._queue} that wait for a row"
            )
        self.waiting.append(request)

    def admit(self, fits: Callable[[Request], bool]) -> None:
        """Gives free rows to those that have waited longest; who does not fit yet is not overtaken."""
        while self.waiting and self._free and fits(self.waiting[0]):
            row = min(self._free)
            self._free.remove(row)
            self.running[row] = self.waiting.popleft()

    def row_of(self, request: Request) -> int:
        """The row that a running request has."""
        return next(row for row, other in self.running.items() if other is request)

    def youngest(self) -> int:
        """The row whose request came last."""
        return max(self.running, key=lambda row: self.running[row].number)

    def release(self, row: int) -> Request:
        """Takes a row back from its request."""
        self._free.add(row)
        return self.running.pop(row)

    def put_back(self, row: int) -> Request:
        """Lets a request that has a row wait again, before all that came after it."""
        request = self.release(row)
        # Those that wait came later, but for others that were put back.
        place = sum(other.number < request.number for other in self.waiting)
        self.waiting.insert(place, request)
        return request
