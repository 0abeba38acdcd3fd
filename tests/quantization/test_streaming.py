"""The stage as it is used: layer by layer from disk to disk, killed, continued, refused."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml

from qtale_jax import command, quantize
from qtale_jax.artifact import load_model, read_model_json, save_model, weight_bytes
from qtale_jax.artifact.arrays import flatten
from qtale_jax.config.schema import Config
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.quantization.pipeline import quantize_parameters
from qtale_jax.quantization.prefix import Prefix
from qtale_jax.quantization.streaming import QuantizationRun

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
LAYERS = 3
SHAPE = {"num_layers": LAYERS, "intermediate_size": 32, "num_kv_heads": 4}  # all linears square: few programs
QUANTIZE = {
    "method": "gptq",
    "bits": 4,
    "group_size": 16,
    "router_bits": 8,
    "embedding_bits": 8,
    "statistics": {"examples": 10, "batch_size": 4, "min_rows": 40},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_routed) -> Path:
    """Model directories: routed, the same in bfloat16, and without a tokenizer; and sixty questions."""
    folder = tmp_path_factory.mktemp("sources")
    tokenizer = reasoning.tokenizer()
    for name, dtype in (("routed", "float32"), ("narrow", "bfloat16")):
        spec, params = make_routed(dtype=dtype, **SHAPE)
        save_model(folder / name, spec, params, tokenizer=tokenizer, provenance={"seed": 0})
    save_model(folder / "silent", spec, params)
    rows = [{"query": f"sum : {i % 15} {i // 15} =", "choices": ["1", "2"], "gold": i % 2} for i in range(60)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def make_config(sources, tmp_path):
    """A configuration as plain data; keywords are keys of `quantize`."""

    def make(model: str = "routed", target: str = "out", data: dict | None = None, **settings) -> dict:
        source = {"kind": "multiple_choice", "path": str(sources / "sums.jsonl"), "length": 24, "held_out": 0.2}
        places = {"model": str(sources / model), "output": str(tmp_path / target)}
        return {"seed": 3, "data": source | (data or {}), "quantize": QUANTIZE | places | settings}

    return make


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory) -> Path:
    """What one uninterrupted process makes."""
    folder = tmp_path_factory.mktemp("whole")
    data = {"kind": "multiple_choice", "path": str(sources / "sums.jsonl"), "length": 24, "held_out": 0.2}
    places = {"model": str(sources / "routed"), "output": str(folder / "out")}
    (folder / "config.yaml").write_text(yaml.safe_dump({"seed": 3, "data": data, "quantize": QUANTIZE | places}))
    with start(folder / "config.yaml") as process:
        _, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    return folder / "out"


def start(config: Path) -> subprocess.Popen[str]:
    """`python -m qtale_jax.quantize CONFIG` on one device, its log on stderr."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return subprocess.Popen(
        [sys.executable, "-m", "qtale_jax.quantize", str(config)],
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(REPOSITORY)},
        cwd=config.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def arrays(model: Path) -> dict[str, tuple]:
    flat = flatten(load_model(model).params)
    return {name: (leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for name, leaf in flat.items()}


def contents(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in folder.rglob("*")}


def interrupted(config: dict, after: int) -> QuantizationRun:
    """Runs until `after` layers are done, then fails as if by a full disk."""
    checked = Config.model_validate(config)
    job = QuantizationRun(checked.quantize.model, checked)

    def say(report, before: bool) -> None:
        if report.layer + 1 == after:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        job.carry_out(checked.quantize.output, say)
    return job


@pytest.mark.slow
def test_the_stage_writes_what_quantization_in_memory_gives(make_config):
    config = Config.model_validate(make_config())
    path = quantize.run_stage(config, quiet=True)
    job, source = QuantizationRun(config.quantize.model, config), load_model(config.quantize.model)
    prefix = Prefix(
        source.spec, job.rows.tokens, job.rows.segment_ids, config.quantize.statistics, jnp.dtype(jnp.float32)
    )
    spec, params, reports = quantize_parameters(source.spec, source.params, config.quantize, prefix=prefix)
    loaded = load_model(path)
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert loaded.spec.quantization.formats == spec.quantization.formats
    assert loaded.tokenizer.get_vocab() == source.tokenizer.get_vocab()
    assert any(report.filled > 0 for report in reports) and any(report.filled == 0 for report in reports)

    # What model.json says of it.
    document = read_model_json(path)
    assert document.spec.quantization.calibration == job.rows.describe(config)
    assert document.spec.quantization.calibration["examples"] == 10
    assert document.spec.quantization.calibration["data"]["split"] == "calibration"
    assert document.provenance["layers"] == json.loads(json.dumps([dataclasses.asdict(one) for one in reports]))
    assert document.provenance["stage"] == "quantize" and document.provenance["quantizer"]["method"] == "gptq"
    assert weight_bytes(loaded.params) == weight_bytes(abstract_parameters(loaded.spec))


KILLS = (("identity.json", 0.1), ("layers/00000.json", 0.0), ("layers/00001.json", 0.03))


@pytest.mark.slow
@pytest.mark.parametrize("kills", [KILLS[2:], pytest.param(KILLS, marks=pytest.mark.exhaustive)], ids=len)
def test_killed_again_and_again_and_resumed_equals_one_run(make_config, tmp_path, whole, kills):
    file, partial = tmp_path / "config.yaml", tmp_path / ".out.partial"
    file.write_text(yaml.safe_dump(make_config()))
    notes: dict[str, int] = {}
    for name, wait in kills:
        with start(file) as process:
            while not (partial / name).exists():
                assert process.poll() is None, process.communicate()[1]
                time.sleep(0.002)
            time.sleep(wait)
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
        found = contents(partial / "layers")
        assert found.items() >= notes.items()  # what was finished has not been written again
        notes = {note: when for note, when in found.items() if note.endswith(".json")}
    assert len(notes) >= 2
    with start(file) as process:
        out, log = process.communicate(timeout=300)
    assert process.returncode == 0, log
    assert out.splitlines()[-1] == str(tmp_path / "out")
    done = [line for line in log.splitlines() if "done before" in line]
    assert [line.split(":")[0] for line in done] == [f"layer {index + 1}/{LAYERS}" for index in range(len(notes))]
    assert arrays(tmp_path / "out") == arrays(whole)
    mine, theirs = (read_model_json(path) for path in (tmp_path / "out", whole))
    assert mine.provenance == theirs.provenance and mine.spec == theirs.spec
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "awq", "rules": [{"match": "1/down", "bits": 16}, {"match": "2/down", "bits": 3}], "head_bits": 8},
        pytest.param({"method": "rtn", "bits": 3}, marks=pytest.mark.exhaustive),
    ],
    ids=["awq", "rtn"],
)
def test_every_method_resumes_to_the_same_bits(make_config, tmp_path, settings):
    """Narrow weights that AWQ has scaled, mixed widths and linears in floating point are read back as they were."""
    interrupted(make_config("narrow", **settings), after=2)
    assert not (tmp_path / "out").exists()
    resumed = quantize.run_stage(Config.model_validate(make_config("narrow", **settings)), quiet=True)
    whole = quantize.run_stage(Config.model_validate(make_config("narrow", target="whole", **settings)), quiet=True)
    assert arrays(resumed) == arrays(whole)
    assert read_model_json(resumed).provenance["layers"] == read_model_json(whole).provenance["layers"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    "damage", [flip_a_bit, *(pytest.param(f, marks=pytest.mark.exhaustive) for f in (truncate, Path.unlink))]
)
def test_damaged_layers_are_quantized_again(make_config, tmp_path, whole, damage):
    job = interrupted(make_config(), after=2)
    files = (tmp_path / ".out.partial" / "arrays" / "part-00000").rglob("*")
    damage(max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size))
    seen = []
    job.carry_out(tmp_path / "out", lambda report, before: seen.append((report.layer, before)))
    assert seen == [(0, False), (1, True), (2, False)]
    found, expected = (flatten(load_model(path).params) for path in (tmp_path / "out", whole))
    for name, leaf in expected.items():  # by another process with other threads: the integers, not every last bit
        if name.endswith("values"):
            assert (np.asarray(found[name]) == np.asarray(leaf)).mean() > 0.99, name
    redone = quantize.run_stage(Config.model_validate(make_config(target="again")), quiet=True)
    assert arrays(redone) == arrays(tmp_path / "out")


