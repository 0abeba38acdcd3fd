"""One run, one process: a second one that is started on the same folder is told so."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtale_jax.errors import InputError
from qtale_jax.parallel.processes import is_first


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Holds the folder of a run, by its run.json, for this process or for the processes of this run.

    The system lets the lock go however the process ends. File systems that have no locks are taken at the user's word.

    Raises:
        InputError: another process holds it.
    """
    if not is_first():
        yield
        return
    with (directory / "run.json").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"another process is training in {directory}; allowed: another output, or wait for its end"
            ) from error
        except OSError:  # no locks here
            pass
        yield
