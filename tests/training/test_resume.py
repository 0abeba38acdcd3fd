"""Runs as users start, kill and continue them: real processes on one device, compared bit for bit.

All of them run the same programs, unoptimized.
"""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from qtale_jax.artifact import load_model
from qtale_jax.artifact.arrays import flatten
from qtale_jax.errors import InputError
from qtale_jax.train import main

pytestmark = [pytest.mark.slow, pytest.mark.first]

STEPS = 40
TRAIN = {"steps": STEPS, "checkpoint_every": 2, "evaluate_every": 7, "parameters": "adapters"}


def wait_for_step(process, step: int) -> None:
    """Reads the log until step `step` or a later one is reported."""
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
            return
    raise AssertionError(f"the process ended before step {step}:\n{seen}")


def arrays(folder: Path) -> dict[str, bytes]:
    return {name: np.asarray(leaf).tobytes() for name, leaf in flatten(load_model(folder / "trained").params).items()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, settings, run_once) -> Path:
    """The folder of one run from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    run_once(folder, settings(train=TRAIN) | {"output": str(folder / "run")})
    return folder / "run"


@pytest.mark.parametrize("kills", [(8, 21), pytest.param((3, 8, 15, 21, 30), marks=pytest.mark.exhaustive)])
def test_killed_and_resumed_equals_one_run(tmp_path, run_folder, training_process, run_module, uninterrupted, kills):
    config, folder = run_folder("run", train=TRAIN), tmp_path / "run"
    reached = []
    for step in kills:
        with training_process(config) as process:
            wait_for_step(process, step)
            process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL
        assert not (folder / "trained").exists()
        reached.append(rows(folder)[-1]["step"])
    assert reached == sorted(reached)
    finished = run_module("qtale_jax.train", config)
    assert finished.returncode == 0, finished.stderr
    # It did continue rather than start again.
    assert f"step 1/{STEPS}" not in finished.stderr
    assert arrays(folder) == arrays(uninterrupted)

    found, expected = rows(folder), rows(uninterrupted)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    measured = {"tokens_per_second", "steps_per_second", "model_flop_utilization", "memory_bytes"}
    for mine, theirs in zip(found, expected, strict=True):
        assert {k: v for k, v in mine.items() if k not in measured} == {
            k: v for k, v in theirs.items() if k not in measured
        }


def test_sigterm_saves_and_the_same_command_continues(
    tmp_path, run_folder, training_process, run_module, uninterrupted
):
    train = TRAIN | {"checkpoint_every": 1000}
    config = run_folder("run", train=train)
    with training_process(config) as process:
        wait_for_step(process, 2)
        process.terminate()
        rest = process.stderr.read()
        assert process.wait() == 0, rest
    assert "SIGTERM: saved after step" in rest and "Traceback" not in rest
    assert not (tmp_path / "run" / "trained").exists()
    saved = int(rest.split("saved after step ")[1].split()[0])
    finished = run_module("qtale_jax.train", config)
    assert finished.returncode == 0, finished.stderr
    assert f"step {saved + 1}/{STEPS}" in finished.stderr and f"step {saved}/{STEPS}" not in finished.stderr
    assert arrays(tmp_path / "run") == arrays(uninterrupted)


def test_finished_run_is_left_as_it_is_and_another_configuration_refused(uninterrupted, capsys):
    config = str(uninterrupted.parent / "config.yaml")
    before = {path: path.stat().st_mtime_ns for path in (uninterrupted / "trained").rglob("*")}
    main([config, "mesh.data=8"])  # the devices of this process
    assert capsys.readouterr().out.strip() == str(uninterrupted / "trained")
    with pytest.raises(InputError, match=r"train\.optimizer\.learning_rate was 0\.001, now 0\.5"):
        main([config, "train.optimizer.learning_rate=0.5"])
    assert before == {path: path.stat().st_mtime_ns for path in (uninterrupted / "trained").rglob("*")}


def test_non_finite_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path, run_folder):
    optimizer = {"learning_rate": 1e30, "clip": 0.0, "warmup": 0.0}
    train = {"steps": 6, "checkpoint_every": 1, "log_every": 100, "optimizer": optimizer}
    config = run_folder("run", train=train, routing={"method": "dense"}, lora=None)
    with pytest.raises(InputError, match=r"the loss of step 2 is not finite"):  # one line and exit code 2
        main([str(config)])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "run" / "trained").exists()
