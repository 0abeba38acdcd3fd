"""Tiny models whose routers decide both ways, and a compiled forward pass."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from qtale_jax.models.decoder import initialize
from qtale_jax.models.forward import Output, forward
from qtale_jax.models.specification import Architecture, LoraSpecification, ModelSpecification, RoutingSpecification

_forward = jax.jit(forward, static_argnames=("spec", "compute_dtype", "remat"))


@pytest.fixture(scope="session")
def run() -> Callable[..., Output]:
    """The forward pass, compiled."""
    return _forward


@pytest.fixture(scope="session")
def run_optimized(optimized) -> Callable[..., Output]:
    """The forward pass, compiled with the optimizer: it may round equal programs differently."""
    return jax.jit(forward, static_argnames=("spec", "compute_dtype", "remat"), compiler_options=optimized)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpecification]:
    """Builds a specification; keywords are fields of the architecture, `routing` and `lora` their fields or None."""

    def make(routing: dict[str, Any] | None = None, lora: dict[str, Any] | None = None, **fields) -> ModelSpecification:
        dtype = fields.pop("dtype", "float32")
        sizes: dict[str, Any] = {
            "vocab_size": 40,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_layers": 3,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 4,
            "max_length": 32,
        }
        return ModelSpecification(
            architecture=Architecture(**sizes | fields),
            routing=None
            if routing is None
            else RoutingSpecification.model_validate({"method": "qtale", "router_hidden": 8} | routing),
            lora=None if lora is None else LoraSpecification.model_validate({"rank": 2} | lora),
            dtype=dtype,
        )

    return make


@pytest.fixture(scope="session")
def make_params() -> Callable[..., dict]:
    """Random parameters whose routers are undecided on average and whose adapters and biases are not zero."""

    def make(spec: ModelSpecification, seed: int = 0) -> dict:
        params = initialize(spec, jax.random.key(seed))

        def stir(path, leaf):
            names = [str(getattr(key, "key", key)) for key in path]
            if names[-3:] == ["router", "output", "kernel"]:
                return leaf * 4
            if names[-3:] == ["router", "output", "bias"]:
                return jnp.zeros_like(leaf)
            if names[-2] in ("query_norm", "key_norm"):
                key = jax.random.fold_in(jax.random.key(seed + 3), int(names[1]))
                return jnp.exp(jax.random.normal(key, leaf.shape, leaf.dtype))
            if names[-1] == "bias" and "router" not in names:
                key = jax.random.fold_in(jax.random.key(seed + 2), int(names[1]))
                return jax.random.normal(key, leaf.shape, leaf.dtype)
            if names[-1] == "up" and "lora" in names:
                key = jax.random.fold_in(jax.random.key(seed + 1), int(names[1]))
                return 0.1 * jax.random.normal(key, leaf.shape, leaf.dtype)
            return leaf

        return jax.tree_util.tree_map_with_path(stir, params)

    return make


@pytest.fixture(scope="session")
def routed(make_spec, make_params) -> tuple[ModelSpecification, dict]:
    """Three layers, the last two routed, one always-on token."""
    spec = make_spec(routing={"always_on_layers": 1, "always_on_tokens": 1})
    return spec, make_params(spec)


@pytest.fixture(scope="session")
def tokens() -> jax.Array:
    """Token ids (3, 10)."""
    return jax.random.randint(jax.random.key(7), (3, 10), 1, 40, jnp.int32)
