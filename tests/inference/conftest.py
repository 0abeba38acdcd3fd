"""A small routed model with random weights, whose routers disagree about tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qtale_jax.inference.policies import inference_policy
from qtale_jax.models.decoder import initialize
from qtale_jax.models.forward import forward
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

VOCABULARY = 29


def specification(routed: bool, **routing) -> ModelSpecification:
    architecture = Architecture(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        max_length=64,
    )
    settings = {"method": "qtale", "always_on_layers": 1, "router_hidden": 8, **routing}
    return ModelSpecification(architecture=architecture, routing=RoutingSpecification(**settings) if routed else None)


def with_middle_thresholds(spec: ModelSpecification, params) -> ModelSpecification:
    """Theta of every layer at the median of what its router says, so that about half of the tokens skip it."""
    tokens = jax.random.randint(jax.random.key(9), (8, 24), 0, VOCABULARY, jnp.int32)
    run = jax.jit(forward, static_argnums=0)
    seen = run(spec.structure, params, tokens, policy=inference_policy(spec, 0.0)).routing.probability
    theta = tuple(float(x) for x in np.median(np.asarray(seen[:, 2:]), axis=(0, 1)))
    routing = spec.routing.model_copy(update={"thresholds": {"16": theta}})
    return spec.model_copy(update={"routing": routing})


@pytest.fixture(scope="session")
def dense():
    spec = specification(routed=False)
    return spec, initialize(spec, jax.random.key(4))


@pytest.fixture(scope="session")
def routed():
    spec = specification(routed=True)
    params = initialize(spec, jax.random.key(4))
    return with_middle_thresholds(spec, params), params


@pytest.fixture(scope="session")
def without_eviction():
    spec = specification(routed=True, eviction=False)
    params = initialize(spec, jax.random.key(4))
    return with_middle_thresholds(spec, params), params


@pytest.fixture(scope="session")
def hashed():
    """A model whose layers are skipped at random."""
    spec = specification(routed=True, method="random", router="hashed")
    return spec, initialize(spec, jax.random.key(4))


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Three prompts of different lengths, the first of one token."""
    draw = np.random.default_rng(11)
    return [draw.integers(0, VOCABULARY, size).tolist() for size in (1, 4, 7)]
