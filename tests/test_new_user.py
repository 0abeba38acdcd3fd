"""The way of a new user: README's commands from a Hugging Face folder to a routed model in 4 bits and its report."""

import json
import re
import shlex
from pathlib import Path

import jax
import pytest

import qtale_jax
from qtale_jax import convert, experiment
from qtale_jax.artifact import save_model
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import initialize
from qtale_jax.models.huggingface import to_huggingface
from qtale_jax.models.specification import Architecture, ModelSpecification

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"qtale_jax.convert": convert.main, "qtale_jax.experiment": experiment.main}
# What makes it a matter of seconds. With this prompt the closed vocabulary of the tokenizer is enough.
SMALL = ["data.kind=multiple_choice", "data.length=24", "data.held_out=0.2", "train.steps=2", "experiment.workers=0"]
SMALL += ["routing.router_hidden=8", "calibrate.examples=16", "calibrate.tolerance=0.1", "train.evaluate_batches=1"]
SMALL += ["evaluate.perplexity=false", "evaluate.max_examples=16", "evaluate.maps=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A random Llama in Hugging Face layout whose linears have 128 inputs, and questions to learn."""
    root = tmp_path_factory.mktemp("user")
    architecture = Architecture(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_layers=4,  # half of them is more than the two that always run
        num_heads=2,
        num_kv_heads=1,
        head_dim=64,
        max_length=32,
    )
    spec = ModelSpecification(architecture=architecture)
    save_model(root / "model", spec, initialize(spec, jax.random.key(0)), tokenizer=reasoning.tokenizer())
    to_huggingface(root / "model", root / "HF_FOLDER")
    questions = [dict(example) for example in reasoning.generate("keep", 640, 0)]
    (root / "ROWS.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return root


@pytest.fixture(scope="module")
def commands() -> list[list[str]]:
    """The commands of the first block under "Your own checkpoint"."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"## Your own checkpoint\n.*?```sh\n(.*?)```", text, flags=re.DOTALL)
    assert block
    return [shlex.split(line) for line in block.group(1).splitlines()]


@pytest.mark.exhaustive  # a minute
@pytest.mark.slow
def test_five_commands_lead_to_a_routed_model_in_4_bits_and_its_report(folder, commands, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    (folder / "configs").symlink_to(ROOT / "configs")
    assert len(commands) <= 5
    called = [command for command in commands if command[:2] == ["python", "-m"] and command[2] != "venv"]
    assert [command[2] for command in called] == ["qtale_jax.convert", "qtale_jax.experiment", "qtale_jax.convert"]
    for _, _, module, *arguments in called:
        STAGES[module]([*arguments, *(SMALL if module == "qtale_jax.experiment" else [])])
    printed = capsys.readouterr().out
    assert "runs/own/report.html" in printed and (folder / "runs" / "own" / "report.html").stat().st_size > 10_000
    model = qtale_jax.load("OUT")
    assert model.spec.bits == 4 and model.spec.routing is not None and model.spec.routing.method == "qtale"
    assert set(model.spec.routing.thresholds) == {"4"}
    rows = qtale_jax.results("runs/own").rows
    assert {(row.routing, row.bits) for row in rows} == {(r, b) for r in ("dense", "qtale") for b in (16, 4)}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "experiment.quantizers.1.group_size=100",
            r"^experiment.quantizers.1.group_size=100 .* allowed: experiment.quantizers.1.group_size=128, or ",
        ),
        ("data.held_out=0.1", r"experiment.quantizers.1.statistics.examples=128, .* only 64 .*raise data.held_out"),
        ("calibrate.examples=200", r"calibrate.examples=200, .* only 128 rows; raise data.held_out or lower it"),
    ],
)
def test_what_cannot_go_well_is_said_before_anything_trains(folder, override, message, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = [str(ROOT / "configs" / "own.yaml"), "data.path=ROWS.jsonl", "output=refused", "model.path=model"]
    for way in ([], ["--dry-run"]):
        with pytest.raises(InputError, match=message):
            experiment.main([*arguments, *SMALL, override, *way])
    assert not (folder / "refused").exists()
