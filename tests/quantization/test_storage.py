import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix

from qtale_jax.models.specification import TensorFormat
from qtale_jax.quantization.rounding import fake_quantize, quantize
from qtale_jax.quantization.storage import (
    abstract,
    array_bytes,
    as_qarray,
    lay_out,
    recover,
    storage_bytes,
    store,
    unstore,
)


def test_stored_weights_are_the_rounded_ones(weight, format):
    stored = store(weight, format)
    np.testing.assert_array_equal(unstore(stored, weight.shape, format), fake_quantize(weight, format))
    narrow = unstore(stored, weight.shape, format, jnp.bfloat16)
    np.testing.assert_array_equal(narrow, fake_quantize(weight, format).astype(jnp.bfloat16))


def test_integers_survive_storage(weight, format):
    rounded = quantize(weight, format)
    back = recover(lay_out(rounded, format), weight.shape, format)
    jax.tree.map(np.testing.assert_array_equal, back, rounded)
    assert back.values.dtype == jnp.int8


@pytest.mark.parametrize("shape", [(64, 6), (48, 5)])
def test_skeleton_needs_no_weights(format, shape):
    stored = store(jnp.ones(shape, jnp.float32), format)
    found = {name: (array.shape, array.dtype) for name, array in stored.items()}
    assert found == {name: (leaf.shape, leaf.dtype) for name, leaf in abstract(shape, format).items()}
    assert storage_bytes(shape, format) == sum(map(array_bytes, stored.values()))


def test_bytes_follow_the_formula(format):
    inputs, outputs = 4096, 11008
    groups = 1 if format.group_size == -1 else inputs // format.group_size
    zero = 0 if format.symmetric else 0.5 if format.bits == 4 else 1
    assert storage_bytes((inputs, outputs), format) == outputs * (inputs * format.bits / 8 + groups * (4 + zero))


def test_int4_is_held_at_half_a_byte():
    shape, format = (64, 128), TensorFormat(bits=4, symmetric=True)
    compiled = jax.jit(lambda w: store(w, format)["values"]).lower(jax.ShapeDtypeStruct(shape, jnp.float32)).compile()
    values = compiled(jnp.ones(shape, jnp.float32))
    assert values.dtype == jnp.int4
    assert array_bytes(values) == compiled.memory_analysis().output_size_in_bytes == 64 * 128 // 2


def test_odd_counts_of_int4_round_up():
    assert array_bytes(jax.ShapeDtypeStruct((3, 3), jnp.int4)) == 5


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group", [-1, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_qwix_restores_the_same_weight(weight, bits, group, symmetric):
    format = TensorFormat(bits=bits, group_size=group, symmetric=symmetric)
    stored = store(weight, format)
    array = as_qarray(stored, format)
    assert array.qvalue.dtype == array.qtype == (jnp.int8 if bits == 8 else jnp.int4)
    assert symmetric == (array.zero_point is None)
    if not symmetric:
        assert array.zero_point.dtype == array.qvalue.dtype
    np.testing.assert_array_equal(qwix.dequantize(array), unstore(stored, weight.shape, format))


@pytest.mark.parametrize("bits", [3, 2])
def test_bit_planes_are_no_qarray(weight, bits):
    format = TensorFormat(bits=bits)
    with pytest.raises(ValueError, match=f"{bits}-bit"):
        as_qarray(store(weight, format), format)