def refused(config: dict, folder: Path, monkeypatch, capsys) -> str:
    """Runs the stage as its module does; returns the one line it ends with, having checked that nothing was written."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    before = contents(folder)
    monkeypatch.setattr(sys, "argv", ["quantize", str(file)])
    with pytest.raises(SystemExit) as stop:
        command.run(quantize.main)
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.out == "" and contents(folder) == before
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    return lines[0]


@pytest.mark.slow
def test_the_beginning_of_another_run_is_refused(make_config, sources, tmp_path, monkeypatch, capsys):
    base = {"method": "rtn"}
    interrupted(make_config(**base), after=1)
    for change, difference in (
        ({"bits": 3}, "quantize.bits, specification.quantization"),
        ({"group_size": 8}, "quantize.group_size"),
        ({"model": str(sources / "narrow")}, "source, specification.dtype"),
    ):
        line = refused(make_config(**base | change), tmp_path, monkeypatch, capsys)
        assert ".out.partial holds the beginning of another run" in line and f"differs in {difference}" in line
    # The same command is not.
    assert quantize.run_stage(Config.model_validate(make_config(**base)), quiet=True) == tmp_path / "out"
    assert "out exists already" in refused(make_config(**base), tmp_path, monkeypatch, capsys)


def test_other_calibration_rows_are_another_run(make_config, tmp_path, monkeypatch, capsys):
    interrupted(make_config(), after=1)
    line = refused(make_config(data={"held_out": 0.25}), tmp_path, monkeypatch, capsys)
    assert "it differs in specification.quantization" in line


def test_calibration_data_that_does_not_do_is_refused_at_once(make_config, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.jsonl").write_text("")
    few = {"statistics": {"examples": 13}}
    for config, message in (
        (make_config(**few), "quantize.statistics.examples=13, but the calibration split has only 12 examples"),
        (make_config(data={"path": str(tmp_path / "empty.jsonl")}), "empty.jsonl is empty"),
        (make_config("silent"), "has no tokenizer"),
        (make_config(rules=[{"match": "9/*", "bits": 8}]), "quantize.rules.0.match='9/*' matches no linear"),
    ):
        assert message in refused(config, tmp_path, monkeypatch, capsys)


def test_weights_that_are_not_finite_leave_nothing_behind(make_config, tmp_path, make_routed):
    spec, params = make_routed(**SHAPE)
    params["layers"][2]["mlp"]["up"]["kernel"] = params["layers"][2]["mlp"]["up"]["kernel"].at[3, 4].set(jnp.nan)
    save_model(tmp_path / "broken", spec, params, tokenizer=reasoning.tokenizer())
    config = make_config(model=str(tmp_path / "broken"), method="rtn", router_bits=16, embedding_bits=16)
    with pytest.raises(InputError, match="layer 2, linear 'up' holds weights that are not finite"):
        quantize.run_stage(Config.model_validate(config), quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.fixture(scope="module")
def wide(tmp_path_factory, make_routed) -> Path:
    """A model large enough for the size of its arrays to show on disk."""
    path = tmp_path_factory.mktemp("wide") / "model"
    spec, params = make_routed(num_layers=2, hidden_size=128, intermediate_size=384, head_dim=32, routing=None)
    save_model(path, spec, params)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_reported_bytes_are_those_held_and_those_on_disk(make_config, wide, bits):
    settings = {"method": "rtn", "bits": bits, "router_bits": 16, "scale_dtype": "bfloat16", "group_size": 32}
    path = quantize.run_stage(Config.model_validate(make_config(model=str(wide), **settings)), quiet=True)
    loaded = load_model(path)
    reported = weight_bytes(abstract_parameters(loaded.spec))
    assert weight_bytes(loaded.params) == reported
    on_disk = sum(file.stat().st_size for file in (path / "arrays").rglob("*") if file.is_file())
    assert abs(on_disk - reported["total"]) < 0.15 * reported["total"] + 2**16
    assert (
        reported["total"] < {8: 0.3, 4: 0.18, 3: 0.15, 2: 0.11}[bits] * weight_bytes(load_model(wide).params)["total"]
    )
