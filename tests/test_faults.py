"""A few of the faults of `benchmarks/faults.py`, which injects as many as one likes, at random times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "faults.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_faults_lose_nothing(tmp_path, process_environment):
    """Whatever stops training and quantizing, what is resumed ends as an undisturbed run, bit for bit."""
    output = tmp_path / "faults.json"
    arguments = ["--faults", "6", "--seed", "3", "--folder", str(tmp_path), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=process_environment(),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["name"]: row["value"] for row in json.loads(output.read_text())["rows"]}
    assert sum(value for name, value in rows.items() if name.endswith((", train", ", quantize"))) == 6
    assert rows["runs that ended as an undisturbed one, bit for bit"] >= 1
