"""The model directory: what is saved comes back bit for bit, and nothing half-written or damaged passes."""

import json
import shutil
import zlib

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from qtale_jax import artifact
from qtale_jax.artifact import arrays
from qtale_jax.config.schema import MeshConfig
from qtale_jax.data import reasoning
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import abstract_parameters, logical_axes
from qtale_jax.models.specification import (
    LINEARS,
    Architecture,
    LoraSpecification,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
    TensorFormat,
)
from qtale_jax.parallel.mesh import build_mesh, shardings

ARCHITECTURE = Architecture(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_length=32,
)
ROUTING = RoutingSpecification(
    method="qtale", always_on_layers=1, router_hidden=8, thresholds={"16": (0.25, 0.5)}, calibration={"16": {"on": "x"}}
)
ROUTED = ModelSpecification(
    architecture=ARCHITECTURE,
    routing=ROUTING,
    lora=LoraSpecification(rank=2, targets=("query", "down")),
    dtype="bfloat16",
)
DENSE = ModelSpecification(architecture=ARCHITECTURE)


def parameters(spec, seed=0):
    """Random arrays of the right shapes and types, quantized ones included; nothing to compile."""
    generator = np.random.default_rng(seed)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(generator.normal(size=leaf.shape).astype(leaf.dtype))
        low, high = int(jnp.iinfo(leaf.dtype).min), int(jnp.iinfo(leaf.dtype).max)
        return jnp.asarray(generator.integers(low, high, leaf.shape, np.int64, endpoint=True).astype(leaf.dtype))

    return jax.tree.map(fill, abstract_parameters(spec))


def quantized(spec, bits, group_size=8, symmetric=False):
    form = TensorFormat(bits=bits, group_size=group_size, symmetric=symmetric)
    formats = {f"{layer}/{name}": form for layer in range(spec.architecture.num_layers) for name in LINEARS}
    return spec.model_copy(update={"quantization": QuantizationSpecification(method="rtn", formats=formats)})


def assert_same(found, expected):
    found, expected = arrays.flatten(found), arrays.flatten(expected)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype, name
        assert found[name].shape == leaf.shape, name
        assert np.asarray(found[name]).tobytes() == np.asarray(leaf).tobytes(), name


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model"
    artifact.save_model(path, ROUTED, parameters(ROUTED), provenance={"stage": "test", "seed": 3})
    return path


def test_everything_comes_back(saved):
    loaded = artifact.load_model(saved)
    assert loaded.spec == ROUTED
    assert loaded.spec.routing.thresholds == ROUTING.thresholds
    assert loaded.spec.routing.calibration == ROUTING.calibration
    assert loaded.provenance == {"stage": "test", "seed": 3}
    assert loaded.tokenizer is None
    assert list(loaded.params["layers"]) == [0, 1, 2]
    assert_same(loaded.params, parameters(ROUTED))
    assert artifact.read_model_json(saved).versions.keys() >= {"qtale_jax", "jax", "flax", "orbax-checkpoint", "qwix"}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_quantized_models_come_back(tmp_path, bits, symmetric):
    spec = quantized(DENSE, bits, symmetric=symmetric)
    params = parameters(spec)
    artifact.save_model(tmp_path / "model", spec, params)
    loaded = artifact.load_model(tmp_path / "model")
    assert loaded.spec == spec
    assert_same(loaded.params, params)


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "int8", "int4", "uint8", "uint32"]),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=2).map(tuple),
    numpy=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_array_types_come_back(tmp_path_factory, dtype, shape, numpy, seed):
    size, width = int(np.prod(shape)), jnp.dtype(dtype).itemsize
    # Any bit pattern, NaN payloads included; int4 keeps one value per byte in memory.
    raw = np.random.default_rng(seed).integers(0, 256, size * width, np.uint8)
    array = (raw % 16).astype(np.int8).astype(jnp.int4) if dtype == "int4" else raw.view(jnp.dtype(dtype))
    array = array.reshape(shape)
    path = tmp_path_factory.mktemp("arrays") / "arrays"
    arrays.write_arrays(path, {"a/b": array if numpy else jnp.asarray(array)})
    expected = {"a/b": jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=SingleDeviceSharding(jax.devices()[0]))}
    found = arrays.read_arrays(path, expected)["a/b"]
    assert isinstance(found, jax.Array)
    assert found.dtype == array.dtype
    assert np.asarray(found).tobytes() == array.tobytes()


