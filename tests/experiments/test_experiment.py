"""The whole main job in small, through its real entry point."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qtale_jax.data import reasoning
from qtale_jax.reporting.results import RESULT_KEYS

pytestmark = [pytest.mark.slow, pytest.mark.first]


def test_an_experiment_runs_once_and_then_only_reports(tmp_path, run_module, run_here):
    words = list(reasoning.WORDS)
    texts = [" ".join(words[(5 * i) % 40 :][:10]) for i in range(40)]
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(texts))
    config = {
        "output": "run",
        "data": {"kind": "text", "path": "text.txt", "length": 16, "held_out": 0.3},
        "model": {
            "architecture": {
                "vocab_size": 64,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_layers": 3,
                "num_heads": 2,
                "max_length": 32,
            }
        },
        "routing": {"always_on_layers": 1, "router_hidden": 8},
        "lora": None,
        "train": {"steps": 2, "batch_size": 8, "parameters": "all"},
        "calibrate": {"examples": 8},
        "evaluate": {"batch_size": 8, "maps": 1},
        "experiment": {
            "base": {"train": {"steps": 3}},
            "methods": {"dense": {}, "qtale": {}},
            "quantizers": [{"method": "none", "bits": 16}, {"bits": 3}],
            "ratios": [0.8],
        },
    }
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    done = run_module("qtale_jax.experiment", "tiny.yaml")
    assert done.returncode == 0, done.stderr
    assert not set("\x1b\r\x08") & set(done.stdout + done.stderr)  # a log file gets no progress bars
    run = tmp_path / "run"
    assert str(run / "report.html") in done.stdout.replace("\n", "") or "report.html" in done.stdout
    rows = json.loads((run / "results.json").read_text())
    assert all(tuple(row) == RESULT_KEYS for row in rows)
    assert [(row["routing"], row["bits"]) for row in rows].count(("qtale", 3)) == 2  # as trained, and at the ratio
    assert {(row["routing"], row["bits"]) for row in rows} == {(r, b) for r in ("dense", "qtale") for b in (16, 3)}
    assert (run / "report.html").stat().st_size > 10_000
    files = {p for p in run.rglob("*") if p.is_file() and "report" not in p.name}
    files -= {run / "results.json", run / "README.md", *run.glob("figures/*")}  # written again with the report
    kept = {p: p.stat().st_mtime_ns for p in files}
    again = run_here("qtale_jax.experiment", "tiny.yaml")
    assert again.returncode == 0, again.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert "started" not in again.stderr
    assert json.loads((run / "results.json").read_text()) == rows


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 128 + signal.SIGTERM), (signal.SIGHUP, 128 + signal.SIGHUP), (signal.SIGINT, 130)],
)
def test_no_signal_leaves_workers_behind_or_hits_them_from_the_terminal(tmp_path, number, code):
    """Workers get SIGTERM from the experiment, whereupon they save; Ctrl-C would end them where they are."""
    config = {
        "output": str(tmp_path / "run"),
        "data": {"kind": "reasoning", "path": str(tmp_path / "data"), "length": 20},
        "model": {"architecture": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_layers": 3}},
        "lora": None,
        "train": {"parameters": "all", "steps": 10**6},
        "experiment": {"base": {}, "methods": {"dense": {}}},
    }
    (tmp_path / "endless.yaml").write_text(yaml.safe_dump(config))
    # What runs the tests may ignore signals, as `nohup` and shells in the background do, which processes inherit.
    heard = (
        "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_DFL); os.execv(sys.argv[2], sys.argv[2:])"
    )
    command = [sys.executable, "-m", "qtale_jax.experiment", str(tmp_path / "endless.yaml")]
    command = [sys.executable, "-c", f"import os, signal, sys; {heard}", str(int(number)), *command]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            assert process.stderr is not None
            assert next(line for line in process.stderr if "base: started" in line)
            while not (found := workers(tmp_path)):  # a process has no command line while its program is put in place
                assert process.poll() is None
            assert all(os.getpgid(worker) != process.pid for worker in found)
            os.killpg(process.pid, number)  # as a terminal does: to all that it knows of
            assert process.wait(timeout=120) == code
        finally:  # a test that fails waits for no endless training
            process.terminate()
    assert not workers(tmp_path)


def workers(folder: Path) -> list[int]:
    """Processes that work on jobs in `folder`."""
    found = {}
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may have ended
            found[int(file.parent.name)] = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return [number for number, line in found.items() if "experiments.worker" in line and str(folder) in line]
