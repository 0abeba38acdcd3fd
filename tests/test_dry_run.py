"""`--dry-run`: everything is read and checked, the plan is printed, nothing is written."""

import importlib
import json
import re
import sys
from pathlib import Path

import datasets
import jax
import pytest
import yaml

from qtale_jax import command
from qtale_jax.artifact import load_model, save_model, weight_bytes
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.huggingface import to_huggingface
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.reporting.dry_run import bytes_text

GOLDEN = Path(__file__).parent / "models" / "golden" / "llama2"
SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A dense and a routed model directory. Read only."""
    folder = tmp_path_factory.mktemp("models")
    architecture = Architecture(**SHAPE, num_kv_heads=2, head_dim=8, max_length=32)
    for name, routing in (
        ("dense", None),
        ("routed", RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8)),
    ):
        spec = ModelSpecification(architecture=architecture, routing=routing)
        save_model(folder / name, spec, initialize(spec, jax.random.key(0)), tokenizer=reasoning.tokenizer())
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder with a configuration and its data."""
    monkeypatch.chdir(tmp_path)
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 6]) for i in range(30)))
    config = {
        "output": "run",
        "model": {"architecture": {**SHAPE, "max_length": 32}},
        "routing": {"always_on_layers": 1, "router_hidden": 8},
        "data": {"kind": "text", "path": "text.txt", "length": 16},
        "train": {"steps": 5, "batch_size": 8, "parameters": "all"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


@pytest.fixture
def dry_run(folder, monkeypatch, capsys):
    """Runs a stage as its module does, checks that it writes nothing, and returns (exit code, stdout, stderr)."""

    def run(stage: str, *arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [stage, *map(str, arguments)])
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        with pytest.raises(SystemExit) as stop:
            command.run(importlib.import_module(f"qtale_jax.{stage}").main)
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


def facts(printed: str) -> dict[str, str]:
    """The printed lines by their names."""
    return dict(re.findall(r"^  (\S.*?) {2,}(.*)$", printed, flags=re.MULTILINE)) | dict(
        re.findall(r"^  (\S.{14,}?) (.*)$", printed, flags=re.MULTILINE)
    )


def test_train_tells_sizes_rows_and_steps(dry_run):
    code, out, _ = dry_run("train", "config.yaml", "--dry-run")
    found = facts(out)
    assert code == 0 and out.startswith("train: dry run, nothing is written\n")
    spec = ModelSpecification(
        architecture=Architecture(**SHAPE, num_kv_heads=2, head_dim=8, max_length=32),
        routing=RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8),
    )
    params = initialize(spec, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert found["parameters"] == f"{count:,}, {count:,} of them train"
    moments = bytes_text(8 * count)
    assert found["memory"] == f"{bytes_text(weight_bytes(params)['total'])} of parameters, {moments} of optimizer state"
    assert found["rows"] == "24 for train, 2 for validation, 16 tokens long"
    assert found["steps"] == "5 of 8 rows, 1.67 passes over the training rows"
    assert found["would write"] == "run/trained"


def test_train_on_a_parent_counts_what_trains(dry_run, models):
    arguments = [f"model.path={models / 'dense'}", "train.parameters=adapters", "lora.rank=2"]
    code, out, _ = dry_run("train", "config.yaml", *arguments, "--dry-run")
    router = 16 * 8 + 8 + 8 + 8 * 2 + 2
    adapters = 3 * (16 * 2 + 2 * 16)
    assert code == 0 and f"{2 * router + 3 * adapters:,} of them train" in facts(out)["parameters"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=gone.txt"], "no such file"),
        (["model.path=nowhere"], "nowhere"),
        (["data.length=5"], "longer than data.length=5"),
        (["mesh.data=3"], "mesh"),
    ],
)
def test_bad_input_of_train_is_refused(dry_run, overrides, message):
    code, out, err = dry_run("train", "config.yaml", "--dry-run", *overrides)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_train_says_what_is_there(dry_run, folder):
    from qtale_jax.config import load_config
    from qtale_jax.training.identity import claim

    claim(folder / "run", load_config("config.yaml"))
    (folder / "run" / "checkpoints" / "4").mkdir(parents=True)
    assert facts(dry_run("train", "config.yaml", "--dry-run")[1])["state"] == "would go on after step 4"
    (folder / "run" / "trained").mkdir()
    assert "nothing would be done" in facts(dry_run("train", "config.yaml", "--dry-run")[1])["state"]
    code, _, err = dry_run("train", "config.yaml", "--dry-run", "train.steps=6")
    assert code == 2 and "holds another run: train.steps was 5, now 6" in err


def test_a_suite_that_is_not_there_yet_is_not_left_behind(dry_run, monkeypatch):
    """The small suite stands for the whole one, which takes a while."""
    monkeypatch.setattr("qtale_jax.data.scratch.STORED", {"basic": "small"})
    monkeypatch.setattr("qtale_jax.data.sources.STORED", {"basic": "small"})
    data = ["data.kind=reasoning", "data.path=data", "data.length=20"]
    code, out, _ = dry_run("train", "config.yaml", "--dry-run", *data)
    assert code == 0 and facts(out)["rows"].startswith(f"{256 * 7:,} for train, {32 * 7} for validation")


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_quantize_tells_bytes_and_time(dry_run, models, method):
    arguments = [f"quantize.model={models / 'dense'}", f"quantize.method={method}", "quantize.bits=3"]
    arguments += ["quantize.statistics.examples=2", "quantize.output=new"]
    code, out, _ = dry_run("quantize", "config.yaml", *arguments, "--dry-run")
    found = facts(out)
    assert code == 0 and found["to"].startswith(f"3-bit {method}, asymmetric, one scale per output channel")
    now = weight_bytes(load_model(models / "dense").params)["total"]
    assert found["bytes"].startswith(f"{bytes_text(now)} now, ")
    assert found["would write"] == "new" and "peak memory" in found and ("calibration" in found) == (method == "gptq")


def test_what_cannot_be_quantized_is_refused(dry_run, models):
    assert dry_run("quantize", "config.yaml", "--dry-run")[0] == 2
    taken = [f"quantize.model={models / 'dense'}", f"quantize.output={models / 'routed'}"]
    code, _, err = dry_run("quantize", "config.yaml", *taken, "--dry-run")
    assert code == 2 and "exists already" in err


def test_calibrate_tells_rows_and_passes(dry_run, models):
    arguments = [f"calibrate.model={models / 'routed'}", "calibrate.output=new", "calibrate.ratio=0.7"]
    code, out, _ = dry_run("calibrate", "config.yaml", *arguments, "calibrate.examples=3", "--dry-run")
    found = facts(out)
    assert code == 0 and found["calibration"].startswith("3 rows, ")
    assert (found["goal"], found["passes"]) == ("ratio 0.7, within 0.005", "at most 22 over them")
    code, _, err = dry_run("calibrate", "config.yaml", *arguments, "--dry-run")
    assert code == 2 and "calibrate.examples=512" in err
    dense = [f"calibrate.model={models / 'dense'}", "calibrate.output=new"]
    code, _, err = dry_run("calibrate", "config.yaml", *dense, "--dry-run")
    assert code == 2 and "no routers" in err


def test_evaluate_tells_examples_and_batches(dry_run, models, folder):
    query, *choices = reasoning.WORDS[3:6]
    lines = [json.dumps({"query": query, "choices": choices, "gold": i % 2}) for i in range(30)]
    (folder / "choices.jsonl").write_text("\n".join(lines))
    data = ["data.kind=multiple_choice", "data.path=choices.jsonl", "data.held_out=0.4", "evaluate.batch_size=4"]
    code, out, _ = dry_run("evaluate", "config.yaml", f"evaluate.model={models / 'routed'}", *data, "--dry-run")
    found = facts(out)
    assert code == 0 and found["examples"] == "6 of the test split" and found["tasks"] == "choices"
    assert found["rows"].startswith("18 with ") and found["rows"].endswith("about 5 batches of 4")
    assert found["would write"] == "run/evaluation/routed.json"


def test_published_tasks_are_named_with_where_they_are_read_from(dry_run, models, folder):
    query, *choices = reasoning.WORDS[3:6]
    row = {"question_stem": query, "choices": {"text": choices, "label": ["A", "B"]}, "answerKey": "B"}
    rows = datasets.Dataset.from_list([row] * 20)
    datasets.DatasetDict(dict.fromkeys(["train", "validation", "test"], rows)).save_to_disk("saved/openbookqa")
    arguments = ["data.kind=published", "data.path=saved", "data.tasks=[openbookqa]"]
    for stage in ("train", "evaluate"):
        code, out, _ = dry_run(stage, "config.yaml", *arguments, f"evaluate.model={models / 'routed'}", "--dry-run")
        assert code == 0 and facts(out)["data"] == "openbookqa from saved/openbookqa"
    code, _, err = dry_run("train", "config.yaml", *arguments, "data.source=tfds", "--dry-run")
    assert code == 2 and "'openbookqa' is not prepared, there is no openbookqa in data.path=saved; prepare it" in err


def test_evaluate_names_the_harness_tasks(dry_run, models, folder):
    (folder / "choices.jsonl").write_text("{}")
    arguments = [f"evaluate.model={models / 'routed'}", "harness.limit=5"]
    code, out, _ = dry_run("evaluate", "config.yaml", *arguments, "harness.tasks=[choices.jsonl]", "--dry-run")
    found = facts(out)
    assert code == 0 and (found["harness tasks"], found["limit"]) == ("choices.jsonl", "5 documents of each")
    assert found["would write"] == "run/harness/routed.json"
    code, _, err = dry_run("evaluate", "config.yaml", *arguments, "harness.tasks=[gone.jsonl]", "--dry-run")
    assert code == 2 and "gone.jsonl: no such file" in err


def test_generate_checks_the_prompts(dry_run, models):
    model = f"generate.model={models / 'routed'}"
    code, out, _ = dry_run("generate", "config.yaml", model, "generate.max_new_tokens=4", "--dry-run")
    assert code == 0 and facts(out)["prompts"] == "1, of up to 1 tokens; 4 new ones at most"
    code, _, err = dry_run("generate", "config.yaml", model, "generate.max_new_tokens=99", "--dry-run")
    assert code == 2 and "context of 32" in err


def test_generate_and_serve_open_what_they_would_run(dry_run, models, tmp_path_factory):
    exported = tmp_path_factory.mktemp("exported") / "model"
    to_huggingface(models / "routed", exported)
    for stage in ("generate", "serve"):
        given = (f"{stage}.model={exported}", f"{stage}.max_new_tokens=4")
        code, out, err = dry_run(stage, "config.yaml", *given, "--dry-run")
        assert code == 0, err
        assert "QTALE" in facts(out)["routing"]


def test_experiment_lists_jobs(dry_run):
    grid = ["experiment.base={}", "experiment.methods={dense: {}, qtale: {}}", "experiment.ratios=[0.6]"]
    code, out, _ = dry_run("experiment", "config.yaml", *grid, "--dry-run")
    found = facts(out)
    assert code == 0
    assert (found["base"], found["train qtale-seed0"]) == ("1 × train", "1 × train")
    assert found["measure qtale-seed0"] == "2 × evaluate, 1 × calibrate"
    assert found["in all"] == "2 × train, 3 × evaluate, 1 × calibrate"
    assert "would write     run/base/trained\n" in out and "would write     run/report.html\n" in out
    assert "24 for train" in out  # the base could start, so its data was read


def test_convert_reads_the_whole_checkpoint(dry_run, tmp_path):
    code, out, _ = dry_run("convert", GOLDEN, "new", "--dry-run")
    assert code == 0 and facts(out)["would write"] == "new" and " parameters, " in facts(out)["model"]
    code, _, err = dry_run("convert", "nowhere", "new", "--dry-run")
    assert code == 2 and "no such directory" in err


def test_convert_back_tells_the_tensors(dry_run, models):
    code, out, _ = dry_run("convert", "--to-hf", models / "routed", "new", "--dry-run")
    found = facts(out)
    assert code == 0 and found["routing"].startswith("QTALE") and f"{2 * 162} parameters" in found["routers"]
    code, _, err = dry_run("convert", "--to-hf", "--quantized", "awq", models / "routed", "new", "--dry-run")
    assert code == 2 and "not quantized" in err


def test_report_without_evaluations_is_refused(dry_run):
    code, _, err = dry_run("report", "config.yaml", "--dry-run")
    assert code == 2 and "no evaluation found" in err


@pytest.mark.parametrize("stage", command.STAGES)
def test_every_stage_has_it(stage, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [stage, "--help"])
    with pytest.raises(SystemExit):
        importlib.import_module(f"qtale_jax.{stage}").main()
    assert "--dry-run" in capsys.readouterr().out
