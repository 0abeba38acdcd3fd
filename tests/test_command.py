"""Entry points: arguments, help, exit codes, one line of error."""

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qtale_jax import __main__ as listing
from qtale_jax.command import STAGES, parse, run, stage_parser
from qtale_jax.config import Config, resolve
from qtale_jax.errors import InputError


@pytest.fixture
def config_file(tmp_path):
    """A small valid configuration."""
    path = tmp_path / "small.yaml"
    path.write_text("seed: 5\ntrain: {steps: 3}\n")
    return path


def exit_code(main):
    with pytest.raises(SystemExit) as caught:
        run(main)
    return caught.value.code


def test_overrides_may_stand_on_either_side_of_options(config_file, capsys):
    assert parse("train", "", [str(config_file), "train.steps=4", "lora=null"]).train.steps == 4
    with pytest.raises(SystemExit) as caught:
        parse("train", "", [str(config_file), "seed=7", "--print-config", "train.steps=9"])
    assert caught.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["seed"], printed["train"]["steps"]) == (7, 9)
    assert set(printed) == set(resolve(Config()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no CONFIG given"),
        (["c.yaml", "--steps"], "unrecognized arguments: --steps"),
        (["c.yaml", "--print"], "unrecognized arguments: --print"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(InputError, match=f"^command line: {message}; see python -m qtale_jax.train --help$"):
        parse("train", "", arguments)


def test_help_lists_the_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    text = stage_parser("train", STAGES["train"]).format_help()
    assert text.startswith("usage: python -m qtale_jax.train")
    assert STAGES["train"] in text
    assert "routing.entropy_weight" in text


def test_exit_codes(capsys):
    def fail(error):
        def main():
            raise error

        return main

    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 3) == 3
    assert exit_code(fail(InputError("file: key:\n  found x"))) == 2
    assert capsys.readouterr().err == "error: file: key: found x\n"
    assert exit_code(fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"
    with pytest.raises(ZeroDivisionError):
        run(fail(ZeroDivisionError()))


def test_stages_are_listed(capsys):
    listing.main([])
    out = capsys.readouterr().out
    for stage, description in STAGES.items():
        assert f"{stage} " in out
        assert description in out


@pytest.mark.parametrize("stage", STAGES)
def test_every_listed_stage_is_there(stage):
    assert importlib.util.find_spec(f"qtale_jax.{stage}") is not None


@pytest.mark.parametrize("stage", STAGES)
def test_help_of_every_stage_needs_no_jax(stage, run_module):
    result = run_module("qtale_jax." + stage, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"python -m qtale_jax.{stage}" in result.stdout


def test_configuration_is_read_without_jax(config_file):
    program = (
        "import sys; from qtale_jax.command import parse; "
        f"parse('train', '', [{str(config_file)!r}]); sys.exit('jax' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("train: {stepps: 3}\n", [], "small.yaml: train.stepps: unknown key (did you mean 'steps'?)"),
        ("seed: 1\n", ["routing.target=2"], "command line: routing.target: found 2; allowed: number >= 0, <= 1"),
        ("quantize: {bits: 16}\n", [], "bits=16 does not go with method='rtn'"),
        ("", [], "small.yaml: the file is empty"),
        ("a: [1\n", [], "line 2: invalid YAML"),
        ("routing: {always_on_layers: 12}\n", [], "leaves no routed layer of 10"),
    ],
)
def test_bad_configurations_end_with_code_2_and_one_line(run_module, config_file, text, overrides, message):
    config_file.write_text(text)
    before = sorted(config_file.parent.iterdir())
    result = run_module("qtale_jax.train", config_file, *overrides)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert sorted(config_file.parent.iterdir()) == before


def test_a_missing_file_and_a_closed_pipe(run_module, config_file):
    assert run_module("qtale_jax.train", "nowhere.yaml").returncode == 2
    command = f"{sys.executable} -m qtale_jax.train {config_file} --print-config | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert (result.stdout, result.stderr) == ("output: runs/default\n", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_one_line(capsys):
    def main():
        with open("/dev/full", "w") as file:
            file.write("x")

    assert exit_code(main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "No space left on device" in line and "what was complete before is kept" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_the_code_is_right_where_even_the_error_finds_no_room(process_environment):
    program = "from qtale_jax.command import run; run(lambda: open('/dev/full', 'w').write('x' * 100_000))"
    with open("/dev/full", "w") as full:
        found = subprocess.run([sys.executable, "-c", program], stderr=full, env=process_environment(), timeout=300)
    assert found.returncode == 2


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x"),
        ValueError('RESOURCE_EXHAUSTED: Error writing "x": No space left on device'),
    ],
)
def test_the_disk_is_found_behind_what_libraries_raise(error, capsys):
    def main():
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("saving failed") from inner

    assert exit_code(main) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


FAILING_WRITES = """
import asyncio, atexit, errno, tensorstore, threading
from qtale_jax.command import run

def fail():
    raise OSError(errno.ENOSPC, "No space left on device", "params")

def closed():
    raise OSError("handle is closed")

def main():
    atexit.register(fail)
    atexit.register(closed)
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    loop = asyncio.new_event_loop()
    promise, write = tensorstore.Promise.new()
    write.add_done_callback(lambda _: loop.call_soon_threadsafe(print))
    loop.close()
    promise.set_result(1)
    fail()

run(main)
"""


def test_writes_beside_the_one_that_failed_leave_no_traceback(process_environment):
    found = subprocess.run(
        [sys.executable, "-c", FAILING_WRITES], capture_output=True, text=True, env=process_environment(), timeout=300
    )
    assert found.returncode == 2
    assert found.stderr.splitlines() == [
        "warning: params: No space left on device",
        "error: params: No space left on device; what was complete before is kept",
    ]


def test_other_errors_of_threads_keep_their_traceback(process_environment):
    program = (
        "import threading; from qtale_jax.command import run; run(lambda: threading.Thread(target=[].pop).start())"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=process_environment(), timeout=300
    )
    assert "IndexError: pop from empty list" in found.stderr


def test_other_errors_keep_their_traceback():
    def main():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "a file of our own")

    with pytest.raises(FileNotFoundError):
        run(main)
