"""One layer for those who execute it: what is computed, and that it is the right thing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.inference.paged_attention import Kept
from qtale_jax.inference.pages import empty_pages
from qtale_jax.inference.skipping import ROW_SHARES, ROWS, TOKEN_SHARES, TOKENS, run_compact, sizes
from qtale_jax.models.decoder import skeleton
from qtale_jax.models.forward import merge


@given(st.integers(1, 600), st.sampled_from([ROW_SHARES, TOKEN_SHARES]))
def test_sizes_go_from_nothing_to_all(total, shares):
    found = sizes(total, shares)
    assert found[0] == 0 and found[-1] == total
    assert list(found) == sorted(set(found)) and len(found) <= len(shares) + 1


def dots(jaxpr) -> int:
    """Multiplications of all matrix products, those of the heaviest branch where there are several."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (left, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * int(np.prod([shape[axis] for axis in left]))
        inner = [getattr(p, "jaxpr", p) for p in equation.params.values() if hasattr(getattr(p, "jaxpr", p), "eqns")]
        total += sum(map(dots, inner))
        total += max((dots(branch.jaxpr) for branch in equation.params.get("branches", ())), default=0)
    return total


@pytest.mark.parametrize(("axis", "shape"), [(ROWS, (8, 1)), (TOKENS, (2, 32))])
def test_products_are_as_large_as_the_smallest_size_that_fits(dense, axis, shape):
    spec, params = dense
    block = functools.partial(merge, skeleton(spec).layers[1])
    programs = sizes(shape[axis], ROW_SHARES if axis == ROWS else TOKEN_SHARES)
    cache = empty_pages(spec.architecture, shape[0], 16, 4, jnp.float32)  # one page: one turn for any number of rows

    def run(params, hidden, positions, mask, cache):
        kept = Kept(cache.pool, cache.table[1], cache.counts[1])
        return run_compact(block(params), hidden, positions, mask, mask, kept, axis=axis, sizes=programs, layer=1)

    arguments = (jnp.zeros((*shape, 16)), jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.bool_), cache)
    jaxpr = jax.make_jaxpr(run)(params["layers"][1], *arguments).jaxpr
    (switch,) = [equation for equation in jaxpr.eqns if len(equation.params.get("branches", ())) == len(programs)]
    found = [dots(branch.jaxpr) for branch in switch.params["branches"]]
    assert found[0] == 0 and dots(jaxpr) == found[-1] > 0
    for size, count in zip(programs, found, strict=True):
        assert count <= size / shape[axis] * found[-1]
