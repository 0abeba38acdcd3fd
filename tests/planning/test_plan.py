"""The stage: what it prints and writes, what it proposes, what it refuses."""

import json
import sys

import pytest
import yaml

from qtale_jax import command
from qtale_jax import plan as stage
from qtale_jax.config import resolve
from qtale_jax.planning.devices import topology
from qtale_jax.planning.plan import subject_of
from qtale_jax.planning.proposal import propose, smallest, usable_bytes
from qtale_jax.planning.training import TrainingPlanner


@pytest.fixture
def run(tiny, tmp_path, monkeypatch, capsys):
    """Runs the stage as its module does; returns (exit code, stdout, stderr)."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(resolve(tiny(f"output={tmp_path / 'run'}"))))

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["plan", str(tmp_path / "tiny.yaml"), *arguments])
        with pytest.raises(SystemExit) as stop:
            command.run(stage.main)
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return call


@pytest.mark.slow
def test_it_prints_and_writes_the_same_numbers(run, tmp_path):
    code, out, _ = run("plan.topology=h100:4", "mesh.tensor=2")
    file = tmp_path / "run" / "plan.json"
    assert code == 0 and out.splitlines()[-1] == str(file)
    assert [path.name for path in file.parent.iterdir()] == ["plan.json"]
    found = json.loads(file.read_text())
    assert found["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    assert found["topology"] == {"name": "h100:4", "devices": 4} and found["device"]["kind"] == "h100"
    training = found["training"]
    sizes = dict(training["bytes_per_device"])
    assert sizes.pop("total") == sum(sizes.values()) and training["fits"]
    assert (training["rows_per_device"], training["microbatches"]) == (4, 1)
    assert training["tokens_per_second"] == pytest.approx(8 * 12 / training["per_device"]["seconds"])
    steps = [(each["step"], each["rows"]) for each in found["inference"]]
    assert steps == [("prefill", 1), ("prefill", 32), ("decode", 1), ("decode", 32)]
    assert found["compiled"] is None and found["numbers"].startswith("estimated")
    for text in ("training model.architecture on h100:4 (data 1, fsdp 2, tensor 2)", "decode, batch 32", "fits"):
        assert text in out
    assert "these numbers are estimates from shapes; programs are compiled for TPU topologies only" in out
    assert found["proposal"]["smallest_topology"]["topology"] == "h100:2"  # mesh.tensor=2 needs two


def test_without_libtpu_it_says_how_to_get_it(tiny, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    reason = stage._not_compiled(tiny(), topology("v5e:2x2"))
    assert reason is not None and 'pip install -e ".[aot]"' in reason
    assert "plan.compile" in (stage._not_compiled(tiny("plan.compile=[]"), topology("v5e:2x2")) or "")


def test_dry_run_writes_nothing(run, tmp_path):
    code, out, _ = run("--dry-run", "plan.topology=v5e:2x2")
    assert code == 0 and out.startswith("plan: dry run, nothing is written\n")
    assert "v5e:2x2, 4 × TPU v5e" in out and "fsdp 4" in out and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["plan.topology=v5e:5x5"], "plan.topology='v5e:5x5': v5e does not come in this shape"),
        (["plan.topology=v4:2x2"], "unknown device kind"),
        (["mesh.fsdp=4"], "mesh (data=1, fsdp=4, tensor=1) does not fit 8 devices"),
        (["plan.topology=v5e:4x4"], "= 8 rows do not divide over data x fsdp = 16 devices"),
        (["mesh.fsdp=2", "mesh.tensor=4"], "mesh.tensor=4 does not divide the 2 key and value heads of the model"),
        (["mesh.fsdp=1", "mesh.tensor=8"], "mesh.tensor=8 does not divide the 4 query heads of the model"),
        (["model.architecture.vocab_size=61", "mesh.fsdp=4", "mesh.tensor=2"], "the 61 tokens of the vocabulary"),
        (["plan.model=llama-3.1-9b"], "plan.model=llama-3.1-9b: found neither model.json nor config.json there"),
        (["plan.model=llama-3.1-9b"], "(did you mean 'llama-3.1-8b'?)"),
        (["model.path=nowhere"], "model.path=nowhere: found neither model.json nor config.json there"),
        (["quantize.group_size=48", "plan.model=llama-2-7b"], "group_size=48"),
        (["data.length=65"], "data.length=65"),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, overrides, message):
    code, out, err = run(*overrides)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("error: ") and message in err
    assert not (tmp_path / "run").exists()


def test_a_hugging_face_config_is_enough(tiny, tmp_path):
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}))
    for path in (file, tmp_path):
        found = subject_of(tiny(f"plan.model={path}"))
        assert found.spec.architecture.intermediate_size == 48
        assert found.parameters == 2 * 80 * 32 + 32 + 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 + 2 * 32)


def test_proposals_fit_and_the_next_size_does_not(tiny):
    """A share of the memory so small that a few rows fill it."""
    config = tiny("plan.topology=h100:8", "plan.usable=0.00001", "model.architecture.vocab_size=1024")
    planner = TrainingPlanner(config, subject_of(config).spec)
    found = propose(planner, topology("h100:8"))
    assert found is not None
    limit = usable_bytes(config, topology("h100:8"))
    assert sum(planner.memory(found.mesh, found.rows, 1).values()) <= limit
    assert sum(planner.memory(found.mesh, 2 * found.rows, 1).values()) > limit
    least = smallest(planner, topology("h100:8"))
    assert least is not None and least.microbatches is not None and least.bytes <= limit
    ways = least.mesh[0] * least.mesh[1]
    assert 8 % (ways * least.microbatches) == 0
    if least.microbatches > 1:
        assert sum(planner.memory(least.mesh, 8 // ways, 1).values()) > limit


def test_nothing_fits_into_nothing(tiny):
    config = tiny("plan.topology=h100:8", "plan.usable=0.0")
    planner = TrainingPlanner(config, subject_of(config).spec)
    assert propose(planner, topology("h100:8")) is None and smallest(planner, topology("h100:8")) is None
