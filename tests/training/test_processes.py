"""Two processes of four devices each train as one process of eight does, and end together."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from qtale_jax.artifact import load_model, save_model
from qtale_jax.artifact.arrays import flatten
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.training.start import architecture_from

pytestmark = [pytest.mark.slow, pytest.mark.first]

STEPS = 8
MESH = {"data": 2, "fsdp": 2, "tensor": 2}
TRAIN = {"steps": STEPS, "checkpoint_every": 3, "evaluate_every": 4, "parameters": "adapters"}
MEASURED = {"tokens_per_second", "steps_per_second", "model_flop_utilization", "memory_bytes"}


@pytest.fixture(scope="module")
def parent(tmp_path_factory, make_config) -> Path:
    """A dense model to start from."""
    path, tokenizer = tmp_path_factory.mktemp("parent") / "model", reasoning.tokenizer()
    spec = ModelSpecification(architecture=architecture_from(make_config().model.architecture, len(tokenizer)))
    save_model(path, spec, initialize(spec, jax.random.key(3)), tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def write_config(tmp_path_factory, settings) -> Callable[..., Path]:
    """Writes the configuration of a run, whose output is `run` beside it; `model` is what it starts from."""

    def write(**model) -> Path:
        folder = tmp_path_factory.mktemp("processes")
        file, sections = folder / "config.yaml", settings(train=TRAIN, mesh=MESH, model=model)
        file.write_text(yaml.safe_dump(sections | {"output": str(folder / "run")}))
        return file

    return write


@pytest.fixture
def two(together, free_port, process_environment, training_command):
    """Starts a training in two processes; `second` are arguments that only the second one gets."""

    def start(config: Path, second: tuple[str, ...] = ()):
        group = together()
        shared = [f"distributed.coordinator=127.0.0.1:{free_port()}", "distributed.processes=2"]
        for index in range(2):
            own = ["distributed.enabled=true", f"distributed.process_id={index}", "distributed.timeout_s=60"]
            # Unoptimized programs: what is compared bit for bit ran the same ones.
            command = training_command(config, *own, *shared, *(second if index else ()))
            group.start(command, process_environment(devices=4))
        return group

    return start


def arrays(config: Path) -> dict[str, np.ndarray]:
    trained = config.parent / "run" / "trained"
    return {name: np.asarray(leaf) for name, leaf in flatten(load_model(trained).params).items()}


def rows(config: Path) -> list[dict]:
    lines = (config.parent / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(write_config, parent) -> Path:
    """The configuration of a run in two processes from start to end, which the first test makes."""
    return write_config(path=str(parent))


def test_two_processes_equal_one(write_config, parent, two, run_module, whole):
    single = write_config(path=str(parent))
    done = run_module("qtale_jax.train", single, devices=8)
    assert done.returncode == 0, done.stderr

    pair = two(whole)
    assert pair.wait() == [0, 0], pair.logs()
    # One process speaks for both.
    assert last_line(pair.output(0)) == str(whole.parent / "run" / "trained")
    assert f"step {STEPS}/{STEPS}" in pair.errors(0) and "step " not in pair.errors(1)
    assert "trained" not in pair.output(1)
    assert len(list((whole.parent / "run" / "tensorboard").iterdir())) == 1
    assert "distributed" not in load_model(whole.parent / "run" / "trained").provenance["config"]

    expected, found = rows(single), rows(whole)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert [row["step"] for row in found if "validation" in row] == [4, 8]
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        np.testing.assert_allclose(mine["loss"], theirs["loss"], atol=1e-5, rtol=0)
        np.testing.assert_allclose(mine.get("validation", 0), theirs.get("validation", 0), atol=1e-5, rtol=0)
    one, both = arrays(single), arrays(whole)
    assert one.keys() == both.keys()
    for name in one:
        np.testing.assert_allclose(both[name], one[name], atol=1e-5, rtol=0, err_msg=name)


def stop(signal_number: signal.Signals, pair, config: Path) -> None:
    """Ends one of two processes that train, and checks what both say."""
    run = config.parent / "run"
    if signal_number == signal.SIGTERM:  # one of them is told to stop
        pair.until((run / "run.json").exists)
        pair.running[1].send_signal(signal_number)
        assert pair.wait() == [0, 0], pair.logs()
        assert "SIGTERM: saved after step" in last_line(pair.errors(0)) and "Traceback" not in pair.logs()
        saved = int(last_line(pair.errors(0)).split("saved after step ")[1].split()[0])
        assert saved < STEPS and (run / "checkpoints" / str(saved)).is_dir()
    else:
        pair.until(lambda: f"step 5/{STEPS}" in pair.errors(0))  # after the first checkpoint
        pair.running[1].kill()
        assert pair.wait(timeout=120) == [1, -signal.SIGKILL], pair.logs()
        message = last_line(pair.errors(0))
        assert message.startswith("error: process 1 of 2 is gone") and "Traceback" not in pair.errors(0)
    assert not (run / "trained").exists()


@pytest.mark.exhaustive  # a minute each
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_go_on_bit_for_bit(write_config, parent, two, whole, signal_number):
    config = write_config(path=str(parent))
    stop(signal_number, two(config), config)
    if not (whole.parent / "run" / "trained").exists():  # this test was asked for alone
        assert two(whole).wait() == [0, 0]
    pair = two(config)
    assert pair.wait() == [0, 0], pair.logs()
    if signal_number == signal.SIGKILL:
        assert f"step 1/{STEPS}" not in pair.errors(0)
    assert rows(config) == rows(whole)
    found, expected = arrays(config), arrays(whole)
    assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


def test_bad_input_of_one_process_ends_both_with_its_message(write_config, two):
    config = write_config()
    pair = two(config, second=("mesh.data=4",))
    assert pair.wait(timeout=120) == [2, 2], pair.logs()
    message = "mesh (data=4, fsdp=2, tensor=2) does not fit 8 devices: the product has to be 8"
    assert pair.errors(1) == f"error: {message}\n"
    assert last_line(pair.errors(0)) == f"error: process 1 of 2: {message}" and "Traceback" not in pair.errors(0)
    assert not (config.parent / "run").exists()
