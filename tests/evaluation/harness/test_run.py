"""`python -m qtale_jax.evaluate CONFIG harness.tasks=[...]`, its table and its file."""

import json
import sys

import numpy as np
import pytest
import yaml

from qtale_jax import command, evaluate
from qtale_jax.config.schema import HarnessConfig
from qtale_jax.errors import InputError
from qtale_jax.evaluation.harness.tasks import load_tasks

ROWS = [{"query": f"Question {i}", "choices": ["yes", "no", "maybe"], "gold": i % 3} for i in range(8)]
TASKS = ("arc_easy", "arc_challenge", "openbook_qa", "piqa", "siqa")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs `evaluate` in this process; returns exit code, output and error output."""

    def call(config: dict, *overrides: str) -> tuple[int, str, str]:
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path / "config.yaml"), *overrides])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as stop:
            command.run(evaluate.main)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.slow
@pytest.mark.first
@pytest.mark.parametrize("limit", [40, pytest.param(200, marks=pytest.mark.exhaustive)])
def test_five_tasks_as_the_harness_own_backend_has_them(
    shared_data, stories_path, expected, run_module, tmp_path, limit
):
    files = [str(shared_data / "csqa" / f"{name}.jsonl") for name in TASKS]
    config = {
        "evaluate": {"model": str(stories_path), "batch_size": 32, "output": "result.json"},
        "harness": {"tasks": files, "limit": limit, "samples": True},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_module("qtale_jax.evaluate", "config.yaml", optimized=True)  # 4 times faster, though it compiles longer
    assert done.returncode == 0 and done.stderr == ""
    result, out = json.loads((tmp_path / "result.json").read_text()), done.stdout
    for name in TASKS:
        task, golden = result["tasks"][f"{name}.jsonl"], expected["tasks"][name]
        if limit == 200:
            assert (task["metrics"]["acc"], task["metrics"]["acc_norm"]) == (golden["acc"], golden["acc_norm"])
        for found, wanted in zip(result["samples"][f"{name}.jsonl"], golden["responses"][:limit], strict=True):
            np.testing.assert_allclose([value for value, _ in found], [value for value, _ in wanted], atol=1e-3)
            assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in wanted]
        assert task["documents"] == limit and len(golden["responses"]) == 200
        assert task["requests"] == sum(map(len, golden["responses"][:limit]))
        assert task["executed_ratio"] == 1.0 and task["flops_per_token"] > 0
        (line,) = [line for line in out.splitlines() if f"{name}.jsonl" in line]
        assert f"{task['metrics']['acc']:.4f}" in line and "1.0000" in line and f"{task['flops_per_token']:.3g}" in line


def test_files_of_rows_and_yaml_files_become_tasks(tmp_path):
    rows = jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {tmp_path}}}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: 'Q: {{query}}'\ndoc_to_choice: choices\n"
        "doc_to_target: gold\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tasks = load_tasks(HarnessConfig(tasks=(rows, str(tmp_path / "own.yaml"))))["tasks"]
    assert list(tasks) == ["rows.jsonl", "own"]
    for name, prefix in (("rows.jsonl", ""), ("own", "Q: ")):
        docs = list(tasks[name].test_docs())
        assert [tasks[name].doc_to_text(doc) for doc in docs] == [prefix + row["query"] for row in ROWS]
        assert [tasks[name].doc_to_target(doc) for doc in docs] == [row["gold"] for row in ROWS]


@pytest.mark.parametrize(
    ("tasks", "settings", "message"),
    [
        (["gone.jsonl"], {}, "gone.jsonl: no such file"),
        (["gone.yaml"], {}, "gone.yaml: no such file"),
        (
            ["longproc_countdown_0.6k"],
            {},
            r"'longproc_countdown_0.6k' is unknown.*did you mean 'longproc_countdown_0.5k'",
        ),
        (["rows.jsonl", "rows.jsonl"], {"num_fewshot": 2}, "num_fewshot=2: rows.jsonl"),
        (["bad.jsonl"], {}, "bad.jsonl, line 1: 'gold' has to be an index"),
        (["bad.yaml"], {}, "'bad.yaml' cannot be loaded.*without network give a file"),
    ],
)
def test_bad_tasks_are_one_line(tasks, settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "rows.jsonl", ROWS)
    jsonl(tmp_path / "bad.jsonl", [{**ROWS[0], "gold": 9}])
    (tmp_path / "bad.yaml").write_text("task: bad\ndataset_path: json\n")
    with pytest.raises(InputError, match=message):
        load_tasks(HarnessConfig(tasks=tuple(tasks), **settings))


@pytest.mark.slow
def test_registered_names_are_known_and_say_what_to_do_without_network():
    with pytest.raises(InputError, match=r"'arc_esay' is unknown.*did you mean 'arc_easy'"):
        load_tasks(HarnessConfig(tasks=("arc_esay",)))
    with pytest.raises(InputError, match=r"'arc_easy' cannot be loaded.*without network give a file of"):
        load_tasks(HarnessConfig(tasks=("arc_easy",)))


def test_settings_without_tasks_would_do_nothing(run):
    code, out, err = run({"harness": {"limit": 3}})
    assert (code, out) == (2, "") and "limit would do nothing" in err and len(err.splitlines()) == 1
