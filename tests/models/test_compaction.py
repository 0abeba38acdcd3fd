"""Entries that are taken out come back to where they were."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtale_jax.models.compaction import Compaction, static_sizes


@pytest.mark.parametrize(
    ("total", "shares", "expected"),
    [(16, (0.25, 0.5, 1.0), (4, 8, 16)), (5, (0.25, 0.5, 1.0), (2, 3, 5)), (1, (0.25, 0.5, 1.0), (1,))],
)
def test_sizes_are_rounded_up_and_differ(total, shares, expected):
    assert static_sizes(total, shares) == expected


@given(st.lists(st.booleans(), min_size=12, max_size=12), st.sampled_from([0, 1]))
def test_what_is_gathered_comes_back(mask, axis):
    shape = (12, 1) if axis == 0 else (2, 6)
    chosen = np.array(mask).reshape(shape)
    x = np.random.default_rng(0).normal(size=(*shape, 3)).astype(np.float32)
    compaction = Compaction.of(jnp.asarray(chosen), axis)
    most = int(compaction.most)
    assert most == chosen.sum(axis).max()
    gathered = np.asarray(compaction.gather(jnp.asarray(x), most))
    for row in range(shape[1 - axis]):
        line, taken = np.take(x, row, 1 - axis), np.take(chosen, row, 1 - axis)
        np.testing.assert_array_equal(np.take(gathered, row, 1 - axis)[: taken.sum()], line[taken])
    if most:
        spread = compaction.spread(2 * jnp.asarray(gathered), jnp.asarray(x))
        np.testing.assert_array_equal(spread, np.where(chosen[:, :, None], 2 * x, x))
