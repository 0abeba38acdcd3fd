"""Architectures whose layers are of two kinds: which layer is what, and what is left when layers are taken out."""

import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from qtale_jax.models.context import Context
from qtale_jax.models.describe import architecture_text
from qtale_jax.models.rotary import frequencies, rotary_tables

KINDS = {"num_layers": 4, "sliding_window": 3, "global_layers": (1, 3), "local_rope_theta": 100.0}


def test_windows_of_layers(make_spec):
    mixed, alike, none = (make_spec(**fields).architecture for fields in (KINDS, {"sliding_window": 3}, {}))
    assert [mixed.window(layer) for layer in range(4)] == [3, None, 3, None]
    assert [alike.window(layer) for layer in range(3)] == [3, 3, 3]
    assert [none.window(layer) for layer in range(3)] == [None, None, None]


@pytest.mark.parametrize(
    ("kept", "windows"),
    [((0, 1), [3, None]), ((1, 2, 3), [None, 3, None]), ((0, 2), [3, 3]), ((1, 3), [None, None]), ((3,), [None])],
)
def test_layers_that_stay_keep_their_window(make_spec, kept, windows):
    found = make_spec(**KINDS).architecture.with_layers(kept)
    assert found.num_layers == len(kept) and [found.window(layer) for layer in range(len(kept))] == windows
    type(found).model_validate(found.model_dump())  # one that could be stored


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": None}, "sliding_window is None"),
        ({"global_layers": (0, 1, 2, 3)}, "allowed: ascending, some of 0 to 3"),
        ({"global_layers": (4,)}, r"global_layers=\(4,\); allowed"),
        ({"global_layers": (3, 1)}, "ascending"),
    ],
)
def test_kinds_that_make_no_sense_are_refused(make_spec, fields, message):
    with pytest.raises(ValidationError, match=message):
        make_spec(**KINDS | fields)


@pytest.mark.parametrize(
    "scaling",
    [
        {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 32},
        {"kind": "linear", "factor": 8.0},
    ],
    ids=["llama3", "linear"],
)
def test_local_layers_rotate_by_their_own_base_unscaled(make_spec, scaling):
    architecture = make_spec(**KINDS, rope_scaling=scaling, head_dim=16).architecture
    plain = make_spec(rope_theta=100.0, head_dim=16).architecture
    np.testing.assert_array_equal(frequencies(architecture, local=True), frequencies(plain))
    everywhere = make_spec(rope_scaling=scaling, head_dim=16).architecture
    np.testing.assert_array_equal(frequencies(architecture), frequencies(everywhere))
    shared = architecture.model_copy(update={"local_rope_theta": None})
    np.testing.assert_array_equal(frequencies(shared, local=True), frequencies(everywhere))


def test_a_layer_sees_what_its_kind_sees(make_spec):
    """By a static index and by one that is data, as in a scan."""
    architecture = make_spec(**KINDS).architecture
    positions = jnp.arange(6, dtype=jnp.int32)[None]
    earlier = positions[:, :, None] >= positions[:, None, :]
    present = jnp.ones((1, 6), jnp.bool_)
    context = Context.of(architecture, earlier, earlier, present, positions, positions)
    distance = np.arange(6)[:, None] - np.arange(6)[None]
    for layer in range(4):
        local = layer in (0, 2)
        inside = (distance >= 0) & ((distance < 3) | (not local))
        for index in (layer, jnp.int32(layer)):
            found = context.at_layer(architecture, index)
            np.testing.assert_array_equal(found.causal[0], inside)
            for table, expected in zip(found.tables, rotary_tables(architecture, positions, local), strict=True):
                np.testing.assert_array_equal(table, expected)


def test_a_description_says_how_many_layers_have_the_window(make_spec):
    assert architecture_text(make_spec(**KINDS)).endswith("context 32, a window of 3 tokens in 2 layers")
    assert architecture_text(make_spec(sliding_window=3)).endswith("context 32, a window of 3 tokens")
    assert architecture_text(make_spec()).endswith("context 32")
