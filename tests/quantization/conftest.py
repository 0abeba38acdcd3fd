"""Formats and weights that the tests of this folder share."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from qtale_jax.models.specification import TensorFormat

INPUTS, OUTPUTS = 64, 6

FORMATS = [
    TensorFormat(bits=bits, group_size=group, symmetric=symmetric)
    for bits, group, symmetric in itertools.product((8, 4, 3, 2), (-1, 16), (False, True))
]


# One of each width, both groupings, with and without zero points: for tests that compile a program per format.
FEW = [FORMATS[index] for index in (3, 4, 10, 13)]


def name_of(format: TensorFormat) -> str:
    return f"{format.bits}bit-g{format.group_size}{'-sym' if format.symmetric else ''}"


@pytest.fixture(params=FORMATS, ids=name_of)
def format(request) -> TensorFormat:
    return request.param


@pytest.fixture(params=FEW, ids=name_of)
def some_format(request) -> TensorFormat:
    return request.param


@pytest.fixture
def weight() -> jax.Array:
    """A matrix (64, 6) whose channels differ in size and offset, so that scales and zero points do too."""
    normal = jax.random.normal(jax.random.key(3), (INPUTS, OUTPUTS), jnp.float32)
    size = jnp.array([[0.01, 0.1, 1.0, 1.0, 3.0, 100.0]], jnp.float32)
    return normal * size + jnp.array([[0.0, 0.02, 0.5, -2.0, 0.0, 250.0]], jnp.float32)
