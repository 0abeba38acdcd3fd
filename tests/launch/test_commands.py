"""The inner command of every launch file for a cluster: a training that the configuration allows."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml

from qtale_jax.config import Config, load_config

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
CONFIG = "configs/llama3_2_3b_csqa.yaml"
OVERRIDES = ["output=/share/two words", "data.tasks=[arc, piqa]"]
TPU_POD = ["bash", LAUNCH / "tpu_pod.sh"]


def training(arguments: list[str]) -> Config:
    """The configuration of `python -m qtale_jax.train CONFIG ...`."""
    assert arguments[:2] == ["-m", "qtale_jax.train"]
    config = load_config(ROOT / arguments[2], arguments[3:])
    assert config.distributed.enabled
    return config


def on_hosts(calls: list[list[str]]) -> list[str]:
    """What gcloud was asked to run on all hosts."""
    assert all("--worker=all" in call for call in calls if "ssh" in call)
    return [argument.removeprefix("--command=") for call in calls for argument in call if "--command=" in argument]


def test_slurm_trains(recorded):
    command = ["bash", LAUNCH / "slurm.sbatch", CONFIG, *OVERRIDES]
    ((srun, kill, python, *arguments),) = recorded(command, "srun", variables={"PYTHON": sys.executable}, cwd=ROOT)
    config = training(arguments)
    assert (srun, kill, python) == ("srun", "--kill-on-bad-exit=1", sys.executable)
    assert config.output == "/share/two words" and config.data.tasks == ("arc", "piqa")
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", (LAUNCH / "slurm.sbatch").read_text(), flags=re.MULTILINE))
    assert header["ntasks-per-node"] == header["gpus-per-node"]  # a process finds its GPU by its number on the node
    assert header["signal"].startswith("TERM@")


def test_tpu_hosts_train(recorded, tmp_path):
    calls = recorded([*TPU_POD, "train", CONFIG, *OVERRIDES], "gcloud", variables={"PROJECT": "mine"})
    assert "--project=mine" in calls[0]
    (remote,) = on_hosts(calls)
    there = tmp_path / "qtale" / ".venv" / "bin"
    ((_, *arguments),) = recorded(["bash", "-c", remote], "python", folder=there, cwd=tmp_path)
    config = training(arguments)
    assert config.output == "/share/two words" and config.data.tasks == ("arc", "piqa")


def test_tpu_slice_is_asked_for_until_it_is_there(programs, recorded, tmp_path):
    states = 'n=$(cat n || echo 0); echo $((n + 1)) >n; [ "$n" = 0 ] && echo PROVISIONING || echo ACTIVE'
    programs(gcloud=f'#!/bin/sh\ncase "$*" in *describe*) {states} ;; esac\n')
    calls = recorded([*TPU_POD, "create"], "sleep", variables={"PROJECT": "mine"}, cwd=tmp_path)
    assert calls == [["sleep", "30"]] * 2
    ((_, *deleted),) = recorded([*TPU_POD, "delete"], "gcloud", variables={"PROJECT": "mine", "NAME": "other"})
    assert deleted[:5] == ["compute", "tpus", "queued-resources", "delete", "other"]


def test_tpu_hosts_install(programs, recorded, tmp_path):
    """The archive arrives, uv is fetched and makes the environment that `train` uses, with the pinned versions."""
    variables = {"PROJECT": "mine", "SHARE": "10.0.0.2:/share"}
    calls = recorded([*TPU_POD, "install"], "gcloud", "git", variables=variables)
    assert [call[0] for call in calls] == ["git", "gcloud", "gcloud", "gcloud"]
    archive = next(argument for argument in calls[0] if argument.startswith("--output=")).removeprefix("--output=")
    assert calls[0][1] == "archive" and archive in calls[1] and "qtale:qtale.tar.gz" in calls[1]
    mount, install = on_hosts(calls)
    sudo = recorded(["bash", "-c", mount], "sudo")
    assert [call[1] for call in sudo] == ["apt-get", "mkdir", "mount"] and sudo[2][2:] == [
        "10.0.0.2:/share",
        "/mnt/share",
    ]

    (tmp_path / "constraints.txt").write_text("")
    with tarfile.open(tmp_path / "qtale.tar.gz", "w:gz") as packed:
        packed.add(tmp_path / "constraints.txt", "constraints.txt")
    uv = '#!/bin/sh\ntest -f constraints.txt && echo "uv $*" >>"$HOME/installed"\n'
    installer = f"mkdir -p ~/.local/bin\nprintf %s {shlex.quote(uv)} >~/.local/bin/uv\nchmod +x ~/.local/bin/uv\n"
    (tmp_path / "installer").write_text(installer)
    programs(curl='#!/bin/sh\ncat "$HOME/installer"\n')
    recorded(["bash", "-c", install], variables={"HOME": str(tmp_path)}, cwd=tmp_path)
    made, filled = (tmp_path / "installed").read_text().splitlines()
    assert made.startswith("uv venv") and filled == "uv pip install --constraint constraints.txt --editable .[tpu]"


def test_tpu_hosts_without_uv_do_not_go_on(programs, environment, recorded, tmp_path):
    _, install = on_hosts(
        recorded([*TPU_POD, "install"], "gcloud", "git", variables={"PROJECT": "mine", "SHARE": "a:b"})
    )
    programs(curl="#!/bin/sh\nexit 6\n", tar="#!/bin/sh\n")
    done = subprocess.run(["bash", "-c", install], env=environment(HOME=str(tmp_path)), cwd=tmp_path, check=False)
    assert done.returncode == 6


def test_tpu_script_says_how_it_is_used(environment):
    done = subprocess.run(
        TPU_POD, env=environment(PROJECT="mine"), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2 and "tpu_pod.sh train CONFIG" in done.stderr


def container() -> tuple[dict, dict, dict]:
    """The JobSet, its job and the container of its pods."""
    jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return jobset, job, job["template"]["spec"]["containers"][0]


def test_pods_train(programs, environment, tmp_path):
    jobset, job, pod = container()
    variables = {entry["name"]: entry["value"] for entry in pod["env"]} | {"JOB_COMPLETION_INDEX": "1"}
    programs(python='#!/bin/sh\nprintf "%s\\0" "$@" >arguments\nmkdir -p "$OUTPUT/trained"\n')
    variables["OUTPUT"] = str(tmp_path / "two words")
    command = [*pod["command"], *pod["args"]]
    done = subprocess.run(command, env=environment(**variables), cwd=tmp_path, check=False, timeout=300)
    assert done.returncode == 0
    config = training((tmp_path / "arguments").read_text().split("\0")[:-1])
    assert config.output == variables["OUTPUT"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"] == config.distributed.processes == 2
    assert config.distributed.process_id == 1
    name, (workers,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    host, port = (config.distributed.coordinator or "").split(":")
    assert host == f"{name}-{workers['name']}-0-0.{name}"  # how JobSet names the first pod
    assert int(port) == pod["ports"][0]["containerPort"]


@pytest.mark.parametrize(("finished", "code"), [(True, 0), (False, 1)])
def test_a_pod_hands_sigterm_on_and_counts_as_failed_unless_the_run_is_finished(
    finished, code, programs, environment, together, tmp_path
):
    _, _, pod = container()
    variables = {entry["name"]: entry["value"] for entry in pod["env"]} | {"JOB_COMPLETION_INDEX": "0"}
    output = tmp_path / "run"
    if finished:
        (output / "trained").mkdir(parents=True)
    saving = "import pathlib, signal, sys\nhere = pathlib.Path(__file__).parent\n"
    saving += "signal.signal(signal.SIGTERM, lambda *_: ((here / 'saved').touch(), sys.exit()))\n"
    saving += "(here / 'started').touch()\nsignal.pause()\n"
    folder = programs(python=f"#!{sys.executable}\n{saving}")
    pair = together()
    pair.start([*pod["command"], *pod["args"]], environment(**variables | {"OUTPUT": str(output)}))
    pair.until((folder / "started").exists)
    pair.running[0].send_signal(signal.SIGTERM)
    assert pair.wait(timeout=300) == [code], pair.logs()
    assert (folder / "saved").exists()


def test_a_pod_ends_with_the_code_of_its_training(programs, environment, tmp_path):
    _, _, pod = container()
    variables = {entry["name"]: entry["value"] for entry in pod["env"]} | {"JOB_COMPLETION_INDEX": "0"}
    programs(python="#!/bin/sh\nexit 2\n")
    variables["OUTPUT"] = str(tmp_path)
    done = subprocess.run([*pod["command"], *pod["args"]], env=environment(**variables), check=False, timeout=300)
    assert done.returncode == 2


def test_the_image_trains_and_holds_what_it_names():
    text = (LAUNCH / "Containerfile").read_text(encoding="utf-8").replace("\\\n", "")
    python, *arguments = json.loads(re.findall(r"^CMD (.*)$", text, flags=re.MULTILINE)[0])
    assert python == "python" and training(arguments).distributed.processes == 1
    copied = [name for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE) for name in line.split()[:-1]]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert {"pyproject.toml", "README.md", "LICENSE", "qtale_jax", arguments[2].split(os.sep)[0]} <= set(copied)
