"""Evaluation files: what is accepted, what is refused and how, and the public results.json."""

import json
import shutil

import pytest

from qtale_jax.errors import InputError
from qtale_jax.reporting.results import (
    RESULT_KEYS,
    Histogram,
    read_evaluation,
    read_evaluations,
    read_results,
    write_results,
    write_text,
)


@pytest.fixture
def example(experiment):
    """The content of one file of a routed model."""
    return json.loads(sorted((experiment / "evaluation" / "qtale").rglob("*.json"))[0].read_text())


def _refused(tmp_path, content) -> str:
    path = tmp_path / "one.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_evaluation(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    return message


def test_the_keys_are_the_public_contract(experiment, tmp_path):
    keys = "model routing quantizer bits group_size theta executed_ratio accuracy standard_error nats_per_token"
    contract = (*keys.split(), "weight_bytes", "flops_per_token", "seed")
    assert contract == RESULT_KEYS
    rows = [evaluation.row for evaluation in read_evaluations(experiment / "evaluation")]
    write_results(tmp_path / "results.json", rows)
    written = json.loads((tmp_path / "results.json").read_text())
    assert len(written) == len(rows) == 100
    assert all(tuple(row) == RESULT_KEYS for row in written)
    assert written[0]["accuracy"].keys() >= {"mean", "sort"}
    assert read_results(tmp_path / "results.json") == rows


def test_dense_rows_keep_their_nulls(experiment):
    dense = read_evaluation(sorted((experiment / "evaluation" / "dense").rglob("*.json"))[0])
    assert dense.row.theta is None and dense.gap_histogram is None and dense.maps == ()
    assert dense.row.executed_ratio == 1.0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda row: row.pop("bits"), "missing key row.bits"),
        (lambda row: row.update(bits="four"), "row.bits"),
        (lambda row: row.update(flops=1), "unknown key row.flops (did you mean 'flops_per_token'?)"),
        (lambda row: row.update(routing="qtail"), "row.routing"),
        (lambda row: row.update(executed_ratio=1.2), "row.executed_ratio"),
        (lambda row: row.update(nats_per_token=float("nan")), "row.nats_per_token"),
        (lambda row: row.update(accuracy={"sort": 0.9}), "accuracy needs the key 'mean'"),
        (lambda row: row.update(accuracy={"mean": 90.0}), "row.accuracy.mean"),
        (lambda row: row.update(accuracy=None, nats_per_token=None), "both null"),
        (lambda row: row.update(weight_bytes=-1), "found -1"),
    ],
)
def test_a_bad_row_is_refused_with_its_key(example, tmp_path, change, expected):
    change(example["row"])
    assert expected in _refused(tmp_path, example)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda file: file.pop("row"), "missing key row"),
        (
            lambda file: file["gap_histogram"].update(edges=[0.0, 1.0]),
            "gap_histogram: 48 counts need 49 edges, found 2",
        ),
        (lambda file: file["gap_histogram"].update(edges=[0.0] * 49), "edges must increase"),
        (lambda file: file["maps"][0]["tokens"].append("more"), "maps.0: 8 tokens, 7 rows of execute and 7"),
        (lambda file: file["maps"][0]["execute"][1].pop(), "rows of execute differ in length"),
        (lambda file: file["maps"][0]["probability"][1].pop(), "one per routed layer"),
        (lambda file: file.update(flip_rate="often"), "flip_rate"),
    ],
)
def test_a_bad_file_is_refused_with_its_key(example, tmp_path, change, expected):
    change(example)
    assert expected in _refused(tmp_path, example)


@pytest.mark.parametrize(
    ("text", "expected"), [("{", "not valid JSON"), ("[]", "found a JSON list"), ("", "not valid JSON")]
)
def test_a_truncated_file_is_refused(tmp_path, text, expected):
    assert expected in _refused(tmp_path, text)


def test_a_missing_file_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")
    with pytest.raises(InputError, match="no evaluation found"):
        read_evaluations(tmp_path)


def test_the_same_measurement_twice_is_refused(experiment, tmp_path):
    path = sorted((experiment / "evaluation").rglob("*.json"))[0]
    shutil.copy(path, tmp_path / "a.json")
    shutil.copy(path, tmp_path / "b.json")
    with pytest.raises(InputError, match=r"b\.json: the same .* as .*a\.json"):
        read_evaluations(tmp_path)


def test_unfinished_files_are_not_read(experiment, tmp_path):
    shutil.copy(sorted((experiment / "evaluation").rglob("*.json"))[0], tmp_path / "a.json")
    (tmp_path / ".b.json").write_text("{")
    assert len(read_evaluations(tmp_path)) == 1


def test_bad_results_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match="cannot be read"):
        read_results(path)
    for text, expected in (("{", "not a JSON list"), ("3", "not a JSON list"), ('[{"model": 1}]', "model")):
        path.write_text(text)
        with pytest.raises(InputError, match=expected):
            read_results(path)


def test_density_integrates_to_one():
    histogram = Histogram(edges=(0.0, 1.0, 3.0, 4.0, 9.0), counts=(2, 4, 2, 0))
    assert histogram.density() == [0.25, 0.25, 0.25, 0.0]
    assert histogram.occupied() == (0.0, 4.0)


def test_writing_replaces_whole_files_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "folder" / "report.md"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"
    assert [found.name for found in path.parent.iterdir()] == ["report.md"]


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half \ud800")
    assert path.read_text() == "first"
    assert [found.name for found in tmp_path.iterdir()] == ["report.md"]
