"""The scripts for one machine, run for real in a small repository of the same layout, whose environments are there."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Of the quickstart, what takes seconds: everything is there, and nothing has learned anything.
TINY = ["model.architecture.num_layers=3", "model.architecture.hidden_size=16", "routing.router_hidden=8"]
TINY += ["train.steps=2", "train.batch_size=8", "train.evaluate_batches=1", "data.kind=multiple_choice"]
TINY += ["data.held_out=0.2", "evaluate.max_examples=8", "evaluate.maps=0", "experiment.workers=0"]
TINY += ["experiment.base={train: {steps: 2}}", "experiment.methods={dense: {}}", "experiment.ratios=[]"]
TINY += ["experiment.quantizers=[{bits: 3, symmetric: true}]"]


def write_notebook(file: Path, *lines: str) -> None:
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": []}
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {"cells": [cell | {"source": "\n".join(lines)}], "metadata": {"kernelspec": kernel}}
    file.parent.mkdir()
    file.write_text(json.dumps(content | {"nbformat": 4, "nbformat_minor": 5}))


@pytest.fixture
def repository(tmp_path) -> Path:
    """The files that the scripts read, in a folder of their own."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture
def bash(repository, environment, programs) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script of the repository; environments in `ready`, extras by name, are that of the tests."""

    def run(script: str, *arguments: str, ready: dict[str, str] | None = None, **variables: str):
        for name, extras in (ready or {}).items():
            programs(repository / name / "bin", python=f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            stamp = f"source launch/environment.sh; describe_environment {shlex.quote(extras)} >{name}/installed"
            subprocess.run(["bash", "-c", stamp], cwd=repository, check=True, timeout=300)
        return subprocess.run(
            ["bash", repository / script, *arguments],
            env=environment(**variables),
            cwd=repository.parent,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return run


@pytest.mark.first
@pytest.mark.slow
def test_the_quickstart_and_notebooks_on_it(repository, bash):
    pytest.importorskip("nbclient", reason="the extra 'notebooks' is not installed")
    pytest.importorskip("ipykernel", reason="the extra 'notebooks' is not installed")
    early = bash("launch/notebooks.sh", ready={".venv-notebooks": "notebooks"})
    assert early.returncode == 2 and "run bash launch/quickstart.sh first" in early.stderr
    rows = [json.dumps({"query": "sum : 1 2 =", "choices": ["3", str(i % 9)], "gold": 0}) for i in range(60)]
    (repository / "rows.jsonl").write_text("\n".join(rows))
    done = bash("launch/quickstart.sh", "data.path=rows.jsonl", *TINY, ready={".venv-quickstart": ""})
    assert done.returncode == 0, done.stderr
    assert "runs/quickstart/report.html" in done.stdout and "environment .venv-quickstart is up to date" in done.stderr
    wrong = bash("launch/quickstart.sh", "train.stepz=3")
    assert wrong.returncode == 2 and "did you mean 'steps'" in wrong.stderr

    write_notebook(
        repository / "notebooks" / "one.ipynb",
        "import os, qtale_jax",
        "print([row.bits for row in qtale_jax.results(os.environ['QTALE_RUN']).rows])",
    )
    executed = bash("launch/notebooks.sh")
    assert executed.returncode == 0, executed.stderr
    copy = json.loads((repository / "runs" / "quickstart" / "notebooks" / "one.ipynb").read_text())
    assert "".join(copy["cells"][0]["outputs"][0]["text"]) == "[3]\n"


@pytest.mark.slow
def test_tests_are_chosen_and_their_result_is_the_exit_code(repository, bash):
    (repository / "tests").mkdir()
    slow = "import pytest\ndef test_good(): pass\n@pytest.mark.slow\ndef test_bad(): assert False\n"
    (repository / "tests" / "test_some.py").write_text(slow)
    done = bash("launch/test.sh", "--fast", "-n", "0", ready={".venv-test": "test"})
    assert (done.returncode, "1 passed, 1 deselected" in done.stdout) == (0, True), done.stdout
    done = bash("launch/test.sh", "-n", "0", "-k", "bad")
    assert (done.returncode, "1 failed, 1 deselected" in done.stdout) == (1, True), done.stdout


# Stands for uv, and for an interpreter with venv and pip: environments are folders with the interpreter in them.
UV = """#!/usr/bin/env bash
echo "uv $*" >>"$RECORD"
if [[ "$1" == venv ]]; then mkdir -p "${@: -1}/bin" && cp "$QTALE_PYTHON" "${@: -1}/bin/python"; fi
[[ "$1" == venv || ! -e "$FAILS" ]]
"""
PYTHON = f"""#!/usr/bin/env bash
case "$1 ${{2:-}}" in
    *"print(sys.executable)") echo "$0" ;;
    -c* | --version*) exec "{sys.executable}" "$@" ;;
    "-m venv") echo "python $*" >>"$RECORD" && mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip") if [[ "$3" == install ]]; then echo "python $*" >>"$RECORD" && [[ ! -e "$FAILS" ]]; fi ;;
esac
"""
TOOLS = ("bash", "cat", "cmp", "cp", "dirname", "env", "mkdir", "rm")


@pytest.mark.parametrize("with_uv", [True, False], ids=["uv", "pip"])
def test_an_environment_is_made_once_and_again_when_what_it_holds_changes(with_uv, repository, programs, environment):
    tools = repository.parent / "tools"
    interpreter = programs(repository.parent / "own", python=PYTHON) / "python"
    programs(tools, **{"uv": UV} if with_uv else {})
    tools.mkdir(exist_ok=True)
    for name in TOOLS:
        (tools / name).symlink_to(shutil.which(name))
    record, fails = repository.parent / "record", repository.parent / "fails"
    variables = {"PATH": str(tools), "QTALE_PYTHON": str(interpreter), "FAILS": str(fails)}

    def prepare(code: int = 0) -> str:
        """Calls of the stand-ins, one letter each: environment made, packages installed."""
        record.write_text("")
        script = (
            'set -euo pipefail; source launch/environment.sh; prepare_environment .venv-own test,dev; "$PYTHON" -c ""'
        )
        done = subprocess.run(
            ["bash", "-c", script],
            env=environment(**variables),
            cwd=repository,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        assert (done.returncode != 0) == code, done.stderr
        calls = record.read_text().splitlines()
        for call in calls:
            if "install" in call:
                assert f"{repository}/constraints.txt" in call and call.endswith(f"--editable {repository}[test,dev]")
        return "".join("i" if "install" in call else "m" for call in calls)

    assert [prepare(), prepare()] == ["mi", ""]
    (repository / "constraints.txt").write_text("numpy==2.4.6\n")
    fails.touch()
    assert prepare(code=1) == "i"  # and the next time is not taken in by what is half there
    fails.unlink()
    assert [prepare(), prepare()] == ["i", ""]
    (repository / ".venv-own" / "bin" / "python").unlink()
    assert prepare() == "mi"


def test_a_machine_without_python_is_told_what_to_install(repository, bash):
    done = bash("launch/test.sh", QTALE_PYTHON="/nowhere/python")
    assert done.returncode == 2 and done.stdout == ""
    assert re.match(r"error: no Python >= 3\.11 .* among: /nowhere/python; install one", done.stderr)
    assert not (repository / ".venv-test").exists()
