"""Log-likelihoods of token rows under a route policy, with what was executed counted beside them."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qtale_jax.errors import InputError
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import forward
from qtale_jax.models.placement import mesh_of, rows_on
from qtale_jax.models.policy import Policy, gap
from qtale_jax.models.specification import Architecture, ModelSpecification
from qtale_jax.parallel.axes import constrain

HISTOGRAM_EDGES = np.linspace(0.0, 12.0, 49)
"""Bins of |logit gap|; the last one also takes what is beyond."""


class Row(NamedTuple):
    """Token ids, and the index of the first one whose likelihood counts (at least 1)."""

    ids: Sequence[int]
    start: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counted:
    """Sums over the tokens of a batch: what cost and routing statistics are made of."""

    tokens: Float[Array, ""]
    executed: Float[Array, " l"]
    """Tokens that executed each layer."""
    keys: Float[Array, " l"]
    """Keys seen by the tokens that executed each layer, themselves included."""
    gap: Float[Array, ""]
    """Sum of |gap| over routed decisions of tokens after the always-on ones."""
    flips: Float[Array, ""]
    """Expected number of those decisions that Gumbel noise would flip: sum of sigmoid(-|gap|)."""
    decisions: Float[Array, ""]
    histogram: Float[Array, " h"]
    scored: Float[Array, ""]
    """Tokens whose prediction of the next one is scored."""
    executed_scored: Float[Array, " l"]
    """Those of them that executed each layer."""


@dataclass(frozen=True)
class Likelihoods:
    """Per row: sum of log-likelihoods (nats), number of tokens in it, whether greedy decoding would give them."""

    log_likelihood: np.ndarray
    tokens: np.ndarray
    is_greedy: np.ndarray
    counted: Counted

    @property
    def executed_ratio(self) -> float:
        """Executed share of all tokens and all layers, always-on ones included."""
        return float(np.sum(self.counted.executed) / (self.counted.tokens * self.counted.executed.shape[0]))

    @property
    def executed_ratio_scored(self) -> float:
        """The same of the tokens whose predictions are scored: what a token that writes the answer costs."""
        counted = self.counted
        return float(np.sum(counted.executed_scored) / (counted.scored * counted.executed.shape[0]))


def count(
    execute: Bool[Array, "b t l"],
    logits: Float[Array, "b t r 2"],
    present: Bool[Array, "b t"],
    always_on_tokens: int,
    architecture: Architecture,
    eviction: bool = True,
    scored: Bool[Array, "b t"] | None = None,
) -> Counted:
    """Counts decisions.

    Args:
        execute: what was executed.
        logits: of the routers.
        present: tokens that are not padding.
        always_on_tokens: tokens at the start whose decisions do not count.
        architecture: says which layers have a window.
        eviction: whether tokens that skip a layer leave no keys there.
        scored: tokens whose predictions are scored; default: none.
    """
    taken = execute.astype(jnp.float32)
    asked = jnp.zeros(present.shape, jnp.float32) if scored is None else scored.astype(jnp.float32)
    left = taken if eviction else jnp.broadcast_to(present[:, :, None], taken.shape).astype(jnp.float32)
    keys = jnp.cumsum(left, axis=1)
    window = architecture.sliding_window
    if window is not None and window < keys.shape[1]:
        local = jnp.asarray([architecture.is_local(layer) for layer in range(architecture.num_layers)])
        inside = keys - jnp.pad(keys[:, :-window], ((0, 0), (window, 0), (0, 0)))
        keys = jnp.where(local[None, None, :], inside, keys)
    routed = present & (jnp.arange(present.shape[1])[None, :] >= always_on_tokens)
    weights = jnp.broadcast_to(routed[:, :, None], logits.shape[:3]).astype(jnp.float32)
    magnitude = jnp.abs(gap(logits))
    edges = jnp.asarray(HISTOGRAM_EDGES, jnp.float32)
    bins = jnp.clip(jnp.searchsorted(edges, magnitude.ravel(), side="right") - 1, 0, len(HISTOGRAM_EDGES) - 2)
    return Counted(
        tokens=jnp.sum(present.astype(jnp.float32)),
        executed=jnp.sum(taken, axis=(0, 1)),
        keys=jnp.sum(taken * keys, axis=(0, 1)),
        gap=jnp.sum(magnitude * weights),
        flips=jnp.sum(jax.nn.sigmoid(-magnitude) * weights),
        decisions=jnp.sum(weights),
        histogram=jnp.zeros((len(HISTOGRAM_EDGES) - 1,), jnp.float32).at[bins].add(weights.ravel()),
        scored=jnp.sum(asked),
        executed_scored=jnp.sum(taken * asked[:, :, None], axis=(0, 1)),
    )


@functools.partial(jax.jit, static_argnames=("spec", "compute_dtype"))
def batch_likelihood(
    spec: ModelSpecification,
    params: Parameters,
    tokens: Int[Array, "b t"],
    lengths: Int[Array, " b"],
    starts: Int[Array, " b"],
    policy: Policy,
    compute_dtype: jnp.dtype = jnp.float32,
) -> tuple[Float[Array, "b t-1"], Bool[Array, " b"], Counted]:
    """Log-likelihood of each of tokens[start:length], 0 elsewhere; whether all are the most likely ones; counts."""
    output = forward(spec, params, tokens, lengths=lengths, policy=policy, compute_dtype=compute_dtype)
    logits, targets = output.logits[:, :-1], tokens[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    index = jnp.arange(1, tokens.shape[1])[None, :]
    wanted = (index >= starts[:, None]) & (index < lengths[:, None])
    greedy = jnp.all((jnp.argmax(logits, axis=-1) == targets) | ~wanted, axis=1)
    always_on_tokens = spec.routing.always_on_tokens if spec.routing else 0
    present = jnp.arange(tokens.shape[1])[None, :] < lengths[:, None]
    eviction = spec.routing is None or spec.routing.eviction
    counted = count(
        output.routing.execute,
        output.routing.logits,
        present,
        always_on_tokens,
        spec.architecture,
        eviction,
        scored=jnp.pad(wanted, ((0, 0), (0, 1))),
    )
    # Every process reads them.
    return jax.tree.map(lambda x: constrain(x, *(None,) * x.ndim), (jnp.where(wanted, chosen, 0.0), greedy, counted))


def batches(
    rows: Sequence[Row], batch_size: int, longest: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Groups rows of similar length into batches of one shape per length class, at most `longest` wide.

    Yields (indices, tokens, lengths, starts); a short last batch is filled with empty rows, indices -1.
    """
    widths = [padded_length(len(row.ids)) for row in rows]
    if longest is not None:
        widths = [min(width, longest) for width in widths]
    order = sorted(range(len(rows)), key=lambda i: (widths[i], i))
    position = 0
    while position < len(order):
        width = widths[order[position]]
        chosen = [i for i in order[position : position + batch_size] if widths[i] == width]
        position += len(chosen)
        tokens = np.zeros((batch_size, width), np.int32)
        lengths, starts = np.zeros(batch_size, np.int32), np.ones(batch_size, np.int32)
        indices = np.full(batch_size, -1)
        for slot, i in enumerate(chosen):
            tokens[slot, : len(rows[i].ids)] = rows[i].ids
            lengths[slot], starts[slot], indices[slot] = len(rows[i].ids), rows[i].start, i
        yield indices, tokens, lengths, starts