def test_arrays_restore_into_shards(saved):
    mesh = build_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    wanted = shardings(mesh, logical_axes(ROUTED), abstract_parameters(ROUTED))
    loaded = artifact.load_model(saved, shardings=wanted)
    flat, placed = arrays.flatten(loaded.params), arrays.flatten(wanted)
    for name, leaf in flat.items():
        assert leaf.sharding.is_equivalent_to(placed[name], leaf.ndim), name
    kernel = flat["layers/1/attention/query/kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(4, 8)}
    assert_same(loaded.params, parameters(ROUTED))
    everywhere = NamedSharding(mesh, PartitionSpec())
    replicated = artifact.load_model(saved, shardings=everywhere).params["final_norm"]["scale"]
    assert replicated.sharding.is_equivalent_to(everywhere, 1)


def test_sharded_parameters_can_be_saved(tmp_path, saved):
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    wanted = shardings(mesh, logical_axes(ROUTED), abstract_parameters(ROUTED))
    loaded = artifact.load_model(saved, shardings=wanted)
    artifact.save_model(tmp_path / "again", ROUTED, loaded.params)
    assert_same(artifact.load_model(tmp_path / "again").params, parameters(ROUTED))


def test_large_models_are_written_part_by_part(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PART_BYTES", 2000)
    params, read = parameters(DENSE), []

    def deferred(name, leaf):
        def at_last():
            # What is read belongs to the part that is next, never to a later one.
            read.append((name, sum(part.exists() for part in tmp_path.glob(".model.*/arrays/part-*"))))
            return np.asarray(leaf)

        return artifact.Deferred(leaf.shape, leaf.dtype, at_last)

    flat = {name: deferred(name, leaf) for name, leaf in arrays.flatten(params).items()}
    artifact.save_model(tmp_path / "model", DENSE, arrays.nest(flat))
    parts = sorted(path.name for path in (tmp_path / "model" / "arrays").iterdir())
    assert len(parts) > 3
    assert len(read) == len(flat)
    assert sorted({count for _, count in read}) == list(range(len(parts)))
    assert_same(artifact.load_model(tmp_path / "model").params, params)


def test_the_tokenizer_travels_along(tmp_path):
    tokenizer = reasoning.tokenizer()
    spec = ModelSpecification(architecture=ARCHITECTURE.model_copy(update={"vocab_size": len(tokenizer)}))
    artifact.save_model(tmp_path / "model", spec, parameters(spec), tokenizer=tokenizer)
    found = artifact.load_model(tmp_path / "model").tokenizer
    text = tokenizer.decode(list(range(4, 24)))
    assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (found.bos_token_id, found.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    settings = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert not settings.keys() & {"is_local", "local_files_only"}
    (tmp_path / "model" / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(InputError, match="the tokenizer files cannot be read"):
        artifact.load_model(tmp_path / "model")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(tmp_path):
    tokenizer = reasoning.tokenizer()
    size = len(tokenizer)
    small = ModelSpecification(architecture=ARCHITECTURE.model_copy(update={"vocab_size": size - 1}))
    with pytest.raises(InputError, match=f"has {size} tokens, but the model's vocab_size is {size - 1}"):
        artifact.save_model(tmp_path / "model", small, parameters(small), tokenizer=tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_existing_outputs_are_left_alone(saved, tmp_path):
    before = artifact.fingerprint(saved)
    with pytest.raises(InputError, match="exists already"):
        artifact.save_model(saved, DENSE, parameters(DENSE))
    assert artifact.fingerprint(saved) == before
    precious = tmp_path / "home"
    precious.mkdir()
    (precious / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="exists already"):
        artifact.save_model(precious, DENSE, parameters(DENSE), overwrite=True)
    assert (precious / "thesis.tex").read_text() == "x"
    artifact.save_model(saved, DENSE, parameters(DENSE), overwrite=True)
    assert artifact.load_model(saved).spec == DENSE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "model"]


def test_a_failing_write_leaves_nothing(tmp_path, saved):
    def fail():
        raise RuntimeError("the disk is full")

    flat = arrays.flatten(parameters(DENSE))
    flat["final_norm/scale"] = artifact.Deferred((16,), np.dtype(np.float32), fail)
    for path, overwrite in ((tmp_path / "new", False), (saved, True)):
        with pytest.raises(RuntimeError, match="full"):
            artifact.save_model(path, DENSE, arrays.nest(flat), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert artifact.load_model(saved).spec == ROUTED


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot create a directory there"):
        artifact.save_model(tmp_path / "file" / "model", DENSE, parameters(DENSE))


def test_parameters_that_do_not_fit_the_specification_are_refused(tmp_path):
    params = parameters(DENSE)
    with pytest.raises(ValueError, match="do not match the specification: .*lora"):
        artifact.save_model(tmp_path / "model", ROUTED, params)
    params["final_norm"]["scale"] = jnp.ones((17,), jnp.float32)
    with pytest.raises(ValueError, match=r"final_norm/scale is float32\(17,\), expected float32\(16,\)"):
        artifact.save_model(tmp_path / "model", DENSE, params)


def test_missing_directories_are_named(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such model directory$"):
        artifact.load_model(tmp_path / "nowhere")
    for name in ("awq-4bit", "trained"):
        artifact.save_model(tmp_path / "run" / name, DENSE, parameters(DENSE))
    with pytest.raises(InputError, match="no such model directory; .*run has awq-4bit, trained$"):
        artifact.load_model(tmp_path / "run" / "awq")
    with pytest.raises(InputError, match="model.json is missing$"):
        artifact.load_model(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="convert Hugging Face checkpoints with qtale_jax.convert"):
        artifact.load_model(tmp_path)


def edited(path, change):
    document = json.loads((path / "model.json").read_text())
    change(document)
    (path / "model.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(format=99), "format 99 is newer than what this version reads"),
        (lambda d: d.pop("specification"), "key 'specification' is missing"),
        (lambda d: d.update(files=[1]), "damaged or truncated"),
        (lambda d: d["specification"]["architecture"].update(num_heads="x"), "specification.architecture.num_heads: "),
        (lambda d: d["specification"].update(dtpye="float32"), "specification.dtpye: "),
        (
            lambda d: d["specification"]["architecture"].update(num_layers=4),
            "layers/3/attention/.* is missing",
        ),
        (
            lambda d: d["specification"]["architecture"].update(num_layers=2),
            "layers/2/attention/.* is not part of the model that model.json describes",
        ),
        (
            lambda d: d["specification"]["architecture"].update(vocab_size=50),
            r"embedding/table is bfloat16\(48, 16\), model.json says bfloat16\(50, 16\)",
        ),
        (lambda d: d["specification"].update(dtype="float32"), r"is bfloat16\(48, 16\), model.json says float32"),
    ],
)
def test_a_wrong_model_json_is_refused(saved, change, message):
    edited(saved, change)
    with pytest.raises(InputError, match=message) as caught:
        artifact.load_model(saved)
    assert str(saved) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_model_json_is_refused(saved):
    text = (saved / "model.json").read_text()
    (saved / "model.json").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match="model.json is damaged or truncated"):
        artifact.read_model_json(saved)


def test_truncated_and_missing_array_files_are_named(saved, tmp_path):
    for name in artifact.read_model_json(saved).files:
        broken = tmp_path / "broken"
        shutil.copytree(saved, broken)
        file = broken / "arrays" / name
        content = file.read_bytes()
        if content:
            file.write_bytes(content[:-1])
            with pytest.raises(InputError, match=f"{name} has {len(content) - 1} bytes, expected {len(content)}"):
                artifact.load_model(broken)
        file.unlink()
        with pytest.raises(InputError, match=f"{name} is missing"):
            artifact.load_model(broken)
        shutil.rmtree(broken)


def test_flipped_bits_are_found(saved):
    files = artifact.read_model_json(saved).files
    name = max(files, key=lambda name: files[name].bytes)
    content = bytearray((saved / "arrays" / name).read_bytes())
    content[len(content) // 2] ^= 0x01
    (saved / "arrays" / name).write_bytes(content)
    with pytest.raises(InputError, match=f"{name} is damaged: its contents changed"):
        artifact.load_model(saved)


def test_files_that_orbax_cannot_read_are_refused(saved):
    """What passes the checksums can still be no checkpoint, as in a directory whose model.json was written by hand."""
    files = artifact.read_model_json(saved).files
    for name, record in files.items():
        (saved / "arrays" / name).write_bytes(b"\0" * record.bytes)
    zeros = {name: {"bytes": record.bytes, "crc32": zlib.crc32(b"\0" * record.bytes)} for name, record in files.items()}
    edited(saved, lambda document: document.update(files=zeros))
    with pytest.raises(InputError, match="part-00000 is damaged: ") as caught:
        artifact.load_model(saved)
    assert "\n" not in str(caught.value)


def test_the_fingerprint_follows_the_contents(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    assert artifact.fingerprint(copy) == artifact.fingerprint(saved)
    edited(copy, lambda document: document["provenance"].update(seed=4))
    assert artifact.fingerprint(copy) != artifact.fingerprint(saved)
    file = max((saved / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    before = artifact.fingerprint(saved)
    file.write_bytes(file.read_bytes()[::-1])
    assert artifact.fingerprint(saved) != before


def test_bytes_are_counted_from_the_arrays():
    parts = artifact.weight_bytes(parameters(ROUTED))
    linears = sum(a * b for a, b in map(ARCHITECTURE.linear_shape, LINEARS))
    router = 16 * 8 + 8 + 8 + 8 * 2 + 2
    assert parts == {
        "embedding": 48 * 16 * 2,
        "head": 48 * 16 * 2,
        "norms": (2 * 3 + 1) * 16 * 4,
        "routers": 2 * router * 4,
        "adapters": 3 * 4 * (16 * 2 + 2 * 16 + 24 * 2 + 2 * 16),
        "linears": 3 * linears * 2,
        "scales": 0,
        "total": sum(value for name, value in parts.items() if name != "total"),
    }


@pytest.mark.parametrize(("bits", "planes"), [(8, 8), (4, 4), (3, 3), (2, 2)])
def test_quantized_bytes(bits, planes):
    wide = ARCHITECTURE.model_copy(update={"hidden_size": 32, "intermediate_size": 64, "head_dim": 8})
    spec = ModelSpecification(architecture=wide)
    kernel = artifact.weight_bytes(abstract_parameters(spec))["linears"] // 4
    parts = artifact.weight_bytes(parameters(quantized(spec, bits, group_size=32, symmetric=True)))
    assert parts["linears"] == kernel * planes // 8
    assert parts["scales"] == kernel // 32 * 4


def test_a_quantized_directory_is_smaller_than_bfloat16(tmp_path):
    wide = ARCHITECTURE.model_copy(update={"hidden_size": 128, "intermediate_size": 256, "head_dim": 32})
    spec = ModelSpecification(architecture=wide, dtype="bfloat16")
    sizes = {}
    for bits in (16, 8, 4, 3, 2):
        found = spec if bits == 16 else quantized(spec, bits, group_size=32)
        artifact.save_model(tmp_path / str(bits), found, parameters(found))
        sizes[bits] = sum(record.bytes for record in artifact.read_model_json(tmp_path / str(bits)).files.values())
    assert sizes[16] > sizes[8] > sizes[4] > sizes[3] > sizes[2]


@pytest.mark.slow
def test_nothing_is_printed(tmp_path, run_module, saved):
    """Orbax and absl log to stderr; a user of the entry points sees none of it."""
    shutil.copytree(saved, tmp_path / "copy")
    script = tmp_path / "quiet.py"
    script.write_text(
        "from qtale_jax import artifact\n"
        "m = artifact.load_model('copy')\n"
        "artifact.save_model('out', m.spec, m.params)\n"
        "artifact.load_model('out')\n"
    )
    done = run_module("quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
