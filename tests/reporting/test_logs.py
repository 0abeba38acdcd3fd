"""Training logs, as runs that were interrupted and resumed leave them."""

import json

import pytest

from qtale_jax.errors import InputError
from qtale_jax.reporting.logs import read_training


def _write(folder, text):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text(text)


def test_runs_are_found_and_named(experiment):
    runs = read_training(experiment, {"dense", "dllm", "qtale"})
    assert {(run.name, run.model) for run in runs} >= {
        ("base-seed0", "base"),
        ("dllm-seed1", "dllm"),
        ("qtale-seed2", "qtale"),
    }
    assert [run.routed for run in runs if run.model == "base"] == [False]
    assert len(runs) == 7 and all(len(run.series["cross_entropy"]) == 20 for run in runs)


def test_the_longest_name_at_a_word_boundary_wins(tmp_path):
    for folder in ("qtale-strong/seed0", "0_qtale", "qtales", "."):
        _write(tmp_path / folder, '{"step": 1, "loss": 2}\n')
    found = {run.name: run.model for run in read_training(tmp_path, {"qtale", "qtale-strong"})}
    assert found == {"qtale-strong/seed0": "qtale-strong", "0_qtale": "qtale", "qtales": None, tmp_path.name: None}


def test_a_step_logged_again_after_a_resume_counts_once(tmp_path):
    lines = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "note": "x", "flag": True}]
    _write(tmp_path, "\n".join(map(json.dumps, lines)))
    (run,) = read_training(tmp_path, ())
    assert run.series == {"loss": ((1, 3.0), (2, 2.0))}


def test_not_finite_values_are_gaps(tmp_path):
    _write(tmp_path, '{"step": 1, "loss": NaN}\n\n{"step": 2, "loss": 2.0, "parts": [1]}\n')
    (run,) = read_training(tmp_path, ())
    assert run.series == {"loss": ((2, 2.0),)}


def test_half_a_last_line_is_left_out_but_not_one_before(tmp_path):
    _write(tmp_path, '{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert read_training(tmp_path, ())[0].series == {"loss": ((1, 2.0),)}
    _write(tmp_path, '{"step": 1, "lo\n{"step": 2, "loss": 2}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: not valid JSON"):
        read_training(tmp_path, ())
    _write(tmp_path, '{"step": 1}\n{"loss": 2}\n')
    with pytest.raises(InputError, match="line 2: .* an object with an integer 'step'"):
        read_training(tmp_path, ())
