"""The launch files: shell that parses, and, as the inner command of each, a training that the configuration allows."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qtale_jax.config import Config, load_config
from qtale_jax.data import reasoning

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])
CONFIG = "configs/llama3_2_3b_csqa.yaml"
OVERRIDES = ["output=/share/two words", "data.tasks=[arc, piqa]"]


@pytest.fixture
def recorder(tmp_path) -> Path:
    """An executable that writes its arguments to `arguments` beside it."""
    file = tmp_path / "bin" / "recorder"
    file.parent.mkdir()
    file.write_text('#!/bin/sh\nprintf "%s\\0" "$@" >"$(dirname "$0")/arguments"\n')
    file.chmod(0o755)
    return file


def arguments_of(command: list[str | Path], recorder: Path, name: str, **settings) -> list[str]:
    """Runs a command in which `name` is the recorder; returns what that was called with."""
    shutil.copy(recorder, recorder.with_name(name))
    path = f"{recorder.parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path} | settings.pop("environment", {})
    subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60, **settings)
    return (recorder.parent / "arguments").read_text().split("\0")[:-1]


def training(arguments: list[str]) -> Config:
    """The configuration of `python -m qtale_jax.train CONFIG ...`."""
    assert arguments[:2] == ["-m", "qtale_jax.train"]
    config = load_config(ROOT / arguments[2], arguments[3:])
    assert config.distributed.enabled
    return config


def slurm_command(recorder: Path, config: str | Path, *overrides: str) -> list[str]:
    """What `srun` is asked to run."""
    command = ["bash", LAUNCH / "slurm.sbatch", config, *overrides]
    arguments = arguments_of(command, recorder, "srun", environment={"PYTHON": sys.executable}, cwd=ROOT)
    return [argument for argument in arguments if not argument.startswith("--kill")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script):
    checked = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text or text.startswith("# shellcheck shell=bash")
    if shutil.which("shellcheck"):
        found = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stdout


def test_slurm_trains(recorder):
    python, *arguments = slurm_command(recorder, CONFIG, *OVERRIDES)
    config = training(arguments)
    assert python == sys.executable
    assert config.output == "/share/two words" and config.data.tasks == ("arc", "piqa")
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE))
    assert header["ntasks-per-node"] == header["gpus-per-node"]  # a process finds its GPU by its number on the node
    assert header["signal"].startswith("TERM@")


def test_tpu_hosts_train(recorder, tmp_path):
    command = ["bash", LAUNCH / "tpu_pod.sh", "train", CONFIG, *OVERRIDES]
    arguments = arguments_of(command, recorder, "gcloud", environment={"PROJECT": "mine"})
    assert "--worker=all" in arguments and "--project=mine" in arguments
    (remote,) = (text.removeprefix("--command=") for text in arguments if text.startswith("--command="))
    shutil.copytree(recorder.parent, tmp_path / "qtale" / ".venv" / "bin")
    there = tmp_path / "qtale" / ".venv" / "bin" / "recorder"
    config = training(arguments_of(["bash", "-c", remote], there, "python", cwd=tmp_path))
    assert config.output == "/share/two words" and config.data.tasks == ("arc", "piqa")


def test_tpu_script_says_how_it_is_used():
    done = subprocess.run(
        ["bash", LAUNCH / "tpu_pod.sh"],
        env=os.environ | {"PROJECT": "mine"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "tpu_pod.sh train CONFIG" in done.stderr


def test_pods_train(recorder):
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))
    assert jobset["kind"] == "JobSet"
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    command = [*container["command"], *container["args"]]
    config = training(arguments_of(command, recorder, "python", environment=environment))
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == config.distributed.processes == 2
    assert config.distributed.process_id == 1
    name = jobset["metadata"]["name"]
    host, port = (config.distributed.coordinator or "").split(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"  # how JobSet names the first pod
    assert int(port) == container["ports"][0]["containerPort"]


def test_image_trains_and_holds_what_it_names():
    text = (LAUNCH / "Containerfile").read_text(encoding="utf-8").replace("\\\n", "")
    python, *arguments = json.loads(re.findall(r"^CMD (.*)$", text, flags=re.MULTILINE)[0])
    assert python == "python" and training(arguments).distributed.processes == 1
    copied = [name for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)


@pytest.mark.slow
def test_slurm_command_finds_the_other_process(recorder, tmp_path, together, free_port, process_environment):
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 6]) for i in range(30)))
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 2}
    config = {
        "output": str(tmp_path / "run"),
        "model": {"architecture": {**shape, "max_length": 32}},
        "routing": {"always_on_layers": 1, "router_hidden": 8},
        "data": {"kind": "text", "path": str(tmp_path / "text.txt"), "length": 16},
        "train": {"steps": 5, "batch_size": 8, "parameters": "all"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = slurm_command(recorder, tmp_path / "config.yaml", "--dry-run")
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    job["JAX_COORDINATOR_PORT"] = str(free_port())
    pair = together()
    for index in range(2):
        own = {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
        pair.start(command, process_environment(devices=2) | job | own)
    assert pair.wait() == [0, 0], pair.logs()
    assert re.search(r"devices\W+data 4", pair.output(0)) and "devices" not in pair.output(1)
    assert not (tmp_path / "run").exists()
