import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.artifact import fingerprint, load_model, read_model_json, save_model, weight_bytes
from qtale_jax.config.schema import Config, QuantizeConfig
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, LoraSpecification, ModelSpecification
from qtale_jax.quantization.rounding import fake_quantize
from qtale_jax.quantization.storage import unstore
from qtale_jax.quantize import run_stage

pytestmark = pytest.mark.slow

SPEC = ModelSpecification(
    architecture=Architecture(
        vocab_size=23,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_length=32,
    )
)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A model directory in floating point, where quantization looks for it by default."""
    path = tmp_path_factory.mktemp("run") / "trained"
    save_model(path, SPEC, initialize(SPEC, jax.random.key(0)), provenance={"stage": "train", "seed": 7})
    return path


def config_for(parent, target, **quantize) -> Config:
    return Config(
        output=str(parent.parent), quantize=QuantizeConfig(output=None if target is None else str(target), **quantize)
    )


@pytest.mark.parametrize(("bits", "group"), [(4, 16), (3, -1)])
def test_what_is_written_is_the_rounded_model(parent, tmp_path, bits, group):
    before = fingerprint(parent)
    path = run_stage(config_for(parent, tmp_path / "quantized", bits=bits, group_size=group), quiet=True)
    original, loaded = load_model(parent), load_model(path)
    assert loaded.spec.quantization is not None
    for layer, name in ((0, "query"), (1, "value")):
        kernel = original.params["layers"][layer]["attention"][name]["kernel"]
        stored = loaded.params["layers"][layer]["attention"][name]["quantized"]
        format = loaded.spec.quantization.format(layer, name)
        assert format is not None and (format.bits, format.group_size) == (bits, group)
        np.testing.assert_array_equal(unstore(stored, kernel.shape, format), fake_quantize(kernel, format))
    assert weight_bytes(loaded.params)["total"] < weight_bytes(original.params)["total"]
    assert fingerprint(parent) == before


def test_provenance_names_the_parent_and_the_quantizer(parent, tmp_path):
    path = run_stage(config_for(parent, tmp_path / "quantized", bits=8, group_size=16), quiet=True)
    provenance = read_model_json(path).provenance
    assert provenance["stage"] == "quantize" and provenance["seed"] == 7
    settings = QuantizeConfig(method="rtn", bits=8, group_size=16)
    assert provenance["quantizer"] == settings.model_dump(mode="json", exclude={"model", "output"})
    assert provenance["layers"][1]["linears"]["value"]["bits"] == 8
    assert provenance["parent"] == {"path": str(parent), "fingerprint": fingerprint(parent)}


def test_where_it_goes_by_default(parent):
    path = run_stage(config_for(parent, None, bits=2, group_size=16, symmetric=True), quiet=True)
    assert str(path) == str(parent.parent / "rtn-2bit-g16-sym")
    assert read_model_json(path).spec.bits == 2


def test_without_a_method_the_model_is_the_same(parent, tmp_path):
    path = run_stage(config_for(parent, tmp_path / "same", method="none", bits=16), quiet=True)
    assert read_model_json(path).spec == SPEC
    jax.tree.map(np.testing.assert_array_equal, load_model(path).params, load_model(parent).params)


def test_nothing_is_written_when_the_input_is_bad(parent, tmp_path):
    adapted = SPEC.model_copy(update={"lora": LoraSpecification(rank=2)})
    save_model(tmp_path / "adapted", adapted, initialize(adapted, jax.random.key(0)))
    target = tmp_path / "out"
    for settings, message in (
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"model": str(tmp_path / "adapted")}, "adapters"),
        ({"group_size": 32}, "group_size=32 does not divide the 48 inputs"),
    ):
        with pytest.raises(InputError, match=message):
            run_stage(config_for(parent, target, bits=4, **settings), quiet=True)
        assert not target.exists()
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists"):
        run_stage(config_for(parent, target, bits=4), quiet=True)
    assert [file.name for file in target.iterdir()] == ["notes.txt"]


def test_bfloat16_models_keep_their_type(tmp_path):
    spec = SPEC.model_copy(update={"dtype": "bfloat16"})
    save_model(tmp_path / "trained", spec, initialize(spec, jax.random.key(0)))
    loaded = load_model(run_stage(config_for(tmp_path / "trained", None, bits=8), quiet=True))
    assert loaded.params["embedding"]["table"].dtype == jnp.bfloat16
    assert loaded.params["layers"][0]["mlp"]["up"]["quantized"]["values"].dtype == jnp.int8


def test_command_line(parent, tmp_path, run_module, run_here):
    (tmp_path / "c.yaml").write_text(f"quantize: {{model: {parent}, bits: 4}}\n")
    arguments = ("c.yaml", "quantize.output=out", "quantize.group_size=16")
    done = run_module("qtale_jax.quantize", *arguments)
    assert done.returncode == 0, done.stderr
    assert "bytes before" in done.stdout and done.stdout.splitlines()[-1] == "out"
    assert f"{weight_bytes(load_model(tmp_path / 'out').params)['total']:,}" in done.stdout
    for change, message in (
        (arguments, "out exists"),
        (("c.yaml", "quantize.output=new", "quantize.group_size=32"), "group_size=32"),
        (("c.yaml", "quantize.output=new", "quantize.bits=5"), "bits"),
    ):
        refused = run_here("qtale_jax.quantize", *change)
        assert refused.returncode == 2
        assert len(refused.stderr.strip().splitlines()) == 1 and message in refused.stderr
    assert not (tmp_path / "new").exists()
