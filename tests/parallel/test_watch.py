"""The watch over a key-value store in memory: who ends, with what line and code."""

import os
import threading

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


@pytest.fixture
def exits(monkeypatch) -> dict[str, int]:
    """Exit codes by thread, instead of exits; and no long farewell to processes that are gone."""
    codes = {}

    def leave(code):
        codes[threading.current_thread().name] = code
        raise SystemExit(code)  # ends a thread silently

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(module, "_FAREWELL_S", 0.2)
    return codes


@pytest.fixture
def store() -> Store:
    return Store()


def fail(watch: Watch, error: BaseException) -> int:
    with pytest.raises(SystemExit) as stop:
        watch.fail(error)
    return stop.value.code


def runs_until_it_leaves(watch: Watch) -> None:
    watch.start()
    threads = [thread for thread in threading.enumerate() if "watch" in thread.name]
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_bad_input_is_said_by_all(store, exits, capsys):
    assert fail(Watch(store, 1, 2, timeout_s=10), InputError("x is\nwrong")) == 2
    assert capsys.readouterr().err == "error: x is wrong\n"
    runs_until_it_leaves(Watch(store, 0, 2, timeout_s=10))
    assert set(exits.values()) == {2}
    assert capsys.readouterr().err == "error: process 1 of 2: x is wrong\n"


def test_what_failed_first_is_what_others_say(store, exits, capsys):
    assert fail(Watch(store, 2, 3, timeout_s=10), InputError("first")) == 2
    assert fail(Watch(store, 1, 3, timeout_s=10), InputError("second")) == 2
    assert fail(Watch(store, 0, 3, timeout_s=10), ProcessesError("nobody comes")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: process 2 of 3: first"


def test_silence_ends_a_run(store, exits, capsys):
    store.values["qtale_jax/alive/1"] = "7"
    runs_until_it_leaves(Watch(store, 0, 2, timeout_s=0.2))
    assert set(exits.values()) == {1}
    assert capsys.readouterr().err.startswith("error: process 1 of 2 is gone: killed")


def test_an_error_that_another_process_caused_is_not_its_own(store, exits, capsys):
    store.values["qtale_jax/alive/1"] = "7"
    assert fail(Watch(store, 0, 2, timeout_s=1), ValueError("connection reset by peer")) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: process 1 of 2 is gone") and len(message.splitlines()) == 1


def test_an_error_of_its_own_has_its_traceback_and_is_told(store, exits, capsys):
    other = Watch(store, 1, 2, timeout_s=1)
    other.start()
    assert fail(Watch(store, 0, 2, timeout_s=1), ValueError("a bug")) == 1
    assert "error: ValueError('a bug')" in capsys.readouterr().err
    assert "process 0 of 2: ValueError('a bug')" in store.values["qtale_jax/failed"]
    other.stop()


def test_a_run_that_ends_well_ends_nobody(store, exits):
    pair = [Watch(store, index, 2, timeout_s=1) for index in range(2)]
    for watch in pair:
        watch.start()
    for watch in pair:
        watch.stop()
    assert exits == {} and set(store.values) == {"qtale_jax/alive/0", "qtale_jax/alive/1"}
