"""A tiny run: three layers of width 16 on rows of words, as configuration, as batch, and as a real process."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from qtale_jax.config.schema import Config
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.training.loop import sharded_batch
from qtale_jax.training.optimizer import build_optimizer
from qtale_jax.training.start import Start, place_state, prepare
from qtale_jax.training.step import TrainState, TrainStep

LENGTH, ROWS = 12, 8


def merged(base: dict, overrides: dict) -> dict:
    out = copy.deepcopy(base)
    for name, value in overrides.items():
        both = isinstance(value, dict) and isinstance(out.get(name), dict)
        out[name] = merged(out[name], value) if both else value
    return out


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """Sixty questions in the closed vocabulary of the reasoning suite."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        a, b = rng.integers(0, 15, 2).tolist()
        rows.append({"query": f"sum : {a} {b} =", "choices": [str(a + b), str(a + b + 1)], "gold": 0})
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def settings(data_file) -> Callable[..., dict[str, Any]]:
    """The configuration as plain data; keywords are laid over it, section by section."""
    base = {
        "model": {
            "architecture": {
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_layers": 3,
                "num_heads": 4,
                "num_kv_heads": 2,
                "max_length": 16,
                "vocab_size": 60,
            }
        },
        "routing": {"router_hidden": 8, "always_on_layers": 1, "always_on_tokens": 1},
        "lora": {"rank": 2, "dropout": 0.0},
        "data": {
            "kind": "multiple_choice",
            "path": str(data_file),
            "length": LENGTH,
            "held_out": 0.2,
            "loss_on": "all",
        },
        "train": {
            "steps": 4,
            "batch_size": ROWS,
            "parameters": "all",
            "log_every": 1,
            "checkpoint_every": 100,
            "evaluate_batches": 1,
        },
    }
    return lambda **sections: merged(base, sections)


@pytest.fixture(scope="session")
def make_config(settings) -> Callable[..., Config]:
    return lambda **sections: Config.model_validate(settings(**sections))


class Trainer:
    """A prepared run whose steps a test takes by hand."""

    def __init__(self, config: Config, devices: list | None = None):
        self.config = config
        self.mesh = build_mesh(config.mesh, devices or jax.devices()[:1])
        self.steps = config.train.steps or 1
        with jax.set_mesh(self.mesh):
            self.start: Start = prepare(config, self.mesh, jax.random.key(config.seed))
            self.optimizer = build_optimizer(config.train.optimizer, self.steps)
            self.state: TrainState = place_state(self.start, self.optimizer, self.mesh)
        self.step = TrainStep(self.start.spec, config, self.optimizer, self.steps)
        self.compiled = jax.jit(self.step)
        self.teacher = None

    def advance(self, batch: dict[str, np.ndarray], seed: int = 0) -> dict[str, Any]:
        """One step; returns the metrics."""
        with jax.set_mesh(self.mesh):
            placed = sharded_batch(self.mesh, batch)
            self.state, metrics = self.compiled(
                self.state, self.start.frozen, self.teacher, placed, jax.random.key(seed)
            )
        return jax.device_get(metrics)


@pytest.fixture(scope="session")
def trainer(make_config) -> Callable[..., Trainer]:
    """Prepares a run; `devices` are those of its mesh (default: one)."""
    return lambda devices=None, **sections: Trainer(make_config(**sections), devices)


@pytest.fixture
def batch(rng) -> dict[str, np.ndarray]:
    """Eight rows of 12 tokens; the last four tokens are padding."""
    tokens = rng.integers(3, 56, (ROWS, LENGTH)).astype(np.int32)
    segments = np.ones((ROWS, LENGTH), np.int32)
    segments[:, -4:] = 0
    weights = (segments > 0).astype(np.float32)
    weights[:, -5] = 0
    return {"tokens": tokens, "targets": np.roll(tokens, -1, 1), "weights": weights, "segment_ids": segments}


@pytest.fixture
def run_folder(tmp_path, settings) -> Callable[..., Path]:
    """Writes a configuration file whose output is in the test's folder."""

    def write(name: str, **sections) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(settings(**sections) | {"output": str(tmp_path / name)}))
        return file

    return write


@pytest.fixture(scope="session")
def training_command() -> Callable[..., list[str]]:
    """The command that trains with the given arguments."""
    return lambda *arguments: [sys.executable, "-m", "qtale_jax.train", *map(str, arguments)]


@pytest.fixture(scope="session")
def run_once(process_environment, training_command) -> Callable[[Path, dict[str, Any]], None]:
    """Trains in a process from `folder`/config.yaml, which is written with the given settings."""

    def run(folder: Path, settings: dict[str, Any]) -> None:
        file = folder / "config.yaml"
        file.write_text(yaml.safe_dump(settings))
        done = subprocess.run(
            training_command(file),
            cwd=folder,
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    return run


@pytest.fixture
def training_process(tmp_path, process_environment, training_command) -> Callable[..., Any]:
    """Starts `python -m qtale_jax.train CONFIG ...`; a context with the process, its log on stderr."""

    @contextmanager
    def start(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
        process = subprocess.Popen(
            training_command(*arguments),
            cwd=tmp_path,
            env=process_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    return start
