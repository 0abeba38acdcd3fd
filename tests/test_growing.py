"""A model directory that grows layer by layer: what is finished stays, what is damaged or foreign does not pass."""

import json
import shutil

import jax
import numpy as np
import pytest

from qtale_jax.artifact import GrowingModel, load_model, read_model_json
from qtale_jax.artifact.arrays import flatten
from qtale_jax.artifact.growing import check_target
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.specification import Architecture, ModelSpecification

SPEC = ModelSpecification(
    architecture=Architecture(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        max_length=32,
    )
)
IDENTITY = {"source": "abc", "quantize": {"bits": 4, "rules": []}}


@pytest.fixture(scope="module")
def params() -> dict:
    """Random parameters; nothing to compile."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jax.numpy.asarray(generator.normal(size=leaf.shape), leaf.dtype), abstract_parameters(SPEC)
    )


def rest(params) -> dict:
    return {name: leaf for name, leaf in flatten(params).items() if not name.startswith("layers/")}


def grow(path, params, layers=range(3)) -> GrowingModel:
    growing = GrowingModel(path, SPEC, IDENTITY)
    for index in layers:
        growing.add_layer(index, params["layers"][index], {"layer": index})
    return growing


def test_the_finished_directory_is_a_model(tmp_path, params):
    path = tmp_path / "deep" / "model"
    growing = grow(path, params)
    assert not path.exists() and growing.finished() == {index: {"layer": index} for index in range(3)}
    growing.finish(rest(params), tokenizer=None, provenance={"stage": "test"})
    loaded = load_model(path)
    assert loaded.spec == SPEC and loaded.provenance == {"stage": "test"}
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    assert sorted(file.name for file in path.iterdir()) == ["arrays", "model.json"]
    on_disk = {str(f.relative_to(path / "arrays")) for f in (path / "arrays").rglob("*") if f.is_file()}
    assert set(read_model_json(path).files) == on_disk
    assert [file.name for file in path.parent.iterdir()] == ["model"]


def test_what_is_finished_is_found_again(tmp_path, params):
    grow(tmp_path / "model", params, (0, 1))
    again = GrowingModel(tmp_path / "model", SPEC, IDENTITY)
    assert again.finished() == {0: {"layer": 0}, 1: {"layer": 1}}
    jax.tree.map(np.testing.assert_array_equal, again.layer(1), params["layers"][1])
    with pytest.raises(ValueError, match="layer 2 is missing"):
        again.finish(rest(params), tokenizer=None, provenance={})
    assert not (tmp_path / "model").exists()
    again.add_layer(2, params["layers"][2], {"layer": 2})
    again.finish(rest(params), tokenizer=None, provenance={})
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "model").params, params)


def largest_file(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


DAMAGES = {
    "no note": lambda partial: (partial / "layers" / "00001.json").unlink(),
    "half a note": lambda partial: (partial / "layers" / "00001.json").write_text('{"files": {"a": {"by'),
    "another kind of note": lambda partial: (partial / "layers" / "00001.json").write_text('{"layer": 1}'),
    "truncated": lambda partial: cut(largest_file(partial / "arrays" / "part-00001")),
    "changed": lambda partial: flip(largest_file(partial / "arrays" / "part-00001")),
    "a file lost": lambda partial: largest_file(partial / "arrays" / "part-00001").unlink(),
    "a file too many": lambda partial: (partial / "arrays" / "part-00001" / "more").write_text("x"),
    "no arrays": lambda partial: shutil.rmtree(partial / "arrays" / "part-00001"),
}


def cut(file) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_layer_is_not_finished(tmp_path, params, damage):
    grow(tmp_path / "model", params)
    DAMAGES[damage](tmp_path / ".model.partial")
    growing = GrowingModel(tmp_path / "model", SPEC, IDENTITY)
    assert growing.finished() == {0: {"layer": 0}, 2: {"layer": 2}}
    growing.add_layer(1, params["layers"][1], {"layer": "again"})
    assert growing.finished()[1] == {"layer": "again"}
    growing.finish(rest(params), tokenizer=None, provenance={})
    jax.tree.map(np.testing.assert_array_equal, load_model(tmp_path / "model").params, params)


def test_damage_after_the_check_shows_on_loading(tmp_path, params):
    growing = grow(tmp_path / "model", params)
    flip(largest_file(tmp_path / ".model.partial" / "arrays" / "part-00001"))
    growing.finish(rest(params), tokenizer=None, provenance={})
    with pytest.raises(InputError, match="part-00001.* is damaged"):
        load_model(tmp_path / "model")


def test_remains_of_killed_writers_are_removed(tmp_path, params):
    growing = grow(tmp_path / "model", params)
    arrays = tmp_path / ".model.partial" / "arrays"
    shutil.copytree(arrays / "part-00000", arrays / "part-00003")
    shutil.copytree(arrays / "part-00000", arrays / "part-00001.orbax-checkpoint-tmp-7")
    growing.finish(rest(params), tokenizer=None, provenance={})
    found = load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    parts = sorted(part.name for part in (tmp_path / "model" / "arrays").iterdir())
    assert parts == [f"part-0000{index}" for index in range(4)]


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        ({"source": "abd"}, "it differs in source"),
        ({"quantize": {"bits": 3, "rules": []}}, "it differs in quantize.bits"),
        ({"quantize": {"bits": 4, "rules": [1]}, "more": 1}, "it differs in more, quantize.rules"),
    ],
)
def test_another_run_under_the_name_is_refused(tmp_path, params, other, difference):
    path = tmp_path / "model"
    grow(path, params, (0,))
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for start in (check_target, lambda path, identity: GrowingModel(path, SPEC, identity)):
        with pytest.raises(InputError) as error:
            start(path, IDENTITY | other)
        assert f".model.partial holds the beginning of another run ({difference}); remove" in str(error.value)
    check_target(path, IDENTITY)
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}


@pytest.mark.parametrize("text", ["", "[1]", '{"source": ', "\x00\x01"])
def test_a_damaged_identity_is_refused(tmp_path, params, text):
    grow(tmp_path / "model", params, ())
    (tmp_path / ".model.partial" / "identity.json").write_text(text)
    with pytest.raises(InputError, match="identity.json is damaged"):
        GrowingModel(tmp_path / "model", SPEC, IDENTITY)


def test_names_that_cannot_be_written_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / ".other.partial").write_text("x")
    for path, message in (
        (tmp_path / "model", "exists already"),
        (tmp_path / "file" / "model", "cannot be written"),
        (tmp_path / "other", "cannot be written"),
    ):
        with pytest.raises(InputError, match=message):
            GrowingModel(path, SPEC, IDENTITY)
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.partial", "file", "model"]


def test_layers_of_another_shape_are_refused(tmp_path, params):
    growing = GrowingModel(tmp_path / "model", SPEC, IDENTITY)
    layer = jax.tree.map(lambda leaf: leaf[..., :-1], params["layers"][0])
    with pytest.raises(ValueError, match=r"layers/0/.* is float32\(.*\), expected float32\("):
        growing.add_layer(0, layer, {})
    assert growing.finished() == {}


def test_what_is_discarded_is_gone(tmp_path, params):
    grow(tmp_path / "model", params, (0,)).discard()
    assert not list(tmp_path.iterdir())


def test_notes_are_json_and_whole(tmp_path, params):
    grow(tmp_path / "model", params, (1,))
    notes = list((tmp_path / ".model.partial" / "layers").iterdir())
    assert [note.name for note in notes] == ["00001.json"]
    assert json.loads(notes[0].read_text())["note"] == {"layer": 1}
