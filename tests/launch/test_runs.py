"""Launch files run for real: two processes on this machine where a cluster would have two, commands in a small copy."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import pytest
import yaml

from qtale_jax.artifact import load_model, save_model
from qtale_jax.config import load_config
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.training.start import architecture_from

pytestmark = [pytest.mark.slow, pytest.mark.first]

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"

# Both tasks of a step, or both hosts of a slice: Slurm's variables stand for the metadata that only TPUs have.
BOTH = """#!/usr/bin/env bash
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task "$@" >"$LOGS/$task.out" 2>"$LOGS/$task.err" &
    tasks[task]=$!
done
wait "${tasks[0]}" && wait "${tasks[1]}"
"""
SRUN = '#!/bin/sh\nshift\nexec both "$@"\n'
GCLOUD = """#!/usr/bin/env bash
for argument in "$@"; do
    if [[ "$argument" == --command=* ]]; then exec both bash -c "${argument#--command=}"; fi
done
"""


def said(text: str) -> str:
    """Without what gloo says."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("[Gloo]"))


@pytest.fixture
def step(tmp_path, programs, environment, free_port) -> Callable[..., tuple[int, Path]]:
    """Runs a command whose cluster's program starts both processes here; returns its exit code and the logs' folder."""

    def run(command: list[str | Path], folder: Path, **variables: str) -> tuple[int, Path]:
        programs(both=BOTH, srun=SRUN, gcloud=GCLOUD)
        job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
        job |= {"JAX_COORDINATOR_PORT": str(free_port()), "LOGS": str(tmp_path), "SLURM_SUBMIT_DIR": str(folder)}
        done = subprocess.run(
            list(map(str, command)), env=environment(**job, **variables), cwd=folder, check=False, timeout=300
        )
        return done.returncode, tmp_path

    return run


def check_two(code: int, logs: Path, config: Path) -> None:
    """Both processes trained one model on the devices of both, and the first one spoke."""
    out, errors = ([(logs / f"{task}.{name}").read_text() for task in range(2)] for name in ("out", "err"))
    assert code == 0, errors
    assert list(map(said, out)) == [f"{config.parent / 'run' / 'trained'}\n", ""], errors
    assert load_model(config.parent / "run" / "trained").provenance["steps"] == 2


def test_slurm(step, small):
    code, logs = step(["bash", LAUNCH / "slurm.sbatch", small, "mesh.fsdp=4"], ROOT, PYTHON=sys.executable)
    check_two(code, logs, small)


@pytest.mark.exhaustive  # the same training, asked for in another way
def test_tpu_hosts(step, small, programs, tmp_path):
    programs(tmp_path / "qtale" / ".venv" / "bin", python=(programs() / "python").read_text())
    command = ["bash", LAUNCH / "tpu_pod.sh", "train", small, "mesh.fsdp=4"]
    check_two(*step(command, tmp_path, PROJECT="mine"), small)


@pytest.mark.exhaustive
def test_pods(small, environment, together, free_port, tmp_path):
    words, config = reasoning.tokenizer(), load_config(small, [])
    spec = ModelSpecification(architecture=architecture_from(config.model.architecture, len(words)))
    save_model(tmp_path / "base", spec, initialize(spec, jax.random.key(0)), tokenizer=words)
    shutil.copy(tmp_path / "text.txt", tmp_path / "data")
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    command = [*pod["command"], *(text.replace("/share", str(tmp_path)) for text in pod["args"])]
    variables = {"CONFIG": str(small), "OUTPUT": str(tmp_path / "run"), "COORDINATOR": f"127.0.0.1:{free_port()}"}
    names = {entry["name"] for entry in pod["env"]}
    assert names == {*variables, "PROCESSES"}
    pair = together()
    for index in range(2):
        pair.start(command, environment(**variables, PROCESSES="2", JOB_COMPLETION_INDEX=str(index)))
    assert pair.wait() == [0, 0], pair.logs()
    assert [said(pair.output(index)) for index in range(2)] == [f"{tmp_path / 'run' / 'trained'}\n", ""]
    assert load_model(tmp_path / "run" / "trained").provenance["parent"]


def test_image(small, environment, free_port, tmp_path):
    """The command of the image, in fewer steps and with a port that is free here."""
    text = (LAUNCH / "Containerfile").read_text(encoding="utf-8").replace("\\\n", "")
    command = json.loads(re.findall(r"^CMD (.*)$", text, flags=re.MULTILINE)[0])
    here = [f"output={tmp_path / 'run'}", "data.kind=text", f"data.path={tmp_path / 'text.txt'}", "data.held_out=0"]
    here += [
        "train.steps=2",
        "train.batch_size=8",
        "routing.method=dense",
        f"distributed.coordinator=127.0.0.1:{free_port()}",
    ]
    done = subprocess.run(
        [*command, *here], env=environment(), cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert said(done.stdout) == f"{tmp_path / 'run' / 'trained'}\n"
