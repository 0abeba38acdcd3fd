"""The random Llamas that benchmarks of skipping run, and what they run on them.

Their routes are fixed: a hash of token, position and layer, at an executed ratio that theta sets, so that the router
costs nothing and skipping alone is measured. Every layer and token is routed.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.inference.pages import PAGE, page_bytes
from qtale_jax.inference.streaming import Options, Progress, joined, stream
from qtale_jax.models.decoder import Parameters, initialize
from qtale_jax.models.policy import Thresholded
from qtale_jax.models.specification import Architecture, ModelSpecification, RoutingSpecification
from qtale_jax.reporting.results import read_evaluation

ARCHITECTURES = {
    "134m": Architecture(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        max_length=2048,
    ),
    "7b": Architecture(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        max_length=4096,
    ),
}
"""About 134 million parameters, for CPUs, in float32; those of LLaMA-2-7B, for accelerators, in bfloat16."""

ARCHITECTURE = ARCHITECTURES["134m"]
HASHED = RoutingSpecification(method="random", router="hashed", always_on_layers=0, always_on_tokens=0)


def choice(arguments: argparse.ArgumentParser) -> None:
    """Adds the arguments that say which model."""
    arguments.add_argument("--model", choices=ARCHITECTURES, default="134m", help="its layers (default 134m)")
    arguments.add_argument("--layers", type=int, help="how many of them (default: all)")


def model(
    layers: int | None, routing: RoutingSpecification | None = HASHED, name: str = "134m"
) -> tuple[ModelSpecification, Parameters]:
    """A model, of fewer layers if asked for; a learned router is random. On accelerators its matrices are bfloat16."""
    architecture = ARCHITECTURES[name].model_copy(update={} if layers is None else {"num_layers": layers})
    spec = ModelSpecification(architecture=architecture, routing=routing)
    params = initialize(spec, jax.random.key(0))
    if jax.default_backend() == "cpu":
        return spec, params

    def halved(path: tuple, leaf: jax.Array) -> jax.Array:
        return leaf if leaf.ndim < 2 or "router" in jax.tree_util.keystr(path) else leaf.astype(jnp.bfloat16)

    return spec.model_copy(update={"dtype": "bfloat16"}), jax.tree_util.tree_map_with_path(halved, params)


def at_ratio(spec: ModelSpecification, ratio: float | np.ndarray) -> Thresholded:
    """Executes this share of tokens in the layers of a hashed router, 1: everything; an array has one per layer."""
    shares = jnp.broadcast_to(jnp.asarray(ratio, jnp.float32), (len(spec.routed_layers),))
    return Thresholded(jnp.clip(1.0 - shares, 0.0, 1.0))


def like_trained(evaluation: Path, layers: int, ratio: float) -> np.ndarray:
    """Shares of `layers` layers that are as unlike as those of a trained model, and `ratio` in the mean.

    Args:
        evaluation: file of the evaluation stage of a routed model; the share of a layer is that at its relative depth.
        layers: number of layers.
        ratio: mean; logits of all shares are moved alike, as a threshold moves them. Layers that always run stay so.

    Raises:
        ValueError: the layers that always run are more than `ratio`.
    """
    measured = read_evaluation(evaluation).executed_per_layer
    shares = np.interp(np.linspace(0, 1, layers), np.linspace(0, 1, len(measured)), measured)
    always = shares > 1 - 1e-6
    if always.mean() >= ratio:
        raise ValueError(f"{evaluation}: {always.mean():.0%} of the layers always run; allowed: less than {ratio:.0%}")
    odds = np.clip(shares, 1e-4, 1 - 1e-4) / (1 - np.clip(shares, 1e-4, 1 - 1e-4))

    def moved(by: float) -> np.ndarray:
        return np.where(always, 1.0, 1 / (1 + np.exp(-by) / odds))

    steps = np.linspace(-6, 6, 4801)
    return moved(float(steps[np.argmin([abs(moved(step).mean() - ratio) for step in steps])]))


def prompts(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts and their lengths."""
    tokens = np.random.default_rng(1).integers(0, ARCHITECTURE.vocab_size, (rows, length)).astype(np.int32)
    return tokens, np.full(rows, length, np.int32)


def generation(
    spec: ModelSpecification,
    params: Parameters,
    ratio: float | np.ndarray,
    rows: int,
    length: int,
    new: int,
    least_step: int | None = None,
) -> Callable[[], Progress]:
    """A run that adds `new` tokens to each prompt, greedily, in one chunk; `at_ratio` says what executes."""
    # One size of the pool: every other size is a program of its own, and `kv_memory` is about these.
    pages = spec.architecture.num_layers * rows * -(-(length + new) // PAGE)
    whole = pages * page_bytes(spec.architecture, jnp.dtype(spec.dtype))
    options = dataclasses.replace(inference_options(spec), chunk=new, least_step=least_step or whole)
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


def settled(spec: ModelSpecification, params: Parameters, ratio: float, rows: int, length: int, new: int) -> float:
    """What to ask of `at_ratio` so that, of these few tokens, the share that executes is as near as can be."""
    asked = np.clip(ratio + np.linspace(-0.08, 0.08, 17), 0.0, 1.0)
    found = [abs(executed(generation(spec, params, each, rows, length, new)()) - ratio) for each in asked]
    return float(asked[np.argmin(found)])


def inference_options(spec: ModelSpecification) -> Options:
    """Activations of the type of the weights."""
    return dataclasses.replace(Options(), compute_dtype=jnp.dtype(spec.dtype))


def executed(out: Progress) -> float:
    """Executed share of the new tokens that were run."""
    return float(out.execute[:, : out.tokens.shape[1] - 1].mean())
