"""Rotary frequencies against a formula written independently, in Python floats."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from qtale_jax.config.schema import ArchitectureConfig
from qtale_jax.models.rotary import frequencies, rotary_tables, rotate
from qtale_jax.models.specification import LinearScaling, ModelSpecification, RopeScaling
from qtale_jax.training.start import architecture_from

LLAMA_3_1 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
LINEAR = {"kind": "linear", "factor": 8.0}


def expected_frequency(index: int, width: int, theta: float, scaling: dict | None) -> float:
    frequency = theta ** (-2 * index / width)
    if scaling is None:
        return frequency
    if scaling.get("kind") == "linear":
        return frequency / scaling["factor"]
    turns = scaling["original_length"] * frequency / (2 * math.pi)  # periods within the original context
    if turns < scaling["low_freq_factor"]:
        return frequency / scaling["factor"]
    if turns > scaling["high_freq_factor"]:
        return frequency
    blend = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
    return (1 - blend) * frequency / scaling["factor"] + blend * frequency


@pytest.mark.parametrize(
    ("theta", "width", "scaling"),
    [
        (10000.0, 128, None),
        (500000.0, 128, LLAMA_3_1),
        (500000.0, 128, LLAMA_3_2),
        (10000.0, 8, None),
        (1e6, 256, LINEAR),
        (10000.0, 8, LINEAR | {"factor": 3.0}),
    ],
)
def test_frequencies(make_spec, theta, width, scaling):
    spec = make_spec(rope_theta=theta, head_dim=width, rope_scaling=scaling)
    found = frequencies(spec.architecture)
    expected = [expected_frequency(i, width, theta, scaling) for i in range(width // 2)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=3e-6)


def test_scaling_has_all_three_ranges(make_spec):
    plain = frequencies(make_spec(rope_theta=500000.0, head_dim=128).architecture)
    ratio = plain / frequencies(make_spec(rope_theta=500000.0, head_dim=128, rope_scaling=LLAMA_3_1).architecture)
    assert (np.isclose(ratio, 1)).any() and (np.isclose(ratio, 8)).any() and ((ratio > 1.1) & (ratio < 7.9)).any()


def test_linear_scaling_is_a_position_between(make_spec):
    """Position interpolation: token 12 of a scaled model stands where token 3 of an unscaled one does."""
    plain = make_spec(head_dim=8).architecture
    scaled = make_spec(head_dim=8, rope_scaling={"kind": "linear", "factor": 4.0}).architecture
    for found, expected in zip(
        rotary_tables(scaled, jnp.array([[12]], jnp.int32)),
        rotary_tables(plain, jnp.array([[3]], jnp.int32)),
        strict=True,
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_scalings_are_told_apart_by_their_kind(make_spec):
    """Models stored before there was a second kind do not say theirs."""
    old, new = (make_spec(rope_scaling=scaling) for scaling in (LLAMA_3_1, {"kind": "llama3", **LLAMA_3_1}))
    assert old == new and isinstance(old.architecture.rope_scaling, RopeScaling)
    linear = make_spec(rope_scaling=LINEAR)
    assert linear.architecture.rope_scaling == LinearScaling(factor=8.0)
    for spec in (old, linear):
        assert ModelSpecification.model_validate_json(spec.model_dump_json()) == spec
        assert hash(spec) == hash(spec.model_copy())
    for scaling in ({"factor": 8.0}, {"kind": "yarn", "factor": 8.0}, LLAMA_3_1 | LINEAR, LINEAR | {"factor": 0.0}):
        with pytest.raises(ValidationError, match="rope_scaling"):
            make_spec(rope_scaling=scaling)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"factor": 2.0}, RopeScaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)),
        ({"kind": "linear", "factor": 2.0}, LinearScaling(factor=2.0)),
        (None, None),
    ],
)
def test_both_kinds_can_be_configured(keys, expected):
    config = ArchitectureConfig.model_validate({"rope_scaling": keys})
    assert architecture_from(config, 40).rope_scaling == expected


def test_scores_depend_on_distance_only(make_spec):
    architecture = make_spec(head_dim=8).architecture
    query, key = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8), jnp.float32) for i in (0, 1))

    def score(q: int, k: int) -> float:
        at = [rotary_tables(architecture, jnp.array([[p]], jnp.int32)) for p in (q, k)]
        return float(jnp.sum(rotate(query, at[0]) * rotate(key, at[1])))

    assert score(9, 4) == pytest.approx(score(25, 20), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 3), abs=1e-3)


def test_rotation_keeps_lengths_and_position_zero(make_spec):
    architecture = make_spec(head_dim=8).architecture
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.float32)
    out = rotate(x, rotary_tables(architecture, jnp.array([[0, 5, 31]], jnp.int32)))
    np.testing.assert_array_equal(out[:, 0], x[:, 0])
    np.testing.assert_allclose(jnp.linalg.norm(out, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
