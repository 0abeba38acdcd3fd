"""Collectives of programs that are really compiled, for eight CPU devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from qtale_jax.config.schema import MeshConfig
from qtale_jax.parallel.mesh import build_mesh, sharding
from qtale_jax.planning.collectives import collectives, gathered


@pytest.fixture
def mesh():
    return build_mesh(MeshConfig(data=1, fsdp=2, tensor=4))


def test_collectives_in_a_loop_count_as_often_as_it_runs(mesh):
    weights = jax.ShapeDtypeStruct((5, 8, 16), jnp.float32, sharding=sharding(mesh, (None, None, "mlp"), (5, 8, 16)))
    x = jax.ShapeDtypeStruct((4, 16), jnp.float32, sharding=sharding(mesh, ("batch", "mlp"), (4, 16)))

    def run(x, weights):
        def step(x, w):
            y = jax.lax.with_sharding_constraint(x @ w.T, jax.NamedSharding(mesh, PartitionSpec("fsdp", None)))
            return jnp.tanh(y @ w), None

        return jax.lax.scan(step, x, weights)[0]

    text = jax.jit(run).trace(x, weights).lower().compile().as_text()
    # Each device sums its half of the rows (2, 8) over four devices, in each of five turns.
    assert collectives(text) == {"all-reduce": {"count": 5, "bytes": 5 * 2 * 8 * 4}}


def test_a_gather_gives_the_whole_array(mesh):
    x = jax.ShapeDtypeStruct((8, 3), jnp.bfloat16, sharding=sharding(mesh, ("mlp", None), (8, 3)))
    program = jax.jit(lambda x: x * 2, out_shardings=jax.NamedSharding(mesh, PartitionSpec())).trace(x)
    found = collectives(program.lower().compile().as_text())
    assert list(found) == ["all-gather"] and found["all-gather"]["count"] == 1
    assert found["all-gather"]["bytes"] in (8 * 3 * 2, 8 * 3 * 4)  # a CPU may widen bfloat16 before it sends it


def test_asynchronous_pairs_tuples_and_small_types_count_once():
    hlo = """HloModule m

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %s.1 = f32[2]{0} reduce-scatter(%q), dimensions={0}, to_apply=%add
}

ENTRY %main (p: s4[8,2]) -> s4[32,2] {
  %p = s4[8,2]{1,0:T(8,128)} parameter(0)
  %g = (s4[8,2]{1,0}, s4[32,2]{1,0:T(8,128)S(1)}) all-gather-start(%p), channel_id=1, dimensions={0}
  %r = (f32[4]{0}, bf16[6]{0}) all-reduce(%x, %y), to_apply=%add
  %n = ((f32[8]{0}), f32[2]{0}, s32[]) async-start(%z), calls=%wrapped
  %e = f32[2]{0} async-done(%n), calls=%wrapped
  ROOT %d = s4[32,2]{1,0} all-gather-done(%g)
}
"""
    assert collectives(hlo) == {
        "all-gather": {"count": 1, "bytes": 32},
        "all-reduce": {"count": 1, "bytes": 16 + 12},
        "reduce-scatter": {"count": 1, "bytes": 8},
    }
    assert gathered(hlo) == [{"array": "s4[32,2]", "bytes": 32, "count": 1}]


def test_parts_of_one_channel_count_once_and_conditions_say_how_often():
    """A compiler for TPUs starts a collective in one fusion and ends it in another, and does not note trip counts."""
    hlo = """HloModule m

%start (a: f32[1,4]) -> f32[1,8] {
  %a = f32[1,4]{1,0} parameter(0)
  ROOT %g = f32[1,8]{1,0:T(1,128)} all-gather(%a), channel_id=7, dimensions={1}
}

%finish (a: f32[1,4]) -> f32[1,8] {
  %a.1 = f32[1,4]{1,0} parameter(0)
  ROOT %g.1 = f32[1,8]{1,0:T(1,128)S(1)} all-gather(%a.1), channel_id=7, dimensions={1}
}

%condition (p: (s32[], f32[3,4])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %p = (s32[]{:T(128)}, f32[3,4]{1,0}) parameter(0)
  %counter = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%counter, %limit), direction=LT
}

%until (p: (s32[], f32[3,4])) -> pred[] {
  %p.2 = (s32[]{:T(128)}, f32[3,4]{1,0}) parameter(0)
  ROOT %less = pred[]{:T(512)} compare(%x, %y), direction=LT
}

%body (p: (s32[], f32[3,4])) -> (s32[], f32[3,4]) {
  %f = f32[1,8]{1,0} fusion(%x), kind=kCustom, calls=%start
  %h = f32[1,8]{1,0} fusion(%f), kind=kCustom, calls=%finish
  ROOT %t = (s32[]{:T(128)}, f32[3,4]{1,0}) tuple(%i, %y)
}

ENTRY %main (p: f32[3,4]) -> f32[3,4] {
  %w = (s32[]{:T(128)}, f32[3,4]{1,0}) while(%t0), condition=%condition, body=%body
  %v = (s32[]{:T(128)}, f32[3,4]{1,0}) while(%w), condition=%until, body=%other
  %k = (f32[64]{0}, f32[2,8]{1,0}) all-gather(%u, %v), channel_id=9, dimensions={0}
  ROOT %d = f32[3,4]{1,0} get-tuple-element(%v), index=1
}
"""
    assert collectives(hlo) == {"all-gather": {"count": 3 + 1, "bytes": 3 * 32 + 256 + 64}}
    assert gathered(hlo) == [
        {"array": "f32[64]", "bytes": 256, "count": 1},
        {"array": "f32[2,8]", "bytes": 64, "count": 1},
        {"array": "f32[1,8]", "bytes": 32, "count": 3},
    ]
