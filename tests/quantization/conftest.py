"""Formats, weights, models and calibration rows that the tests of this folder share."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.models.decoder import initialize
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification, TensorFormat

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


@pytest.fixture(scope="session")
def make_routed() -> Callable[..., tuple[ModelSpecification, dict]]:
    """Builds a model whose routers decide both ways and whose hidden states are correlated, with strong channels.

    Keywords are fields of the architecture; `routing` those of the routing, None for a dense model.
    """

    def make(routing: dict | None = {}, dtype: str = "float32", **fields) -> tuple[ModelSpecification, dict]:  # noqa: B006
        sizes = {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 8,
            "max_length": 32,
        }
        routed = {"method": "qtale", "always_on_layers": 1, "always_on_tokens": 1, "router_hidden": 16}
        spec = ModelSpecification(
            architecture=Architecture(**sizes | fields),
            routing=None if routing is None else RoutingSpecification(**routed | routing),
            dtype=dtype,
        )
        return spec, _correlated(initialize(spec, jax.random.key(0)))

    return make


def _correlated(params: dict) -> dict:
    """Token vectors near five directions, uneven norms and outputs, biases, and routers that are undecided."""
    generator = np.random.default_rng(5)

    def normal(*shape):
        return generator.normal(size=shape)

    def change(path, leaf):
        names = [str(getattr(key, "key", key)) for key in path]
        if names[-1] == "table":
            rows, size = leaf.shape
            new = normal(rows, 5) @ normal(5, size) / 5**0.5 + 0.1 * normal(rows, size)
        elif "router" in names:
            return {"bias": jnp.zeros_like(leaf), "kernel": leaf * 4}[names[-1]] if "output" in names else leaf
        elif names[-2] in ("attention_norm", "mlp_norm"):
            new = np.exp(0.7 * normal(*leaf.shape))
        elif names[-1] == "bias":
            new = normal(*leaf.shape)
        elif names[-2] in ("value", "up"):
            new = np.asarray(leaf, np.float32) * np.exp(normal(1, leaf.shape[1]))
        else:
            return leaf
        return jnp.asarray(new, jnp.float32).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(change, params)


@pytest.fixture(scope="session")
def calibration() -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids (10, 12) int32: rows with one example or two, most of them with padding at the end."""
    generator = np.random.default_rng(11)
    tokens, segments = np.zeros((2, 10, 12), np.int32)
    for row in range(10):
        length, second = 12 - row % 4, 5 + row % 3
        tokens[row, :length] = generator.integers(1, 64, length)
        segments[row, :length] = 1 + (np.arange(length) >= second) * (row % 2)
    return tokens, segments
