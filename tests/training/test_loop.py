"""The loop in this process: what it logs, how often it compiles, and what it writes."""

import json
import logging
import re

import jax
import numpy as np
import pytest

from qtale_jax.artifact import load_model
from qtale_jax.data.rows import digest
from qtale_jax.errors import InputError
from qtale_jax.models.specification import ModelSpecification
from qtale_jax.training import loop
from qtale_jax.training.checkpoint import Checkpoints
from qtale_jax.training.identity import check_claim, claim
from qtale_jax.training.lock import held
from qtale_jax.training.logs import RunLog
from qtale_jax.training.loop import train
from qtale_jax.training.plan import extended_abstract
from qtale_jax.training.start import architecture_from

LOGGED = {
    "step",
    "loss",
    "cross_entropy",
    "rate_loss",
    "entropy_loss",
    "executed_ratio",
    "executed_per_layer",
    "logit_gap_mean",
    "logit_gap_q10",
    "logit_gap_q50",
    "logit_gap_q90",
    "flip_rate",
    "entropy",
    "gradient_norm",
    "tokens_per_second",
    "steps_per_second",
    "model_flop_utilization",
    "memory_bytes",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, make_config):
    """A finished run on all eight devices, and the functions that were compiled, in order."""
    folder = tmp_path_factory.mktemp("loop")
    config = make_config(train={"steps": 5, "log_every": 2, "evaluate_every": 3, "checkpoint_every": 3})
    config = config.model_copy(update={"output": str(folder / "run")})
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("jax")
    logger.addHandler(handler)
    try:
        with jax.log_compiles():
            path = train(config, quiet=True)
    finally:
        logger.removeHandler(handler)
    compiled = [found[1] for line in lines if (found := re.match(r"Compiling (?:jit\()?([^\s)]+)", line))]
    return path, compiled, config


@pytest.mark.slow
def test_step_is_compiled_once(finished):
    _, compiled, _ = finished
    names = [name for name in compiled if "train_step" in name]
    assert len(names) == 1, sorted(compiled)
    assert len([name for name in compiled if "batch_nats" in name]) == 1


@pytest.mark.slow
def test_a_finished_run_is_seen_before_anything_is_read(finished, monkeypatch):
    path, _, config = finished

    def read(*_):
        raise AssertionError("models and data are read")

    monkeypatch.setattr(loop, "prepare", read)
    monkeypatch.setattr(loop, "pipeline_for", read)
    assert train(config, quiet=True) == path
    with pytest.raises(InputError, match="holds another run: seed was"):
        train(config.model_copy(update={"seed": config.seed + 1}), quiet=True)


def test_log_has_the_documented_keys(finished):
    path, _, _ = finished
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4, 5]  # every second step, validations, the last
    assert all(row.keys() - {"validation"} == LOGGED for row in rows)
    assert [row["step"] for row in rows if "validation" in row] == [3, 5]
    assert all(len(row["executed_per_layer"]) == 2 and 0 <= row["flip_rate"] <= 1 for row in rows)
    assert list((path.parent / "tensorboard").glob("events*"))


@pytest.mark.slow
def test_what_is_written_is_a_whole_model_with_its_history(finished):
    path, _, config = finished
    model = load_model(path)
    assert model.spec.lora is None and model.spec.routing is not None
    assert model.provenance["stage"] == "train" and model.provenance["steps"] == 5
    assert model.provenance["config"]["train"]["steps"] == config.train.steps
    assert model.tokenizer is not None
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


@pytest.mark.slow
def test_fine_tune_of_a_parent_distils_from_it(finished, tmp_path, make_config):
    """The teacher survives the steps, whose state is donated, and the first divergence is that of sampled routes."""
    parent, _, _ = finished
    train_section = {"steps": 2, "parameters": "adapters", "distillation": {"weight": 1.0}}
    config = make_config(model={"path": str(parent)}, train=train_section)
    path = train(config.model_copy(update={"output": str(tmp_path / "run")}), quiet=True)
    rows = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["distillation"] > 0 for row in rows)
    before, after = load_model(parent).params, load_model(path).params
    np.testing.assert_array_equal(before["layers"][2]["mlp"]["up"]["kernel"], after["layers"][2]["mlp"]["up"]["kernel"])
    assert not np.array_equal(
        before["layers"][2]["attention"]["query"]["kernel"], after["layers"][2]["attention"]["query"]["kernel"]
    )


