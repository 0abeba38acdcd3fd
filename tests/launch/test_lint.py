"""The launch files as their linters see them: shell, also inside other files, the image, the Kubernetes manifest."""

import copy
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch"), ROOT / ".ci" / "run"])


def lint(tool: str, *arguments: str | Path, text: str | None = None) -> tuple[int, str]:
    """Runs a linter of the extra `test`; returns its exit code and what it found."""
    path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
    program = shutil.which(tool, path=path)
    assert program, f'{tool} is not installed; install with: pip install -c constraints.txt -e ".[test]"'
    done = subprocess.run(
        [program, *arguments], input=text, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


def jobset() -> dict:
    return yaml.safe_load((LAUNCH / "jobset.yaml").read_text(encoding="utf-8"))


def misread(manifest: dict) -> str:
    """What the API of JobSet says of a manifest; keys that it does not know are left out by it."""
    try:
        read = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(manifest))
    except ValueError as error:
        return str(error)
    return "" if read.to_dict() == manifest else f"read as {read.to_dict()}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    assert lint("shellcheck", script) == (0, "")
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text or text.startswith("# shellcheck shell=bash")


def test_shell_inside_other_files_is_clean():
    container = jobset()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["bash", "-euo", "pipefail", "-c"]
    given = "\n".join([entry["name"] + "=" for entry in container["env"]] + ["JOB_COMPLETION_INDEX="])
    assert lint("shellcheck", "--shell=bash", "-", text=f"{given}\n{container['args'][0]}") == (0, "")
    remote = re.findall(r"on_all_hosts '([^']+)'", (LAUNCH / "tpu_pod.sh").read_text(encoding="utf-8"))
    assert len(remote) == 1 and lint("shellcheck", "--shell=bash", "-", text=remote[0]) == (0, "")


def test_a_finding_fails():
    code, found = lint("shellcheck", "--shell=bash", "-", text="cd $1\n")
    assert code == 1 and "SC2164" in found and "SC2086" in found
    code, found = lint("hadolint", "-", text="FROM image:1\nRUN pip install package $1\n")
    assert code == 1 and "DL3042" in found and "SC2086" in found


def test_the_image_is_clean():
    assert lint("hadolint", LAUNCH / "Containerfile") == (0, "")


def test_the_manifest_is_what_the_api_reads():
    assert jobset()["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and misread(jobset()) == ""


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("restartPolicy: Never", "restartPolcy: Never"),
        ("- name: workers", "- nme: workers"),
        ("parallelism: 2", "parallelism: two"),
        ("metadata:", "metdata:"),
        ('value: "2"', "value: 2"),
        ("emptyDir: {medium: Memory}", "emptyDir: {medum: Memory}"),
        ("limits: {nvidia.com/gpu: 8}", "limits: {nvidia.com/gpu: [8]}"),
    ],
)
def test_mistakes_in_the_manifest_are_found(written, instead):
    text = (LAUNCH / "jobset.yaml").read_text(encoding="utf-8")
    assert text.count(written) == 1 and misread(yaml.safe_load(text.replace(written, instead)))
