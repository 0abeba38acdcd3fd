"""What a quantization is expected to take: bytes of the result, and memory on the way."""

import jax
import jax.numpy as jnp
import pytest

from qtale_jax.artifact import weight_bytes
from qtale_jax.config.schema import QuantizeConfig, StatisticsConfig
from qtale_jax.models.decoder import abstract_parameters
from qtale_jax.models.specification import (
    LINEARS,
    Architecture,
    ModelSpecification,
    QuantizationSpecification,
    RoutingSpecification,
)
from qtale_jax.quantization.formats import formats_of
from qtale_jax.quantization.memory import peak_resident_bytes, resident_bytes
from qtale_jax.quantization.plan import plan

FLOAT32 = jnp.dtype(jnp.float32)
LLAMA2_7B = ModelSpecification(
    architecture=Architecture(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_length=4096,
    ),
    routing=RoutingSpecification(method="qtale", always_on_layers=2, router_hidden=512),
    dtype="bfloat16",
)


def bytes_of(spec: ModelSpecification, config: QuantizeConfig | None) -> dict[str, int]:
    """Bytes of a model as it would be stored; no array is made."""
    if config is not None:
        quantization = QuantizationSpecification(method="rtn", formats=formats_of(spec, config))
        spec = spec.model_copy(update={"quantization": quantization})
    return weight_bytes(abstract_parameters(spec))


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(4, 4.1e9), (3, 3.2e9)])
def test_a_model_of_seven_billion_parameters_gets_as_small_as_published(bits, most):
    """13.5 GB become less than 4.5 (QTALE, arXiv 2602.10431), with routers, scales and zero points."""
    config = QuantizeConfig(bits=bits, group_size=128, scale_dtype="bfloat16", router_bits=8)
    found, before = bytes_of(LLAMA2_7B, config), bytes_of(LLAMA2_7B, None)
    assert before["total"] - before["routers"] == pytest.approx(13.5e9, rel=0.005)
    assert found["total"] <= most
    kernels = sum(i * o for i, o in map(LLAMA2_7B.architecture.linear_shape, LINEARS)) * 32
    per_scale = 2 + {4: 0.5, 3: 1}[bits]  # bfloat16, and a zero point in the integers' own type
    assert found["linears"] == kernels * bits / 8 and found["scales"] == kernels / 128 * per_scale
    assert found["embedding"] == found["head"] == 32000 * 4096 * 2
    # A byte per weight, a bfloat16 scale per output; bias, norm and the two outputs in float32; 30 layers.
    assert found["routers"] == 30 * (4096 * 512 + 2 * 512 + 4 * (512 + 512 + 512 * 2 + 2))


@pytest.fixture(scope="module")
def spec(make_routed):
    return make_routed(num_layers=2)[0]


def planned(spec, shape=(64, 16), method="gptq", **settings):
    config = QuantizeConfig(method=method, bits=4, statistics=StatisticsConfig(**settings))
    return plan(spec, formats_of(spec, config), config, shape, FLOAT32)


def without_process(found) -> int:
    """The peak less what the process itself holds, which changes while tests run."""
    return found.peak - found.memory["process"] - found.memory["compiled programs"]


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "magr", "magr+gptq"])
def test_peak_is_the_sum_of_its_parts(spec, method):
    found = planned(spec, None if method == "rtn" else (64, 16), method)
    assert found.peak == sum(found.memory.values()) and all(size > 0 for size in found.memory.values())
    assert ("calibration rows" in found.memory) == ("statistics" in found.memory) == (method != "rtn")
    assert found.seconds > 0


def test_peak_grows_with_rows_and_layers(spec):
    base = planned(spec)
    for rows, length in ((128, 16), (64, 32)):
        grown = planned(spec, (rows, length))
        assert grown.memory["calibration rows"] == 2 * base.memory["calibration rows"]
        assert without_process(grown) > without_process(base) and grown.seconds > base.seconds
    assert base.memory["calibration rows"] == 64 * 16 * 32 * 4
    wider = spec.model_copy(update={"architecture": spec.architecture.model_copy(update={"intermediate_size": 4096})})
    for shape in (None, (64, 16)):
        method = "gptq" if shape else "rtn"
        found, before = (planned(one, shape, method).memory for one in (wider, spec))
        extra = 3 * 32 * (4096 - 48) * 4  # float32, as read
        name = "a layer, restored and stored"
        assert found[name] > before[name] + 2 * extra
    assert planned(wider).memory["statistics"] == 4 * 4096**2


def test_rows_that_fill_up_the_last_batch_are_counted(spec):
    assert planned(spec, (9, 16), batch_size=8).memory["calibration rows"] == 16 * 16 * 32 * 4


def test_memory_of_the_process_is_read_from_the_system():
    before, peak = resident_bytes(), peak_resident_bytes()
    held = jax.block_until_ready(jnp.ones((2**25,), jnp.float32))
    assert resident_bytes() >= before + 2**26 and peak_resident_bytes() >= max(peak, held.nbytes)
    assert planned_process() >= held.nbytes


def planned_process() -> int:
    config = QuantizeConfig(bits=4)
    spec = ModelSpecification(
        architecture=LLAMA2_7B.architecture.model_copy(update={"num_layers": 1, "vocab_size": 64})
    )
    return plan(spec, formats_of(spec, config), config, None, FLOAT32).memory["process"]
