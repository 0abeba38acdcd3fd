"""Bad input through the real entry points: exit code 2, one line, no traceback, nothing written."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import jax
import pytest
import yaml

from qtale_jax import command
from qtale_jax.artifact import save_model
from qtale_jax.data import reasoning
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

SHAPE = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "num_heads": 2}
LINE = json.dumps({"query": "", "choices": ["a", "b"], "gold": 0})


def save(path: Path, routing: RoutingSpecification | None) -> None:
    architecture = Architecture(**SHAPE, num_kv_heads=2, head_dim=8, max_length=32)
    spec = ModelSpecification(architecture=architecture, routing=routing)
    params = initialize(spec, jax.random.key(0))
    save_model(path, spec, params, tokenizer=reasoning.tokenizer(), provenance={"seed": 0})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A dense and a routed model directory."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "dense", None)
    save(folder / "routed", RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8))
    return folder


@pytest.fixture
def folder(tmp_path, models, monkeypatch) -> Path:
    """An empty folder with a configuration that works, its data, and the models."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, tmp_path / "models")
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 6]) for i in range(30)))
    config = {
        "output": "run",
        "model": {"architecture": {**SHAPE, "max_length": 32}},
        "routing": {"always_on_layers": 1, "router_hidden": 8},
        "data": {"kind": "text", "path": "text.txt", "length": 16},
        "train": {"steps": 1, "batch_size": 8, "parameters": "all"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(stage: str, *arguments: str, monkeypatch, capsys, folder: Path) -> str:
    """Runs a stage's `main` as its module does; returns the one line it ends with."""
    monkeypatch.setattr(sys, "argv", [stage, *arguments])
    before = contents(folder)
    with pytest.raises(SystemExit) as stop:
        command.run(importlib.import_module(f"qtale_jax.{stage}").main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert contents(folder) == before
    return lines[0]


DENSE, ROUTED = "models/dense", "models/routed"
CASES = [
    ("train", ["train.stepz=3"], "train.stepz", "did you mean 'steps'"),
    ("train", ["trian.steps=3"], "trian", "did you mean 'train'"),
    ("train", ["routing.always_on_layers=3"], "always_on_layers=3", "no routed layer of 3"),
    ("quantize", ["quantize.method=none", "quantize.bits=4"], "bits=4", "method='none'"),
    ("quantize", ["quantize.bits=5"], "bits", "5"),
    ("quantize", ["quantize.group_size=7"], "group_size=7", "does not divide"),
    ("train", ["data.length=33"], "data.length=33", "max_length=32"),
    ("train", ["mesh.data=3"], "mesh", "3"),
    ("train", ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=4"], "mesh (data=2, fsdp=2, tensor=4)", "8 devices"),
    ("train", ["model.architecture.vocab_size=20"], "vocab_size", "20"),
    ("train", ["model.tokenizer=nowhere"], "model.tokenizer='nowhere'", "tokenizer.json"),
    ("train", ["model.path=nowhere"], "nowhere", ""),
    ("train", [f"model.path={ROUTED}", "routing.router_hidden=9"], "router_hidden=9", "router_hidden=8"),
    ("train", [f"model.path={ROUTED}", "routing.always_on_layers=2"], "always_on_layers=2", "always_on_layers=1"),
    ("train", [f"model.path={DENSE}", "data.length=33"], "data.length=33", "32"),
    ("train", ["data.path=gone.txt"], "data.path=gone.txt", "no such file"),
    ("train", ["data.path=empty.txt"], "empty.txt", "empty"),
    ("train", ["data.path=bad.jsonl", "data.kind=multiple_choice"], "bad.jsonl, line 2", "not valid JSON"),
    ("train", ["data.truncation=error", "data.length=5"], "data.length=5", "tokens"),
    ("train", ["data.length=5"], "data.length=5", "longer"),
    ("quantize", ["quantize.model=nowhere"], "nowhere", ""),
    ("quantize", ["quantize.model=models"], "models", ""),
    (
        "quantize",
        [f"quantize.model={DENSE}", "quantize.group_size=16"],
        "group_size=16",
        "allowed: quantize.group_size=8, or",
    ),
    ("quantize", [f"quantize.model={DENSE}", f"quantize.output={ROUTED}"], ROUTED, "exist"),
    ("calibrate", [f"calibrate.model={DENSE}", "calibrate.output=new"], "no routers", "dense"),
    ("calibrate", [f"calibrate.model={ROUTED}", "calibrate.output=new"], "calibrate.examples=512", "only 3 rows"),
    ("calibrate", [f"calibrate.model={ROUTED}", f"calibrate.output={DENSE}"], DENSE, "exist"),
    ("evaluate", [], "no model in run", "trained"),
    (
        "evaluate",
        [f"evaluate.model={DENSE}", "data.path=bad.jsonl", "data.kind=multiple_choice"],
        "bad.jsonl, line 2",
        "",
    ),
    ("generate", ["generate.model=nowhere"], "nowhere", ""),
    ("generate", [f"generate.model={DENSE}", "generate.max_new_tokens=99"], "99", "context of 32"),
    ("generate", [f"generate.model={DENSE}", "generate.prompts=[xylophone]"], "xylophone", "cannot encode"),
    ("report", [], "evaluation", "qtale_jax.evaluate"),
    ("experiment", ["experiment.methods={qtail: {routing: {methd: qtale}}}"], "methd", "did you mean 'method'"),
]


@pytest.mark.parametrize(("stage", "overrides", "what", "allowed"), CASES, ids=lambda v: str(v)[:50])
def test_bad_input_is_one_line(stage, overrides, what, allowed, folder, monkeypatch, capsys):
    (folder / "empty.txt").write_text("")
    (folder / "bad.jsonl").write_text(f"{LINE}\n{{oops\n")
    # A group size that fits the configured architecture is checked against the loaded one.
    if "quantize.group_size=16" in overrides:
        overrides = [*overrides, "model.path=models/dense"]
    line = refused(stage, "config.yaml", *overrides, monkeypatch=monkeypatch, capsys=capsys, folder=folder)
    assert what in line and allowed in line


@pytest.mark.parametrize("damage", ["model.json", "arrays", "half of model.json", "half of an array"])
def test_damaged_models_are_one_line(damage, folder, monkeypatch, capsys):
    model = folder / "models" / "dense"
    if damage == "model.json":
        (model / "model.json").unlink()
    elif damage == "arrays":
        shutil.rmtree(model / "arrays")
    else:
        big = max((p for p in (model / "arrays").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        file = model / "model.json" if "json" in damage else big
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for stage in ("quantize", "evaluate", "generate"):
        line = refused(
            stage, "config.yaml", f"{stage}.model=models/dense", monkeypatch=monkeypatch, capsys=capsys, folder=folder
        )
        assert "models/dense" in line


@pytest.mark.parametrize("arguments", [[], ["nowhere.yaml"], ["config.yaml", "steps"], ["config.yaml", "--stepz"]])
def test_bad_command_lines_are_one_line(arguments, folder, monkeypatch, capsys):
    refused("quantize", *arguments, monkeypatch=monkeypatch, capsys=capsys, folder=folder)


def test_a_real_process_says_the_same(folder, run_module):
    before = contents(folder)
    done = run_module("qtale_jax.train", "config.yaml", "train.stepz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr and contents(folder) == before


@pytest.mark.slow
def test_a_real_process_counts_its_devices(folder, run_module):
    before = contents(folder)
    done = run_module("qtale_jax.train", "config.yaml", "mesh.data=4", devices=2)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: mesh (data=4") and "2 devices" in done.stderr
    assert "Traceback" not in done.stderr and contents(folder) == before
