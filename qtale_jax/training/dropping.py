"""Static layer dropping: the simplest way to execute half of the layers, for all tokens the same half."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qtale_jax.config.schema import Config
from qtale_jax.data.pipeline import load_rows
from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import context_of, embed, run_layers
from qtale_jax.models.policy import Dense
from qtale_jax.models.specification import ModelSpecification


@functools.partial(jax.jit, static_argnames=("spec",))
def _dissimilarity(
    spec: ModelSpecification, params: Parameters, tokens: Int[Array, "b t"], segment_ids: Int[Array, "b t"]
) -> tuple[Float[Array, " l"], Float[Array, ""]]:
    """Sums over tokens of 1 - cos(input, output) of every layer, and the number of tokens."""
    context, initial = context_of(spec, tokens, segment_ids)
    hidden, sums = embed(spec, params, tokens, jnp.dtype(jnp.float32)), []
    present = context.present.astype(jnp.float32)
    for layer in range(spec.architecture.num_layers):
        one = spec.model_copy(update={"architecture": spec.architecture.with_layers((layer,))})
        before = hidden
        hidden, *_ = run_layers(one, {"layers": {0: params["layers"][layer]}}, hidden, context, initial, Dense())
        norms = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(hidden, axis=-1)
        cosine = jnp.sum(before * hidden, axis=-1) / jnp.maximum(norms, 1e-12)
        sums.append(jnp.sum((1 - cosine) * present))
    return jnp.stack(sums), jnp.sum(present)


def block_influence(
    spec: ModelSpecification, params: Parameters, tokens: np.ndarray, segment_ids: np.ndarray, batch_size: int = 32
) -> Float[np.ndarray, " l"]:
    """1 - mean cosine between a layer's input and its output, per layer (ShortGPT, equation 1).

    Args:
        spec: a dense model.
        params: its parameters, one tree per layer.
        tokens: int32 rows (rows, length).
        segment_ids: 0 for padding.
        batch_size: rows that are run at once.
    """
    if spec.routing is not None:
        raise ValueError("influence is measured on a dense model")
    total, count = np.zeros(spec.architecture.num_layers), 0.0
    for start in range(0, len(tokens), batch_size):
        part = slice(start, start + batch_size)
        sums, number = _dissimilarity(spec, params, jnp.asarray(tokens[part]), jnp.asarray(segment_ids[part]))
        total, count = total + np.asarray(sums, np.float64), count + float(number)
    return total / max(count, 1.0)


def even_layers(layers: int, keep: int, first: int) -> tuple[int, ...]:
    """`keep` of `layers` indices: the first `first`, then evenly spaced ones up to the last."""
    if keep == layers:
        return tuple(range(layers))
    rest = keep - first
    spaced = np.linspace(first, layers - 1, rest + 1)[1:] if rest else np.zeros(0)
    return (*range(first), *(int(index) for index in np.round(spaced)))


def most_influential(influence: Float[np.ndarray, " l"], keep: int, first: int) -> tuple[int, ...]:
    """The first `first` layers and those of the others whose influence is largest, in order; ties: the first."""
    others = sorted(range(first, len(influence)), key=lambda layer: -influence[layer])
    return tuple(sorted((*range(first), *others[: keep - first])))


def number_to_keep(config: Config, spec: ModelSpecification) -> int:
    """How many layers stay, as `model.drop` says.

    Raises:
        InputError: the model is routed, or the share leaves less than the always-on layers and one more.
    """
    drop, layers, first = config.model.drop, spec.architecture.num_layers, config.routing.always_on_layers
    if spec.routing is not None:
        raise InputError("model.drop takes layers out of a dense model, but model.path is routed")
    keep = math.floor(drop.keep * layers + 0.5)
    if keep <= first:
        raise InputError(
            f"model.drop.keep={drop.keep:g} leaves {keep} of {layers} layers; "
            f"allowed: more than routing.always_on_layers={first}"
        )
    return keep


def layers_to_keep(config: Config, spec: ModelSpecification, params: Parameters, tokenizer) -> tuple[int, ...]:
    """Chooses the layers that stay, as `model.drop` says.

    Raises:
        InputError: as `number_to_keep`.
    """
    drop, keep, first = config.model.drop, number_to_keep(config, spec), config.routing.always_on_layers
    if drop.by == "even":
        return even_layers(spec.architecture.num_layers, keep, first)
    rows = load_rows(config, tokenizer, "calibration")
    chosen = {name: array[: drop.examples] for name, array in rows.items()}
    return most_influential(block_influence(spec, params, chosen["tokens"], chosen["segment_ids"]), keep, first)


def drop_layers(
    spec: ModelSpecification, params: Parameters, keep: tuple[int, ...]
) -> tuple[ModelSpecification, Parameters]:
    """The model with only the layers `keep`, renumbered; `dropped_layers` records the others, by their first number."""
    whole = spec.architecture.num_layers + len(spec.dropped_layers)
    numbers = [layer for layer in range(whole) if layer not in spec.dropped_layers]
    left = {numbers[layer] for layer in keep}
    dropped = tuple(layer for layer in range(whole) if layer not in left)
    architecture = spec.architecture.with_layers(keep)
    smaller = spec.model_copy(update={"architecture": architecture, "dropped_layers": dropped})
    return smaller, {**params, "layers": {new: params["layers"][old] for new, old in enumerate(keep)}}
