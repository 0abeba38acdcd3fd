"""Several processes that train as one: they meet, agree, wait for each other with a time limit, and end together.

In one process nothing here does anything, so that callers need not ask how many there are.
"""

import itertools
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import jax
from jax._src import distributed  # the key-value store and the barriers of jax.distributed have no public name

from qtale_jax.config.distributed import DistributedConfig
from qtale_jax.errors import InputError
from qtale_jax.parallel.watch import ProcessesError, Watch

_TIMEOUT_S = DistributedConfig().timeout_s


class _Run:
    """What this process knows of the run that it has joined."""

    watch: Watch | None = None
    timeout_s: float = _TIMEOUT_S
    meetings = itertools.count()


@contextmanager
def processes(config: DistributedConfig) -> Iterator[None]:
    """Joins the other processes for the length of the block; without `enabled`, does nothing.

    Has to be entered before JAX is used. An error in the block ends all processes, each with its message: exit code 2
    for an `InputError`, 1 for others.

    Raises:
        InputError: no cluster is known, or the coordinator refuses. A process that waits for others longer than
            `timeout_s` says so and ends with code 2.
    """
    if not config.enabled:
        yield
        return
    _join(config)
    state = distributed.global_state
    _Run.timeout_s = config.timeout_s
    _Run.watch = Watch(state.client, state.process_id, state.num_processes, config.timeout_s)
    _Run.watch.start()
    with together():
        if not is_first():  # one process speaks for all
            logging.getLogger("qtale_jax").setLevel(logging.ERROR)
        yield
        wait_for_all("the end")
    _Run.watch.stop()
    _Run.watch = None
    jax.distributed.shutdown()


def _join(config: DistributedConfig) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    explicit = None not in (config.coordinator, config.processes, config.process_id)
    late = threading.Timer(config.timeout_s, _not_all_came, (config.timeout_s,))  # JAX would abort without a word
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.processes,
            config.process_id,
            # What a cluster would add is which devices are this process's; those who say everything mean all.
            cluster_detection_method="deactivate" if explicit else None,
            initialization_timeout=config.timeout_s + 30,
            # The watch is to be first, since it can say what happened.
            heartbeat_timeout_seconds=2 * config.timeout_s + 30,
            shutdown_timeout_seconds=config.timeout_s,
        )
    except ValueError as error:
        raise InputError(
            "distributed.enabled=true: no Slurm, Open MPI, Cloud TPU or GKE job is found here; "
            "allowed: distributed.coordinator=HOST:PORT, distributed.processes and distributed.process_id"
        ) from error
    except RuntimeError as error:
        raise InputError(f"distributed: the processes cannot meet: {str(error).splitlines()[0][:200]}") from error
    finally:
        late.cancel()


def _not_all_came(timeout_s: int) -> NoReturn:
    """Ends this process, whose main thread waits inside JAX."""
    print(
        f"error: distributed.timeout_s={timeout_s}: not all processes came within this time to the coordinator, "
        f"{distributed.global_state.coordinator_address}",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


@contextmanager
def together(*shared: type[BaseException]) -> Iterator[None]:
    """An error in the block ends all processes, before this one waits for others in vain; in one process it is raised.

    Args:
        shared: errors that all processes run into at the same point; they are raised.
    """
    try:
        yield
    except BaseException as error:
        if _Run.watch is None or isinstance(error, shared):
            raise
        _Run.watch.fail(error)


def is_first() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return jax.process_index() == 0


def check_joined() -> None:
    """Refuses devices of other processes that have not been joined.

    Raises:
        InputError: the devices belong to several processes, and `distributed.enabled` is false.
    """
    if jax.process_count() > 1 and distributed.global_state.client is None:
        raise InputError(
            f"the devices belong to {jax.process_count()} processes; allowed: distributed.enabled=true in all of them"
        )


def wait_for_all(what: str) -> None:
    """Returns when all processes have come to this point.

    Raises:
        ProcessesError: they have not within `distributed.timeout_s`.
    """
    if jax.process_count() == 1:
        return
    name = f"qtale_jax/{next(_Run.meetings)}/{what}"
    try:
        _client().wait_at_barrier(name, int(1000 * _Run.timeout_s))
    except RuntimeError as error:
        raise ProcessesError(_late(what, error)) from error


def from_first(what: str, value: Any) -> Any:
    """The value that process 0 has, in all processes; JSON.

    Raises:
        ProcessesError: it has not been heard of within `distributed.timeout_s`.
    """
    if jax.process_count() == 1:
        return value
    name = f"qtale_jax/{next(_Run.meetings)}/{what}"
    client = _client()
    try:
        if is_first():
            client.key_value_set(name, json.dumps(value))
            return value
        return json.loads(client.blocking_key_value_get(name, int(1000 * _Run.timeout_s)))
    except RuntimeError as error:
        raise ProcessesError(_late(what, error)) from error


def _client() -> Any:
    return distributed.global_state.client


def _late(what: str, error: RuntimeError) -> str:
    text = str(error)
    if "DEADLINE_EXCEEDED" in text:
        return f"the processes did not all come to {what!r} within distributed.timeout_s={_Run.timeout_s:g} seconds"
    return f"the processes lost each other at {what!r}: {text.splitlines()[0][:200]}"
