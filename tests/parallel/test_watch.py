"""The watch over a key-value store in memory: who ends, with what line and code."""

import os

import pytest

from qtale_jax.errors import InputError
from qtale_jax.parallel import watch as module
from qtale_jax.parallel.watch import ProcessesError, Watch


class Store:
    """Stands for the store of `jax.distributed`."""

    def __init__(self):
        self.values = {}

    def key_value_set(self, key, value, allow_overwrite=False):
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise RuntimeError(f"NOT_FOUND: {key}")
        return self.values[key]

    def key_value_dir_get(self, prefix):
        return [(key, value) for key, value in list(self.values.items()) if key.startswith(prefix)]


@pytest.fixture(autouse=True)
def _exits(monkeypatch) -> None:
    """A process that leaves raises, and gives no long farewell to processes that are gone."""

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "_FAREWELL_S", 0.2)


@pytest.fixture
def store() -> Store:
    return Store()


def fail(watch: Watch, error: BaseException) -> int | str | None:
    """The code that a process leaves with for an error of its own."""
    with pytest.raises(SystemExit) as stop:
        watch.fail(error)
    return stop.value.code


def listen(watch: Watch) -> int | str | None:
    """The code that a process leaves with for what it hears."""
    with pytest.raises(SystemExit) as stop:
        watch.listen()
    return stop.value.code


def test_bad_input_is_said_by_all(store, capsys):
    assert fail(Watch(store, 1, 2, timeout_s=10), InputError("x is\nwrong")) == 2
    assert capsys.readouterr().err == "error: x is wrong\n"
    assert listen(Watch(store, 0, 2, timeout_s=10)) == 2
    assert capsys.readouterr().err == "error: process 1 of 2: x is wrong\n"


def test_what_failed_first_is_what_others_say(store, capsys):
    assert fail(Watch(store, 2, 3, timeout_s=10), InputError("first")) == 2
    assert fail(Watch(store, 1, 3, timeout_s=10), InputError("second")) == 2
    assert fail(Watch(store, 0, 3, timeout_s=10), ProcessesError("nobody comes")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: process 2 of 3: first"


def test_silence_ends_a_run(store, capsys):
    store.values["qtale_jax/alive/1"] = "7"
    assert listen(Watch(store, 0, 2, timeout_s=0.2)) == 1
    assert capsys.readouterr().err.startswith("error: process 1 of 2 is gone: killed")


@pytest.mark.slow
def test_an_error_that_another_process_caused_is_not_its_own(store, capsys):
    store.values["qtale_jax/alive/1"] = "7"
    assert fail(Watch(store, 0, 2, timeout_s=1), ValueError("connection reset by peer")) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: process 1 of 2 is gone") and len(message.splitlines()) == 1


@pytest.mark.slow
def test_an_error_of_its_own_has_its_traceback_and_is_told(store, capsys):
    assert fail(Watch(store, 0, 2, timeout_s=1), ValueError("a bug")) == 1
    assert "error: ValueError('a bug')" in capsys.readouterr().err
    assert listen(Watch(store, 1, 2, timeout_s=1)) == 1
    assert capsys.readouterr().err == "error: process 0 of 2: ValueError('a bug')\n"


def test_a_run_that_ends_well_ends_nobody(store):
    pair = [Watch(store, index, 2, timeout_s=1) for index in range(2)]
    for watch in pair:
        watch.start()
    for watch in pair:
        watch.stop()
    assert set(store.values) == {"qtale_jax/alive/0", "qtale_jax/alive/1"}
