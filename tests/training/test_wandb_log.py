"""W&B offline, as it needs no network: one run per folder, whatever happens to the process."""

import json
from pathlib import Path

import pytest

from qtale_jax.errors import InputError
from qtale_jax.training.logs import RunLog, scalars
from qtale_jax.training.wandb_log import ID_FILE, WandbLog, import_wandb, run_id

# Warnings of the library's own code are not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_numbers_of_lists_are_named_by_their_index():
    assert scalars({"loss": 1.5, "ratio": [0.25, 1], "note": "x"}) == {"loss": 1.5, "ratio/0": 0.25, "ratio/1": 1}


def test_a_folder_keeps_its_run(tmp_path):
    first = run_id(tmp_path)
    assert run_id(tmp_path) == first == (tmp_path / ID_FILE).read_text()
    (tmp_path / "other").mkdir()
    assert run_id(tmp_path / "other") != first


def test_without_the_library_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # as Python marks what cannot be imported
    with pytest.raises(InputError, match=r'needs the wandb library: pip install "qtale-jax\[wandb\]"'):
        import_wandb()


@pytest.mark.slow
def test_a_resumed_training_appends_to_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged = []
    for resumed, steps in ((0, (2, 4)), (4, (6,))):
        tracker = WandbLog(tmp_path, "routes", {"seed": 3})
        with RunLog(tmp_path, total=6, resumed=resumed, quiet=True, wandb=tracker) as log:
            for step in steps:
                log.write(step, {"loss": 1.0 / step, "executed": [0.5, 1.0]})
            logged.append((tracker._run.id, tracker._run.project, tracker._run.step, dict(tracker._run.summary)))
    ids, projects, _, summaries = zip(*logged, strict=True)
    assert set(ids) == {(tmp_path / ID_FILE).read_text()} and set(projects) == {"routes"}
    assert summaries[1]["loss"] == pytest.approx(1 / 6) and summaries[1]["executed/1"] == 1.0
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]
    folders = sorted(path.name for path in Path(tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(name.endswith(ids[0]) for name in folders)
