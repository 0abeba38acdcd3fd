"""Calibration to a speed: what is timed, the table beside the artifact, the artifact, and what is refused."""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from qtale_jax import calibrate, command
from qtale_jax.artifact import LoadedModel, read_model_json, save_model
from qtale_jax.calibration import calibrate as calibration
from qtale_jax.calibration import measuring
from qtale_jax.calibration.latency import LatencyTable, LayerSeconds
from qtale_jax.calibration.measuring import layers_by_make, measure, measured_context, model_digest
from qtale_jax.config.budget import BudgetConfig
from qtale_jax.config.schema import Config
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.evaluation.likelihood import Counted, Likelihoods, Row
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import (
    Architecture,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)

ARCHITECTURE = Architecture(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    max_length=64,
)
ROUTING = RoutingSpecification(method="qtale", always_on_layers=1, router_hidden=8)
SPEC = ModelSpecification(architecture=ARCHITECTURE, routing=ROUTING)
FLOAT32 = jnp.dtype(jnp.float32)


@pytest.fixture(scope="module")
def params():
    return initialize(SPEC, jax.random.key(3))


@pytest.fixture
def run(tmp_path, params, monkeypatch, capsys):
    """Runs the stage as its module does; returns (exit code, stdout, lines of stderr)."""
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model", SPEC, params, tokenizer=reasoning.tokenizer(), provenance={"seed": 0})
    words = list(reasoning.WORDS)
    (tmp_path / "text.txt").write_text("<|endoftext|>".join(" ".join(words[i : i + 12]) for i in range(28)))
    config = {
        "output": "run",
        "data": {"kind": "text", "path": "text.txt", "length": 16, "held_out": 0.4},
        "evaluate": {"batch_size": 8},
        "calibrate": {"model": "model", "objective": "budget", "examples": 8},
        "budget": {"batch_size": 3, "prompt_length": 8, "repeats": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", ["calibrate", "config.yaml", *arguments])
        try:
            command.run(calibrate.main)
        except SystemExit as stop:
            code = int(stop.code or 0)
        else:
            code = 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()

    return run


@pytest.mark.slow
def test_the_table_is_measured_once_and_theta_meets_the_budget(run, tmp_path):
    assert run("budget.tokens_per_second=0.001", "calibrate.output=first", "--dry-run")[0] == 0
    assert not (tmp_path / "latency").exists()
    code, out, _ = run("budget.tokens_per_second=0.001", "calibrate.output=first")
    assert code == 0 and "measured now" in out and "tokens/s" in out
    [file] = (tmp_path / "latency").iterdir()
    table = json.loads(file.read_text())
    assert (table["rows"], table["context"], table["sizes"]) == (3, 8, [0, 1, 2, 3])
    assert table["idle"] > 0 and table["hardware"] and table["versions"]["jax"]
    first = read_model_json("first")
    assert first.spec.thresholds == (0.0, 0.0) and first.provenance["latency"] == table

    # What the second call says follows from these numbers, so that it has measured nothing.
    table |= {"idle": 0.001, "layers": [{"layers": [1, 2], "seconds": [0.0, 0.001, 0.0015, 0.002]}]}
    file.write_text(json.dumps(table))
    code, out, _ = run("budget.milliseconds_per_token=3", "calibrate.output=second")
    assert code == 0 and "measured before" in out
    spec, note = read_model_json("second").spec, read_model_json("second").spec.routing.calibration["16"]
    assert 0 < spec.thresholds[0] == note["theta"] and note["objective"] == "budget"
    assert note["budget"]["milliseconds_per_token"] == 3 >= note["budget"]["predicted_milliseconds_per_token"]
    path = zip(note["path"], note["budget"]["path_tokens_per_second"], strict=True)
    nearest = max((theta, speed) for (theta, _), speed in path if theta < note["theta"])
    assert nearest[1] < 3 / 0.003 <= note["budget"]["predicted_tokens_per_second"]

    code, out, err = run("budget.tokens_per_second=1e9", "calibrate.output=third")
    assert (code, out, len(err)) == (2, "", 1)
    assert re.search(
        r"tokens_per_second=1e\+09 is out of reach for 3 rows .*600 at theta 0 to 3000 .*up to 3000$", err[0]
    )
    assert not Path("third").exists()

    code, out, _ = run("budget.tokens_per_second=0.001", "calibrate.output=fourth", "budget.remeasure=true")
    assert code == 0 and "measured now" in out and json.loads(file.read_text())["idle"] != 0.001
    file.write_text("{}")
    code, out, err = run("budget.tokens_per_second=0.001", "calibrate.output=fifth")
    assert (code, out, len(err)) == (2, "", 1) and "damaged" in err[0] and "budget.remeasure=true" in err[0]


@pytest.mark.slow
def test_as_many_rows_execute_as_each_size_says(params, monkeypatch):
    seen, decode = [], measuring.decode

    def watched(*arguments, **settings):
        found = decode(*arguments, **settings)
        seen.append(np.asarray(found[2].execute))
        return found

    monkeypatch.setattr(measuring, "decode", watched)
    table = measure(SPEC, params, BudgetConfig(batch_size=3, prompt_length=8, repeats=1), FLOAT32)
    assert table.sizes == (0, 1, 2, 3) and len(seen) == 2 * len(table.sizes)
    for rows, execute in zip(table.sizes, seen, strict=False):
        assert execute[:, :, 0].all()  # always on
        np.testing.assert_array_equal(execute[:, :, 1:].sum(axis=0), np.full((32, 2), rows))
    assert table.ends > 0 and table.router > 0 and table.layers[0].layers == (1, 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "calibrate.objective='budget' needs the speed"),
        (["budget.tokens_per_second=1", "budget.milliseconds_per_token=1"], "both given; allowed: one of them"),
        (["budget.tokens_per_second=1", "calibrate.objective=ratio"], "would do nothing with calibrate.objective="),
        (["budget.tokens_per_second=1", "budget.prompt_length=33"], "context of 64; allowed: up to 32"),
        (["budget.tokens_per_second=1", "calibrate.examples=99"], "calibrate.examples=99"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_measured(run, tmp_path, overrides, message):
    code, out, err = run("calibrate.output=new", *overrides)
    assert (code, out, len(err)) == (2, "", 1) and message in err[0]
    assert not (tmp_path / "new").exists() and not (tmp_path / "latency").exists()


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"milliseconds_per_token": 2.0}, r"predicted are 5 at theta 0 to 2\.2 at .*=0\.5; allowed: 2\.2 or more$"),
        ({"tokens_per_second": 2000.0}, r"predicted are 800 at theta 0 to 1818 at .*=0\.5; allowed: up to 1818$"),
        ({"milliseconds_per_token": 3.0}, None),
    ],
)
def test_speed_follows_the_tokens_that_write_responses(budget, message, monkeypatch):
    config = Config.model_validate(
        {"calibrate": {"objective": "budget", "max_threshold": 0.5}, "budget": {"batch_size": 4, **budget}}
    )
    step = (0.0, 0.0005, 0.001, 0.0015, 0.002)
    table = LatencyTable("chip", {}, "", 4, 8, 1, (0, 1, 2, 3, 4), 0.001, 0.0, 0.0, (LayerSeconds((1, 2), step),))

    def counted(spec, params, rows, policy, **settings) -> Likelihoods:
        # Two rows of 8 tokens of which 5 write: routed layers execute 10, 8, .. 3 of them, and everything else.
        writing = np.array([10.0, *np.round(10 - 14 * np.asarray(policy.threshold))])
        zero = np.zeros(())
        sums = Counted(np.float32(16), 6 + writing, zero, zero, zero, zero, zero, np.float32(10), writing)
        return Likelihoods(np.zeros(2), np.ones(2), np.zeros(2, bool), sums)

    rows = [Row(range(8), 3)] * 2
    monkeypatch.setattr(calibration, "likelihoods", counted)
    monkeypatch.setattr(calibration, "calibration_rows", lambda *_: (rows, None))
    monkeypatch.setattr(calibration, "layout", lambda spec, params: params)
    model = LoadedModel(SPEC, {}, None, {})
    if message:
        with pytest.raises(InputError, match=message):
            calibration.search(model, config, [], table)
        return
    found = calibration.search(model, config, [], table)
    # 5 of 10 tokens execute a layer: 1 ms + 2 * 0.5 * 2 ms.
    assert found.ratio == pytest.approx((3 * 6 + 10 + 5 + 5) / 48)
    assert table.tokens_per_second(found.step_seconds) == pytest.approx(4 / 0.003)


