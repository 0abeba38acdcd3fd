"""Memory and time of prefill and decode, against sums by hand and arrays that were really made."""

import pytest

from qtale_jax.errors import InputError
from qtale_jax.inference.pages import empty_pages
from qtale_jax.models.cache import cache_bytes
from qtale_jax.models.cost import layer_flops
from qtale_jax.models.sizes import SIZES
from qtale_jax.models.specification import ModelSpecification, RoutingSpecification
from qtale_jax.planning.devices import topology
from qtale_jax.planning.inference import InferencePlanner, deployed, layer_shares
from qtale_jax.planning.plan import subject_of

GROUPED = ("quantize.group_size=128", "quantize.scale_dtype=bfloat16", "quantize.router_bits=8")


def planner(config, spec, device="v5e:1x1"):
    return InferencePlanner(config, deployed(config, spec), topology(device))


@pytest.fixture
def spec(tiny):
    return lambda *overrides: subject_of(tiny("plan.topology=h100:1", "mesh.fsdp=1", *overrides)).spec


def test_layers_share_the_executed_ratio(tiny, spec):
    config = tiny("routing.target=0.625")
    assert layer_shares(config, spec()) == pytest.approx([1.0, 0.5, 0.5, 0.5])
    assert layer_shares(config, spec("routing.counting=routed")) == pytest.approx([1.0, 0.625, 0.625, 0.625])
    assert layer_shares(config, spec("routing.method=dense")) == [1.0] * 4


def test_kept_tokens_weights_and_flops_by_hand(tiny, spec):
    config = tiny("routing.target=0.625", "plan.context=52", "quantize.method=none", "quantize.bits=16")
    found = planner(config, spec())
    assert found.kept == pytest.approx([52.0, 27.0, 27.0, 27.0])  # of 50 tokens half, and the two that are always on
    decode = found.decode(3)
    block = 4 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 32 + 2 * 16)
    router = 4 * (16 * 8 + 8 + 8 + 8 * 2 + 2)
    assert decode.memory["weights"] == 4 * block + 3 * router + 4 * (2 * 64 * 16 + 16)
    read = (1 + 3 * (1 - 0.5**3)) * block + 3 * router + 4 * (64 * 16 + 3 * 16)
    per_token = 2 * 2 * 4 * 4 + 4  # keys and values of two heads of four, and the position
    assert decode.work.moved == pytest.approx(read + 3 * per_token * (52 + 3 * 27 * 0.5))
    blocks = layer_flops(found.spec, 52.0) + 3 * 0.5 * layer_flops(found.spec, 27.0)
    assert decode.work.flops == pytest.approx(3 * (blocks + 2 * 16 * 64 + 3 * 2 * 8 * (16 + 2)))
    assert decode.tokens_per_second == pytest.approx(3 / decode.work.seconds)


@pytest.mark.parametrize("kv_cache", ["float", "int8"])
def test_the_cache_is_the_engines(tiny, spec, kv_cache):
    config = tiny("plan.context=52", f"generate.kv_cache={kv_cache}")
    found = planner(config, spec())
    for step in ("prefill", "decode"):
        made = empty_pages(
            found.spec.architecture,
            3,
            found.slots,
            found.pages(step, 3),
            found.options.stored_dtype,
            found.options.page,
        )
        assert getattr(found, step)(3).memory["KV cache"] == pytest.approx(cache_bytes(made), abs=8)


def test_without_eviction_every_token_stays(tiny, spec):
    found = planner(tiny("plan.context=52"), spec("routing.eviction=false"))
    assert found.kept == [52.0] * 4


def test_rows_longer_than_the_context_are_refused(tiny, spec):
    with pytest.raises(InputError, match="plan.context=65 is longer than the model's context, 64 tokens"):
        planner(tiny("plan.context=65"), spec())


def llama(name: str) -> ModelSpecification:
    return ModelSpecification(architecture=SIZES[name], dtype="bfloat16", routing=RoutingSpecification(method="qtale"))


@pytest.mark.slow
def test_what_fits_one_v5e(shipped):
    """3.95 GB of LLaMA2-7B in 4 bits; a chip has 16 GB, and 16-bit weights of an 8B model alone are 16 GB."""
    config = shipped("llama2_7b_csqa", *GROUPED)
    found = planner(config, llama("llama-2-7b")).decode(1)
    assert found.memory["weights"] == pytest.approx(3.95e9, abs=0.005e9)
    assert found.work.bound == "memory"
    assert 200 < found.tokens_per_second < 819e9 / 1.5e9
    config = shipped("llama3_1_8b_csqa", *GROUPED)
    four = planner(config, llama("llama-3.1-8b"))
    assert four.decode(1).total < 0.5 * 16e9
    # Eight KV heads of 128 in bfloat16: 4 kB a token and layer; two layers keep all, thirty the share that makes 1/2.
    kept = 2 * 1024 + 30 * (2 + (16 - 2) / 30 * 1022)
    # Pages are filled but for the last of a row; the pool grows in sixteenths of what keeping everything takes.
    needed, everything = 32 * kept * 4096, 32 * 32 * 1024 * 4096
    assert needed < four.decode(32).memory["KV cache"] < 1.03 * needed + everything / 16
    whole = shipped("llama3_1_8b_csqa", "quantize.method=none", "quantize.bits=16")
    assert planner(whole, llama("llama-3.1-8b")).decode(1).total > 16e9
