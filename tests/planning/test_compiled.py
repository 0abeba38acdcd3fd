"""Programs for TPUs that are not there, where libtpu is installed, against what was planned for them."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest
import yaml
from jax.sharding import SingleDeviceSharding

from qtale_jax.config import resolve
from qtale_jax.planning.compiled import topology_devices
from qtale_jax.planning.roofline import TEMPORARY
from qtale_jax.planning.tiles import tiled_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra 'aot' is not installed"),
]


def test_the_compiler_counts_the_same_arrays(tiny, tmp_path, run_module):
    """Arguments of the step are parameters and optimizer; of decode, weights and cache: to two percent."""
    steps = "plan.compile=[train,proposal,prefill,decode]"
    config = tiny(f"output={tmp_path / 'run'}", "plan.topology=v5e:2x2", "plan.batch_sizes=[2]", "lora.rank=4", steps)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(resolve(config)))
    done = run_module("qtale_jax.plan", tmp_path / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    compiled = found["compiled"]
    assert list(compiled) == ["train", "train, as proposed", "prefill, batch 2", "decode, batch 2"]
    for program in compiled.values():
        sizes, arguments = program["bytes"], program["arguments"]
        assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total") - 2 * sizes["alias"]
        assert arguments["compiled"] == sizes["argument"] and abs(arguments["difference"]) < 0.02
        assert program["temporary"]["compiled"] == sizes["temp"] and program["fits"]
    planned = found["training"]["bytes_per_device"]
    held = sum(size for name, size in planned.items() if name not in (*TEMPORARY, "gaps", "total"))
    assert compiled["train"]["arguments"]["planned"] == held
    # What is gathered is at most as large as the head or a layer's matrix: that of three routed layers would be larger.
    pieces, largest = compiled["train"]["pieces"], compiled["train"]["largest all-gathers"]
    assert set(pieces) == {"layer", "embedding", "head"} and pieces["head"] < 3 * pieces["layer"]
    assert 0 < largest[0]["bytes"] <= pieces["head"]
    assert found["proposal"]["smallest_topology"]["topology"] == "v5e:1x1"
    assert compiled["train, as proposed"]["collectives"] == compiled["decode, batch 2"]["collectives"] == {}
    assert "compiled for v5e:2x2" in done.stdout and "planned and compiled" in done.stdout


def test_tiles():
    """What arguments take, in the layouts that the compiler chooses for them."""
    shapes = {
        jnp.float32: [(), (7,), (1500,), (30, 2), (30, 512, 2), (3, 5, 7, 9), (20, 16, 2, 4)],
        jnp.bfloat16: [(300,), (3000,), (4, 2), (86, 4096), (300, 16, 8, 64), (1003, 77)],
        jnp.int8: [(300,), (4, 2), (512, 2), (1003, 77), (300, 16, 4, 128)],
        jnp.int4: [(100,), (3000,), (1, 32), (86, 4096), (4096, 1024)],
        jnp.int32: [(32, 1), (32, 32, 64), (300, 16)],
        jnp.bool_: [(5,), (12, 1, 2)],
    }
    where = SingleDeviceSharding(topology_devices("v5e:1x1")[0])
    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=where) for dtype, each in shapes.items() for shape in each]

    def total(*arrays):
        return sum(jnp.sum(array.astype(jnp.float32)) for array in arrays)

    program = jax.jit(total).trace(*arrays).lower(lowering_platforms=("tpu",)).compile()
    assert program.memory_analysis().argument_size_in_bytes == sum(map(tiled_bytes, arrays))
