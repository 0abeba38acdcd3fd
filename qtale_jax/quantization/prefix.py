"""Calibration rows on their way through a model whose first layers are quantized already.

Hidden states are held between layers, so that each layer is run on what the quantized layers before it really give.
Which tokens execute a layer is decided by its router and the model's thresholds, as at inference, and only those tokens
count in the layer's statistics: a layer that most tokens skip is fitted to the tokens that it will see.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qtale_jax.config.schema import StatisticsConfig
from qtale_jax.models.decoder import Parameters, skeleton
from qtale_jax.models.forward import context_of, embed, merge, route
from qtale_jax.models.policy import Dense, Policy, Thresholded
from qtale_jax.models.specification import ModelSpecification, QuantizationSpecification, TensorFormat
from qtale_jax.models.stacking import stacks
from qtale_jax.quantization.statistics import Statistics, accumulate, no_rows


@dataclass(frozen=True)
class Counts:
    """Tokens of the calibration rows: those that executed a layer, and those that were added to reach the floor."""

    executed: int
    filled: int


@functools.partial(jax.jit, static_argnames=("spec", "kind"))
def _decide(
    spec: ModelSpecification,
    kind: int,
    layer: Parameters,
    hidden: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    policy: Policy,
    routed: Int[Array, ""],
) -> tuple[Bool[Array, "b t"], Bool[Array, "b t"]]:
    """Tokens that execute the layer, and tokens that are not padding."""
    context, initial = context_of(spec, tokens, segment_ids)
    block = merge(skeleton(spec).layers[kind], layer)
    layer_index = routed + jnp.int32(spec.architecture.num_layers - len(spec.routed_layers))
    return route(block, hidden, context, initial, policy, routed, layer_index)[0], context.present


@functools.partial(jax.jit, static_argnames=("spec", "kind", "reader"), donate_argnames=("found",))
def _observe(
    spec: ModelSpecification,
    kind: int,
    reader: str,
    layer: Parameters,
    hidden: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    execute: Bool[Array, "b t"],
    counted: Bool[Array, "b t"],
    found: Statistics,
) -> Statistics:
    """Adds the inputs of linear `reader` at the tokens that count."""
    context, _ = context_of(spec, tokens, segment_ids)
    block = merge(skeleton(spec).layers[kind], layer)
    # Tokens that count without executing leave no key behind, or those that execute would see what they never see.
    seen = context.at_layer(spec.architecture, kind)
    return accumulate(found, block.linear_inputs(hidden, seen, execute)[reader], counted)


@functools.partial(jax.jit, static_argnames=("spec", "kind"), donate_argnames=("hidden",))
def _advance(
    spec: ModelSpecification,
    kind: int,
    layer: Parameters,
    hidden: Float[Array, "b t d"],
    tokens: Int[Array, "b t"],
    segment_ids: Int[Array, "b t"],
    execute: Bool[Array, "b t"],
) -> Float[Array, "b t d"]:
    """The hidden states after the layer."""
    context, _ = context_of(spec, tokens, segment_ids)
    seen = context.at_layer(spec.architecture, kind)
    return merge(skeleton(spec).layers[kind], layer)(hidden, seen, execute)[0]


class Prefix:
    """Calibration rows after the layers that are done; each layer is first decided, then observed, then advanced."""

    def __init__(
        self,
        spec: ModelSpecification,
        tokens: np.ndarray,
        segment_ids: np.ndarray,
        settings: StatisticsConfig,
        compute_dtype: jnp.dtype,
        thresholds: Sequence[float] | None = None,
    ):
        """Cuts the rows into batches; the last one is filled up with padding.

        Args:
            spec: the model in floating point.
            tokens: (rows, length) int32.
            segment_ids: (rows, length) int32, 0 for padding.
            settings: batch size, which tokens count, how many at least.
            compute_dtype: type of the hidden states.
            thresholds: theta per routed layer, those at which the quantized model will run; default: those of `spec`.
        """
        self._spec, self._settings, self._dtype = spec.structure, settings, jnp.dtype(compute_dtype)
        self._thresholds = spec.thresholds if thresholds is None else tuple(thresholds)
        size, count = settings.batch_size, len(tokens)
        self._last_row = (count - 1) % size
        self._tokens, self._segments = (
            [np.pad(rows[at : at + size], ((0, max(at + size - count, 0)), (0, 0))) for at in range(0, count, size)]
            for rows in (tokens, segment_ids)
        )
        self._hidden: list[Array] = []
        self._execute: list[np.ndarray] = []
        self._counted: list[np.ndarray] = []

    def start(self, embedding: Parameters, format: TensorFormat | None = None) -> None:
        """Embeds the rows, with the embedding that the quantized model will have; `format` is how it is stored."""
        spec = self._spec
        if format is not None:
            stored = QuantizationSpecification(method="rtn", formats={"embedding": format})
            spec = spec.model_copy(update={"quantization": stored})
        run = jax.jit(embed, static_argnums=(0, 3))
        self._hidden = [run(spec, {"embedding": embedding}, jnp.asarray(t), self._dtype) for t in self._tokens]

    def decide(self, index: int, layer: Parameters) -> Counts:
        """Finds out which tokens execute layer `index`, and which count in its statistics."""
        always_on = self._spec.architecture.num_layers - len(self._spec.routed_layers)
        policy = Thresholded(jnp.asarray(self._thresholds, jnp.float32)) if self._thresholds else Dense()
        decided = [
            _decide(
                self._spec, self._kind(index), layer, hidden, tokens, segments, policy, jnp.int32(index - always_on)
            )
            for hidden, tokens, segments in zip(self._hidden, self._tokens, self._segments, strict=True)
        ]
        self._execute = [np.asarray(execute) for execute, _ in decided]
        present = [np.asarray(there) for _, there in decided]
        executed = sum(int(execute.sum()) for execute in self._execute)
        if not self._settings.executed_only:
            self._counted = present
        else:
            self._counted = _filled(self._execute, present, self._settings.min_rows - executed)
        return Counts(executed, sum(int(counted.sum()) for counted in self._counted) - executed)

    def statistics(self, index: int, layer: Parameters, reader: str, last_sample_only: bool = False) -> Statistics:
        """Statistics of the input of `reader` (query, output, gate or down) of a layer that was decided.

        With `last_sample_only` those of the last calibration row alone.
        """
        architecture = self._spec.architecture
        found = no_rows(architecture.linear_shape(reader)[0])
        batches = list(zip(self._hidden, self._tokens, self._segments, self._execute, self._counted, strict=True))
        for *batch, counted in batches[-1:] if last_sample_only else batches:
            if last_sample_only:
                counted = counted & (np.arange(len(counted)) == self._last_row)[:, None]
            found = _observe(self._spec, self._kind(index), reader, layer, *batch, counted, found)
        return found

    def advance(self, index: int, layer: Parameters) -> None:
        """Replaces the hidden states by those after layer `index`, under the decisions that were taken."""
        batches = zip(self._hidden, self._tokens, self._segments, self._execute, strict=True)
        self._hidden = [_advance(self._spec, self._kind(index), layer, *batch) for batch in batches]

    def _kind(self, index: int) -> int:
        """A layer that stands for all layers of its make, so that one program serves them."""
        architecture = self._spec.architecture
        stack = next(layers for layers in stacks(self._spec).values() if index in layers)
        return next(layer for layer in stack if architecture.is_local(layer) == architecture.is_local(index))


def _filled(execute: list[np.ndarray], present: list[np.ndarray], missing: int) -> list[np.ndarray]:
    """Adds the first `missing` tokens that are there but do not execute, in the order of the rows."""
    out = []
    for taken, there in zip(execute, present, strict=True):
        spare = (there & ~taken).reshape(-1)
        added = spare & (np.cumsum(spare) <= max(missing, 0))
        missing -= int(added.sum())
        out.append(taken | added.reshape(taken.shape))
    return out
