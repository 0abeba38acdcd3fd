import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from qtale_jax.quantization.packing import pack, packed_rows, unpack

SHAPES = ((1, 1), (31, 2), (32, 1), (33, 3), (64, 5), (77, 2))

pack_jit = jax.jit(pack, static_argnums=1)
unpack_jit = jax.jit(unpack, static_argnums=(1, 2))


@given(data=st.data(), bits=st.sampled_from((2, 3)), shape=st.sampled_from(SHAPES))
@settings(max_examples=50)
def test_every_value_survives(data, bits, shape):
    elements = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    values = data.draw(hypothesis_numpy.arrays(np.int8, shape, elements=elements))
    rows = pack_jit(jnp.asarray(values), bits)
    assert rows.dtype == jnp.uint8 and rows.shape == (packed_rows(shape[0], bits), shape[1])
    restored = unpack_jit(rows, bits, shape[0])
    assert restored.dtype == jnp.int8
    np.testing.assert_array_equal(restored, values)


@pytest.mark.parametrize("bits", [2, 3])
def test_layout_is_the_documented_one(bits, rng):
    values = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (70, 3)).astype(np.int8)
    rows = np.asarray(pack(jnp.asarray(values), bits))
    for row in range(70):
        block, place = divmod(row, 32)
        for column in range(3):
            start = 4 * bits * block
            # Two bits: input r of the block in byte r mod 8, the first eight lowest; the high bit in byte r mod 4.
            code = int(rows[start + place % 8, column]) >> 2 * (place // 8) & 3
            if bits == 3:
                code += 4 * (int(rows[start + 8 + place % 4, column]) >> place // 4 & 1)
            assert code - 2 ** (bits - 1) == values[row, column]
    padded = pack(jnp.full((96, 3), -(2 ** (bits - 1)), jnp.int8).at[:70].set(jnp.asarray(values)), bits)
    np.testing.assert_array_equal(rows, padded)  # padding is zero bits


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("inputs", [32, 4096, 11008])
def test_full_blocks_take_exactly_their_bits(bits, inputs):
    assert packed_rows(inputs, bits) * 8 == inputs * bits


def test_odd_sizes_are_padded_to_one_block():
    assert [packed_rows(inputs, 3) for inputs in (1, 32, 33)] == [12, 12, 24]
    assert [packed_rows(inputs, 2) for inputs in (1, 32, 33)] == [8, 8, 16]


def test_unpacking_needs_no_gather():
    rows = jax.ShapeDtypeStruct((packed_rows(77, 3), 8), jnp.uint8)
    assert "gather" not in unpack_jit.lower(rows, 3, 77).as_text()
