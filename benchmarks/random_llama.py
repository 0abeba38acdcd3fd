"""The random Llama of about 134 million parameters that benchmarks of skipping run, and what they run on it.

Its routes are fixed: a hash of token, position and layer, at an executed ratio that theta sets, so that the router
costs nothing and skipping alone is measured. Every layer and token is routed.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.inference.streaming import Options, Progress, joined, stream
from qtale_jax.models.decoder import Parameters, initialize
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification

ARCHITECTURE = Architecture(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_layers=12,
    num_heads=12,
    num_kv_heads=12,
    head_dim=64,
    max_length=2048,
)
HASHED = RoutingSpecification(method="random", router="hashed", always_on_layers=0, always_on_tokens=0)


def model(layers: int, routing: RoutingSpecification | None = HASHED) -> tuple[ModelSpecification, Parameters]:
    """The model, of fewer layers if asked for; a learned router is random."""
    architecture = ARCHITECTURE.model_copy(update={"num_layers": layers})
    spec = ModelSpecification(architecture=architecture, routing=routing)
    return spec, initialize(spec, jax.random.key(0))


def at_ratio(spec: ModelSpecification, ratio: float) -> Thresholded:
    """Executes this share of tokens in every layer of a hashed router; 1: everything."""
    return Thresholded(jnp.full((len(spec.routed_layers),), 1.0 - ratio, jnp.float32))


def prompts(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts and their lengths."""
    tokens = np.random.default_rng(1).integers(0, ARCHITECTURE.vocab_size, (rows, length)).astype(np.int32)
    return tokens, np.full(rows, length, np.int32)


def generation(
    spec: ModelSpecification, params: Parameters, ratio: float, rows: int, length: int, new: int
) -> Callable[[], Progress]:
    """A run that adds `new` tokens to each prompt, greedily, in one chunk."""
    options = dataclasses.replace(Options(), chunk=new)
    policy = at_ratio(spec, ratio)

    def run() -> Progress:
        return joined(
            list(
                stream(
                    spec.structure,
                    params,
                    *prompts(rows, length),
                    policy,
                    jax.random.key(2),
                    max_new_tokens=new,
                    options=options,
                )
            )
        )

    return run


def executed(out: Progress) -> float:
    """Executed share of the new tokens that were run."""
    return float(out.execute[:, : out.tokens.shape[1] - 1].mean())
