"""W&B offline, as it needs no network: one run per folder, whatever happens to the process."""

import contextlib
import subprocess
import sys

import pytest

from qtale_jax.errors import InputError
from qtale_jax.training.logs import RunLog, scalars
from qtale_jax.training.wandb_log import ID_FILE, import_wandb, run_id


def test_numbers_of_lists_are_named_by_their_index():
    assert scalars({"loss": 1.5, "ratio": [0.25, 1], "note": "x"}) == {"loss": 1.5, "ratio/0": 0.25, "ratio/1": 1}


def test_a_folder_keeps_its_run(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first == (tmp_path / ID_FILE).read_text()
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as Python marks what cannot be imported
    with pytest.raises(InputError, match=r'needs the wandb library: pip install "qtale-jax\[wandb\]"'):
        import_wandb()


PROCESS = """
import sys
from pathlib import Path
from qtale_jax.training.wandb_log import WandbLog

log = WandbLog(Path(sys.argv[1]), "routes", {"seed": 3})
for step in map(int, sys.argv[2:]):
    log.write(step, {"loss": 1 / step})
log.close()
"""


@pytest.mark.slow
def test_a_resumed_training_appends_to_the_same_run(tmp_path, process_environment):
    """As it resumes: in another process."""
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    environment = process_environment() | {"WANDB_MODE": "offline"}
    for steps in ("37", "9"):
        command = [sys.executable, "-c", PROCESS, str(tmp_path), *steps]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")
    run = (tmp_path / ID_FILE).read_text()
    stored = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run}/run-{run}.wandb"))
    first, second = (file.read_bytes() for file in stored)
    assert b"routes" in first and b"routes" in second
    numbers = [f"{1 / step}".encode() for step in (3, 7, 9)]
    assert [number in first for number in numbers] == [True, True, False]
    assert numbers[2] in second and numbers[1] not in second


def test_rows_go_to_every_log(tmp_path):
    """What W&B is given, by a run that only remembers it."""

    class Remembered:
        def __init__(self):
            self.rows, self.failed = {}, None

        def write(self, step, numbers):
            self.rows[step] = numbers

        def close(self, failed):
            self.failed = failed

    one, other = Remembered(), Remembered()
    with RunLog(tmp_path, total=2, resumed=0, quiet=True, wandb=one) as log:
        log.write(2, {"loss": 0.5, "executed": [0.25, 1.0], "note": "x"})
    assert one.rows == {2: {"loss": 0.5, "executed/0": 0.25, "executed/1": 1.0}} and one.failed is False
    with contextlib.suppress(KeyError), RunLog(tmp_path, total=2, resumed=2, quiet=True, wandb=other):
        raise KeyError
    assert other.failed is True