@pytest.mark.slow
def test_best_checkpoint_outlives_newer_ones(tmp_path, trainer):
    run = trainer(routing={"method": "dense"}, lora=None)
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    assert checkpoints.latest is None
    for step, metric in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, None)):
        checkpoints.save(step, run.state, {"next": step}, metric)
    checkpoints.close()
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 5]
    again = Checkpoints(tmp_path / "checkpoints", keep=1)
    state, position = again.restore(5, run.state)
    again.close()
    assert position == {"next": 5}
    jax.tree.map(np.testing.assert_array_equal, state, run.state)
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, run.state)


def test_identity_ignores_what_is_only_written(tmp_path, make_config):
    claim(tmp_path, make_config())
    claim(tmp_path, make_config(train={"log_every": 7, "checkpoint_every": 3, "merge_lora": False}))
    with pytest.raises(InputError, match=r"train\.batch_size was 8, now 16.*choose another output"):
        claim(tmp_path, make_config(train={"batch_size": 16}))
    with pytest.raises(InputError, match=r"lora\.rank was 2, now 4"):
        claim(tmp_path, make_config(lora={"rank": 4}))


def test_identity_knows_the_rows_and_the_parent(tmp_path, make_config):
    rows = {"tokens": np.arange(6, dtype=np.int32).reshape(2, 3)}
    before, after = digest(rows), digest({"tokens": rows["tokens"] + 1})
    assert before != digest({"tokens": rows["tokens"].reshape(3, 2)})
    claim(tmp_path, make_config(), before)
    claim(tmp_path, make_config(), before)
    check_claim(tmp_path, make_config())  # who has not read the rows does not ask
    with pytest.raises(InputError, match="what the data section reads has changed since"):
        claim(tmp_path, make_config(), after)
    with pytest.raises(InputError, match="no such model directory"):  # the parent of a finished run was moved
        check_claim(tmp_path, make_config(model={"path": str(tmp_path / "gone")}))


@pytest.mark.parametrize("method", ["dllm", "qtale", "mod", "random"])
def test_shapes_tell_what_training_starts_from(make_config, method):
    config = make_config(routing={"method": method})
    parent = ModelSpecification(architecture=architecture_from(config.model.architecture, 60))
    spec, _ = extended_abstract(config, parent)
    assert spec.routing is not None and spec.routing.method == method


@pytest.mark.parametrize("method", ["qtale", "random"])
@pytest.mark.parametrize(
    ("routing", "message"),
    [
        ({"always_on_layers": 9}, "always_on_layers=9 leaves no routed layer of"),
        ({"always_on_tokens": 500}, "always_on_tokens=500 leaves no routed token of data.length="),
        ({"always_on_layers": 1, "target": 0.05}, "target=0.05 is below what routing.always_on_layers=1 of"),
    ],
)
def test_routing_that_cannot_be_is_refused(make_config, method, routing, message):
    config = make_config(routing={"method": method, **routing}, model={"path": "a parent"})
    parent = ModelSpecification(architecture=architecture_from(config.model.architecture, 60))
    with pytest.raises(InputError, match=message):
        extended_abstract(config, parent)


def test_a_folder_that_is_being_trained_in_is_refused(tmp_path, make_config):
    config = make_config().model_copy(update={"output": str(tmp_path)})
    claim(tmp_path, config)
    before = sorted(tmp_path.iterdir())
    with held(tmp_path), pytest.raises(InputError, match="another process is training in"):
        train(config, quiet=True)
    assert sorted(tmp_path.iterdir()) == before
    with held(tmp_path):  # it was let go
        pass


def test_checkpoints_of_an_unknown_run_are_not_continued(tmp_path, make_config):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(InputError, match=r"run\.json"):
        claim(tmp_path, make_config())
    assert not (tmp_path / "run.json").exists()


def test_log_drops_what_comes_after_the_checkpoint(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "los')
    with RunLog(tmp_path, total=9, resumed=2, quiet=True) as log:
        log.write(3, {"loss": float("nan"), "executed_per_layer": [0.5, 1.0]})
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows == [{"step": 1}, {"step": 2}, {"step": 3, "loss": None, "executed_per_layer": [0.5, 1.0]}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"batch_size": 12}}, "12 rows do not divide over data x fsdp = 8 devices"),
        ({"mesh": {"data": 3}, "train": {"batch_size": 12}}, "does not fit 8 devices"),
        ({"model": {"architecture": {"vocab_size": 20}}}, "vocab_size=20 does not match the tokenizer"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path, make_config, change, message):
    config = make_config(**change).model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(InputError, match=message):
        train(config, quiet=True)
    assert not (tmp_path / "run").exists()
