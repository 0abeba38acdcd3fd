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


@pytest.mark.parametrize("scale", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("permuted", [False, True])
def test_bytes_follow_the_formula(format, scale, permuted):
    inputs, outputs = 4096, 11008
    groups = 1 if format.group_size == -1 else inputs // format.group_size
    zero = 0 if format.symmetric else 0.5 if format.bits == 4 else 1
    scale_bytes = 4 if scale == "float32" else 2
    format = format.model_copy(update={"scale_dtype": scale, "permuted": permuted})
    expected = outputs * (inputs * format.bits / 8 + groups * (scale_bytes + zero)) + 4 * inputs * permuted
    assert storage_bytes((inputs, outputs), format) == expected


def test_bits_per_weight_of_a_published_setting():
    """Groups of 128 with 16-bit scales: 3 bits and 3/16 of a bit for scale and zero point."""
    format = TensorFormat(bits=3, group_size=128, scale_dtype="float16")
    assert storage_bytes((4096, 11008), format) * 8 / (4096 * 11008) == 3 + (16 + 8) / 128


@pytest.mark.parametrize("scale", ["bfloat16", "float16"])
def test_scales_are_stored_in_their_type(weight, format, scale):
    format = format.model_copy(update={"scale_dtype": scale})
    stored = store(weight, format)
    assert stored["scales"].dtype == jnp.dtype(scale)
    np.testing.assert_array_equal(unstore(stored, weight.shape, format), fake_quantize(weight, format))
    found = {name: (array.shape, array.dtype) for name, array in stored.items()}
    assert found == {name: (leaf.shape, leaf.dtype) for name, leaf in abstract(weight.shape, format).items()}


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_rows_in_another_order_come_back_in_their_own(weight, bits):
    format = TensorFormat(bits=bits, group_size=32, permuted=True)
    order = jnp.asarray(np.random.default_rng(bits).permutation(64).astype(np.int32))
    stored = lay_out(quantize(weight[order], format), format, order)
    assert stored["order"].dtype == jnp.int32
    found = {name: (array.shape, array.dtype) for name, array in stored.items()}
    assert found == {name: (leaf.shape, leaf.dtype) for name, leaf in abstract(weight.shape, format).items()}
    restored = unstore(stored, weight.shape, format)
    np.testing.assert_array_equal(restored[order], fake_quantize(weight[order], format))
    assert storage_bytes(weight.shape, format) == sum(map(array_bytes, stored.values()))


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
