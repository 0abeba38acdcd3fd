"""The report stage, in process and as a command."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from rich.console import Console

from qtale_jax.config.schema import Config
from qtale_jax.errors import InputError
from qtale_jax.report import run_stage
from qtale_jax.reporting import environment
from qtale_jax.reporting.results import RESULT_KEYS


@pytest.fixture
def output(experiment, tmp_path):
    """A copy that the stage may write into."""
    shutil.copytree(experiment, tmp_path / "run")
    return tmp_path / "run"


def _config(output) -> Config:
    return Config.model_validate({"output": str(output), "experiment": {"title": "Seven tasks"}})


def test_the_stage_writes_its_files_and_prints_the_table(output):
    console = Console(width=100)
    with console.capture() as capture:
        page = run_stage(_config(output), command="python -m qtale_jax.experiment a.yaml", console=console)
    printed = capture.get()
    assert page == output / "report.html"
    for name in ("results.json", "paired.json", "report.md", "report.html", "README.md"):
        assert str(output / name) in printed.splitlines()
    rows = json.loads((output / "results.json").read_text())
    assert len(rows) == 100 and all(tuple(row) == RESULT_KEYS for row in rows)
    assert [rows[0]["model"], rows[-1]["model"], rows[-1]["seed"]] == ["dense", "qtale", 2]
    pairs = json.loads((output / "paired.json").read_text())
    assert {(found["model"], found["reference"]) for found in pairs} == {
        ("dllm", "dense"),
        ("qtale", "dense"),
        ("qtale", "dllm"),
    }
    assert "Accuracy, % @ executed ratio" in printed and "QTALE" in printed
    text = (output / "report.md").read_text()
    assert (
        text.startswith("# Seven tasks\n")
        and "## Routing" in text
        and "## Gain over D-LLM" in text
        and "title: Seven tasks" in text
    )
    assert "python -m qtale_jax.experiment a.yaml" in page.read_text()
    assert not list(output.glob(".*"))
    figures = {path.name for path in (output / "figures").iterdir()}
    shown = re.findall(r"!\[.*\]\(figures/(.*)\)", (output / "README.md").read_text())
    assert shown == ["accuracy_by_ratio.svg", "nats_by_ratio.svg"] and figures > set(shown)


def test_one_seed_leaves_no_paired_differences(text_experiment, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(text_experiment, output)
    (output / "paired.json").write_text("[]")  # of an earlier report
    run_stage(_config(output), command="x", console=Console(quiet=True))
    assert not (output / "paired.json").exists()
    assert "Gain over" not in (output / "report.md").read_text()


@pytest.mark.slow
def test_running_again_replaces_the_report(output):
    first = run_stage(_config(output), command="x", console=Console(quiet=True)).read_text()
    second = run_stage(_config(output), command="x", console=Console(quiet=True)).read_text()
    assert first == second


def test_nothing_is_written_for_bad_input(output):
    broken = next((output / "evaluation").rglob("*.json"))
    broken.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        run_stage(_config(output))
    shutil.rmtree(output / "evaluation")
    with pytest.raises(InputError, match="no evaluation found"):
        run_stage(_config(output))
    assert not {"results.json", "paired.json", "report.md", "report.html"} & {path.name for path in output.iterdir()}


def _command(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "qtale_jax.report", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_names_the_page(output, tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output": str(output)}))
    done = _command(str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(output / "report.html")
    assert "python -m qtale_jax.report" in (output / "report.html").read_text()


@pytest.mark.slow
def test_the_command_ends_with_two_and_one_line_without_results(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"output": str(tmp_path / "empty")}))
    done = _command(str(tmp_path / "config.yaml"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no evaluation found" in done.stderr
    assert not (tmp_path / "empty").exists()


def test_the_environment_names_versions_and_hardware(monkeypatch):
    found = environment.environment()
    assert {"Python", "Packages", "Processor"} <= found.keys()
    assert "numpy " in found["Packages"] and "cores" in found["Processor"]
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    assert environment.environment()["Accelerators"]
    assert environment.command_line().startswith("python ")