def test_layers_of_one_make_are_measured_together():
    four = {f"{layer}/down": TensorFormat(bits=4) for layer in (1, 2)}
    eight = {"0/down": TensorFormat(bits=8)}
    mixed = SPEC.model_copy(
        update={
            "routing": ROUTING.model_copy(update={"always_on_layers": 0}),
            "quantization": QuantizationSpecification(method="rtn", formats=eight | four),
        }
    )
    assert layers_by_make(SPEC) == ((1, 2),)
    assert layers_by_make(mixed) == ((0,), (1, 2))
    local = ARCHITECTURE.model_copy(update={"sliding_window": 4, "global_layers": (1,)})
    assert layers_by_make(mixed.model_copy(update={"architecture": local})) == ((0,), (1,), (2,))


def test_a_table_is_for_all_models_of_one_shape():
    calibrated = ROUTING.model_copy(update={"thresholds": {"16": (0.1, 0.2)}, "calibration": {"16": {"a": 1}}})
    assert model_digest(SPEC, FLOAT32) == model_digest(SPEC.model_copy(update={"routing": calibrated}), FLOAT32)
    others = [ARCHITECTURE.model_copy(update={"hidden_size": 32}), ARCHITECTURE.model_copy(update={"num_kv_heads": 1})]
    digests = [model_digest(SPEC.model_copy(update={"architecture": other}), FLOAT32) for other in others]
    assert len({*digests, model_digest(SPEC, FLOAT32), model_digest(SPEC, jnp.dtype(jnp.bfloat16))}) == 4


def test_the_first_step_that_is_timed_is_routed():
    assert measured_context(SPEC, BudgetConfig(prompt_length=1)) == 2
    assert measured_context(SPEC, BudgetConfig(prompt_length=8)) == 8
    short = SPEC.model_copy(update={"architecture": ARCHITECTURE.model_copy(update={"max_length": 16})})
    with pytest.raises(InputError, match="context of 16; no speed can be measured"):
        measured_context(short, BudgetConfig(prompt_length=1))
