"""Stand-ins for the programs that launch files start, and a run that takes seconds."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qtale_jax.data import reasoning

RECORDER = """#!/bin/sh
printf '%s\\0' "$(basename "$0")" "$@" >>"$RECORD"
printf '\\036' >>"$RECORD"
"""
SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 2}


def executable(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


@pytest.fixture
def programs(tmp_path) -> Callable[..., Path]:
    """Writes programs, text by name, into a folder that `recorded` and `environment` put first on the PATH."""

    def write(folder: Path = tmp_path / "bin", /, **texts: str) -> Path:
        for name, text in texts.items():
            executable(folder / name, text)
        return folder

    write(python=f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    return write


@pytest.fixture
def environment(tmp_path, programs, process_environment) -> Callable[..., dict[str, str]]:
    """The environment of a process on two devices that finds the stand-ins; keywords are more variables.

    What tells the scripts of this very test run which environment is theirs (`QTALE_*`) is left out.
    """

    def build(**variables: str) -> dict[str, str]:
        path = {"PATH": f"{programs()}{os.pathsep}{os.environ['PATH']}", "RECORD": str(tmp_path / "record")}
        own = {name: value for name, value in process_environment(devices=2).items() if not name.startswith("QTALE_")}
        return own | path | variables

    return build


@pytest.fixture
def recorded(tmp_path, programs, environment) -> Callable[..., list[list[str]]]:
    """Runs a command in which programs of these names only note how they are called; returns name and arguments."""

    def run(command: list[str | Path], *names: str, folder: Path | None = None, variables=None, **settings):
        record = tmp_path / "record"
        record.write_text("")
        programs(folder or tmp_path / "bin", **dict.fromkeys(names, RECORDER))
        done = subprocess.run(
            command, env=environment(**(variables or {})), capture_output=True, text=True, timeout=300, **settings
        )
        assert done.returncode == 0, done.stderr
        return [call.split("\0")[:-1] for call in record.read_text().split("\036")[:-1]]

    return run


@pytest.fixture
def small(tmp_path) -> Path:
    """The configuration of a run of a few seconds; its output is `run` beside it."""
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 6]) for i in range(30)))
    config = {
        "output": str(tmp_path / "run"),
        "model": {"architecture": {**SHAPE, "max_length": 32}},
        "routing": {"method": "dense"},
        "data": {"kind": "text", "path": str(tmp_path / "text.txt"), "length": 16, "held_out": 0},
        "train": {"steps": 2, "batch_size": 8, "parameters": "all"},
        "distributed": {"enabled": True, "timeout_s": 60},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file
