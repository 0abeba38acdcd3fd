"""Programs for TPUs that are not there, where libtpu is installed."""

import importlib.util
import json

import pytest
import yaml

from qtale_jax.config import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the extra 'aot' is not installed"),
]


def test_the_compiler_counts_the_same_arrays(tiny, tmp_path, run_module):
    """Arguments of the step are parameters and optimizer; of decode, weights and cache. Buffers are rounded up."""
    config = tiny(f"output={tmp_path / 'run'}", "plan.topology=v5e:2x2", "plan.batch_sizes=[2]", "lora.rank=4")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(resolve(config)))
    done = run_module("qtale_jax.plan", tmp_path / "tiny.yaml")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert set(found["compiled"]) == {"train", "prefill, batch 2", "decode, batch 2"}
    planned = found["training"]["bytes_per_device"]
    held = sum(planned[name] for name in ("frozen parameters", "adapters and routers", "optimizer"))
    train = found["compiled"]["train"]
    assert held <= train["bytes"]["argument"]
    assert train["collectives"]["all-gather"]["count"] > 0
    for program in found["compiled"].values():
        sizes = program["bytes"]
        assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total") - 2 * sizes["alias"]
    assert found["compiled"]["decode, batch 2"]["collectives"] == {}
    assert "compiled for v5e:2x2" in done.stdout