def padded_length(length: int) -> int:
    """The length class of a row: 16, 24, 32, 48, 64, ...: few shapes to compile, about a third of padding at most."""
    size = 16
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def likelihoods(
    spec: ModelSpecification,
    params: Parameters,
    rows: Sequence[Row],
    policy: Policy,
    *,
    batch_size: int = 64,
    compute_dtype: jnp.dtype = jnp.float32,
    progress: Callable[[int], None] = lambda _: None,
    context: int | None = None,
) -> Likelihoods:
    """Scores rows of any length in any order; results come back in the order of `rows`.

    Args:
        spec: the model.
        params: its parameters, stacked or one tree per layer; on a mesh, its data axes share the rows of a batch.
        rows: what to score.
        policy: route policy.
        batch_size: rows of every batch; short batches are filled up.
        compute_dtype: type of activations.
        progress: called with the number of rows done.
        context: longest row in tokens; default: the architecture's.

    Raises:
        InputError: a row is longer than `context`.
        ValueError: no rows, or a row without a token to score.
    """
    if not rows or any(not 0 < row.start < len(row.ids) for row in rows):
        raise ValueError("every row needs at least one token before and one from `start` on")
    longest, limit = max(len(row.ids) for row in rows), context or spec.architecture.max_length
    if longest > limit:
        raise InputError(f"an example has {longest} tokens, more than the model's context of {limit}")
    results, total, mesh = [], None, mesh_of(params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        for indices, *batch in batches(rows, batch_size, limit):
            tokens, lengths, starts = batch if mesh is None else rows_on(mesh, batch)
            value, greedy, counted = batch_likelihood(
                spec.structure, params, tokens, lengths, starts, policy, compute_dtype
            )
            results.append((indices, value, greedy))  # fetched later: the device works on while the host prepares
            total = counted if total is None else jax.tree.map(jnp.add, total, counted)
            progress(int(np.sum(indices >= 0)))
    log_likelihood, is_greedy = np.zeros(len(rows)), np.zeros(len(rows), bool)
    for indices, value, greedy in results:
        real = indices >= 0
        # Summed in float64: of a hundred tokens, sums in another order would differ by more than the tokens do.
        log_likelihood[indices[real]] = np.asarray(value, np.float64)[real].sum(axis=1)
        is_greedy[indices[real]] = np.asarray(greedy)[real]
    lengths = np.asarray([len(row.ids) - row.start for row in rows])
    return Likelihoods(log_likelihood, lengths, is_greedy, jax.tree.map(np.asarray, total))
