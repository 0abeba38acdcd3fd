"""Checkpoints after a crash, a bad disk or a careless hand: named, skipped, and never resumed wrong."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.artifact import load_model
from qtale_jax.artifact.arrays import flatten
from qtale_jax.errors import InputError
from qtale_jax.parallel.mesh import build_mesh
from qtale_jax.training.checkpoint import Checkpoints, DamagedCheckpoint, checksum
from qtale_jax.training.loop import train
from qtale_jax.training.step import TrainState

SIZES = {"lora/a": (16, 24), "table": (7,)}


def state_of(step: int) -> TrainState:
    """Random values in the types that a run has."""
    rng = np.random.default_rng(step)
    trainable = {name: jnp.asarray(rng.normal(size=size), jnp.float32) for name, size in SIZES.items()}
    trainable["words"] = jnp.asarray(rng.integers(0, 2**32, 256, np.uint32))
    moments = {name: jnp.asarray(rng.normal(size=size), jnp.bfloat16) for name, size in SIZES.items()}
    return TrainState(jnp.asarray(step, jnp.int32), jnp.full((), -1, jnp.int32), trainable, moments)


def same(left: TrainState, right: TrainState) -> bool:
    return all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """Checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(folder, keep=3)
    for step in (2, 4):
        checkpoints.save(step, state_of(step), {"next": step}, None)
    checkpoints.close()
    return folder


@pytest.fixture
def copied(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved.parent, tmp_path / "run")) / "checkpoints"


def restored(folder: Path):
    checkpoints = Checkpoints(folder, keep=3)
    try:
        return checkpoints.restore_newest(state_of(0))
    finally:
        checkpoints.close()


def harm(file: Path, rng: np.random.Generator) -> None:
    """Deletes, empties or shortens a file."""
    size = file.stat().st_size
    kept = rng.choice([-1, 0, max(size - 1, 0), size // 2])
    content = file.read_bytes()
    file.unlink()
    if kept >= 0:
        file.write_bytes(content[:kept])


@pytest.mark.slow
def test_whatever_file_is_damaged_what_is_resumed_is_what_was_saved(saved, tmp_path, rng):
    files = [file.relative_to(saved) for file in sorted((saved / "4").rglob("*")) if file.is_file()]
    assert len(files) > 4
    for number, file in enumerate(files):
        folder = Path(shutil.copytree(saved.parent, tmp_path / str(number))) / "checkpoints"
        if (saved / file).stat().st_size == 0:
            (folder / file).unlink()
        else:
            harm(folder / file, rng)
        found = restored(folder)
        assert found is not None
        state, position = found
        assert position == {"next": 2} and same(state, state_of(2)), file
        assert (folder.parent / "damaged" / "4").is_dir()


def test_a_flipped_bit_in_a_value_is_noticed(copied, rng):
    """Random words do not compress: Orbax stores them as they are, and reads them back without a question."""
    value = np.asarray(state_of(4).trainable["words"]).tobytes()[64:96]
    (file,) = [file for file in (copied / "4").rglob("*") if file.is_file() and value in file.read_bytes()]
    content = bytearray(file.read_bytes())
    content[content.index(value) + rng.integers(len(value))] ^= 1 << rng.integers(8)
    file.write_bytes(content)
    checkpoints = Checkpoints(copied, keep=3)
    with pytest.raises(DamagedCheckpoint, match="holds other values than were saved"):
        checkpoints.restore(4, state_of(0))
    found = checkpoints.restore_newest(state_of(0))
    checkpoints.close()
    assert found is not None and same(found[0], state_of(2))


def test_a_damaged_checkpoint_is_named_and_moved_away_and_its_step_can_be_saved_again(copied, rng, caplog):
    shutil.rmtree(copied / "4" / "state")
    checkpoints = Checkpoints(copied, keep=3)
    found = checkpoints.restore_newest(state_of(0))
    assert found is not None and same(found[0], state_of(2))
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith("qtale_jax")]
    assert str(copied / "4") in message and "the checkpoint before it is used" in message
    assert checkpoints.latest == 2 and (copied.parent / "damaged" / "4").is_dir()
    checkpoints.save(4, state_of(4), {"next": 4}, None)
    checkpoints.close()
    found = restored(copied)
    assert found is not None and same(found[0], state_of(4))


def test_a_run_without_a_whole_checkpoint_is_refused_rather_than_started_again(copied):
    for step in (2, 4):
        shutil.rmtree(copied / str(step) / "state")
    with pytest.raises(InputError, match=r"all checkpoints are damaged \(4, 2\)"):
        restored(copied)
    assert sorted(path.name for path in copied.iterdir() if path.name.isdigit()) == ["2", "4"]


@pytest.mark.parametrize("shape", [(), (5,), (3, 4)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_no_changed_bit_escapes_the_checksum(rng, shape, dtype):
    array = np.asarray(rng.integers(-100, 100, shape)).astype(dtype)
    before = int(checksum({"x": array, "y": jnp.zeros(3)}))
    for bit in range(8 * array.nbytes):
        raw = bytearray(array.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        changed = np.frombuffer(bytes(raw), dtype).reshape(shape)
        assert int(checksum({"x": changed, "y": jnp.zeros(3)})) != before


def test_the_checksum_does_not_depend_on_the_sharding(make_config):
    state = state_of(1)
    mesh = build_mesh(make_config(mesh={"fsdp": 8}).mesh, jax.devices())
    sharded = jax.device_put(state.trainable["lora/a"], jax.NamedSharding(mesh, jax.P("fsdp", None)))
    assert int(checksum({"lora/a": sharded})) == int(checksum({"lora/a": state.trainable["lora/a"]}))


@pytest.mark.slow
def test_a_run_whose_newest_checkpoint_is_damaged_ends_as_if_it_were_not(tmp_path, make_config):
    train_section = {"steps": 5, "checkpoint_every": 2, "keep_checkpoints": 5}
    config = make_config(train=train_section, routing={"method": "dense"}, lora=None)

    config = config.model_copy(update={"output": str(tmp_path / "run")})

    def values(folder: Path) -> dict[str, bytes]:
        return {n: np.asarray(leaf).tobytes() for n, leaf in flatten(load_model(folder / "trained").params).items()}

    def rows(folder: Path) -> list[tuple]:
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        return [(row["step"], row["loss"]) for row in lines]

    run = train(config, quiet=True).parent
    expected = rows(run), values(run)
    shutil.rmtree(run / "trained")
    shutil.rmtree(run / "checkpoints" / "5" / "state")
    shutil.rmtree(run / "checkpoints" / "4" / "state")
    train(config, quiet=True)
    assert (rows(run), values(run)) == expected
    assert sorted(path.name for path in (run / "damaged").iterdir()) == ["4", "5"]
