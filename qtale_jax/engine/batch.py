"""The rows of an engine on the device, and a mirror of what they keep on the host.

Everything that is compiled has one shape: a part of a prompt, a row that joins, a chunk for all, rows that leave.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Int32

from qtale_jax.engine.options import Shape
from qtale_jax.inference.decode import decode
from qtale_jax.inference.growth import Growth
from qtale_jax.inference.joining import Entry, empty_rows, join, leave
from qtale_jax.inference.pages import empty_pages
from qtale_jax.inference.prefill import prefill
from qtale_jax.models.cache import cache_bytes
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.policy import Dense, Policy, Thresholded
from qtale_jax.models.specification import ModelSpecification


@dataclass(frozen=True)
class Decoded:
    """A chunk on the host: new tokens (b, n), -1 where a row had ended, what they executed, the rows that are done."""

    tokens: Int32[np.ndarray, "b n"]
    execute: Bool[np.ndarray, "b n l"]
    done: Bool[np.ndarray, " b"]


class Batch:
    """Rows that decode together against one pool of pages. Not thread-safe.

    `counts` (layers, rows) is what each layer keeps of each row. It is exact after `decode` and `settle`; in between,
    prompts that ran count as if every layer had kept them.
    """

    def __init__(
        self,
        spec: ModelSpecification,
        params: Parameters,
        shape: Shape,
        compute_dtype: jnp.dtype,
        cache_dtype: jnp.dtype | None,
        stop: Sequence[int] = (),
    ):
        """Allocates the pool.

        Args:
            spec: the model.
            params: one tree per layer.
            shape: sizes.
            compute_dtype: type of activations.
            cache_dtype: type of cached keys and values, floating point or int8; None: `compute_dtype`.
            stop: tokens that end a row.
        """
        self.shape, self._spec, self._params = shape, spec.structure, params
        self._dtype = jnp.dtype(compute_dtype)
        stored = self._dtype if cache_dtype is None else jnp.dtype(cache_dtype)
        self.growth = Growth.of(spec.architecture, shape.rows, shape.context, stored, shape.page)
        self._cache = empty_pages(spec.architecture, shape.rows, shape.context, shape.pages, stored, shape.page)
        self._rows = empty_rows(shape.rows, stop)
        self._thresholds = jnp.zeros((len(spec.routed_layers), shape.rows, 1), jnp.float32)
        self._last: dict[int, Array] = {}
        self.counts = np.zeros((spec.architecture.num_layers, shape.rows), np.int32)
        self.held_bytes = cache_bytes(self._cache)

    @property
    def used(self) -> int:
        """Pages in use."""
        return int(np.sum(-(-self.counts // self.shape.page)))

    def pages(self, row: int) -> int:
        """Pages that a row has."""
        return int(np.sum(-(-self.counts[:, row] // self.shape.page)))

    def fits(self, new: Int[np.ndarray, " b"]) -> bool:
        """Whether there are pages for that many more tokens of each row, whatever they execute."""
        return self.used + self.growth.missing(self.counts, new) <= self.shape.pages

    def _policy(self, thresholds: Float32[Array, "r b 1"]) -> Policy:
        return Dense() if self._spec.routing is None else Thresholded(thresholds)

    def run_prompt(
        self, row: int, tokens: Int32[np.ndarray, " n"], start: int, threshold: Float32[np.ndarray, " r"]
    ) -> Bool[Array, "1 w l"]:
        """Runs the next part of a row's prompt; there have to be pages for it.

        Args:
            row: whose.
            tokens: the part, at most `shape.width`.
            start: position of its first token.
            threshold: theta of each routed layer.

        Returns:
            What its tokens executed; those beyond the part executed nothing.
        """
        if start == 0:
            self._last[row] = jnp.zeros((1, self._spec.architecture.hidden_size), self._dtype)
        part = np.zeros((1, self.shape.width), np.int32)
        part[0, : len(tokens)] = tokens
        self._cache, self._last[row], execute = prefill(
            self._spec,
            self._params,
            jnp.asarray(part),
            jnp.asarray(start, jnp.int32),
            jnp.asarray([start + len(tokens)], jnp.int32),
            jnp.asarray([row], jnp.int32),
            self._cache,
            self._last[row],
            self._policy(jnp.asarray(threshold[:, None, None])),
            compute_dtype=self._dtype,
        )
        self.counts[:, row] += len(tokens)
        return execute

    def join(self, row: int, entry: Entry) -> None:
        """Lets a row decode, once its prompt has run."""
        self._rows, self._thresholds = join(
            self._spec,
            self._params,
            self._rows,
            self._thresholds,
            jnp.asarray(row, jnp.int32),
            self._last.pop(row),
            entry,
        )

    def decode(self, active: Bool[np.ndarray, " b"]) -> Decoded:
        """A chunk of new tokens for the rows that have joined; there have to be pages for one more of each.

        Args:
            active: those rows, for the check.
        """
        assert self.fits(active.astype(np.int32)), "the pool has no room for another token of every row"
        self._cache, self._rows, chunk = decode(
            self._spec,
            self._params,
            self._cache,
            self._rows,
            self._policy(self._thresholds),
            chunk=self.shape.chunk,
            compute_dtype=self._dtype,
        )
        found, done, counts = jax.device_get((chunk, self._rows.done, self._cache.counts))
        steps, self.counts = int(found.steps), np.array(counts)
        return Decoded(np.asarray(found.tokens)[:, :steps], np.asarray(found.execute)[:, :steps], np.asarray(done))

    def settle(self) -> None:
        """Waits for what runs, and makes `counts` exact."""
        self.counts = np.array(self._cache.counts)

    def leave(self, rows: list[int]) -> None:
        """Takes rows out; their pages come back."""
        leaving = np.zeros(self.shape.rows, np.bool_)
        leaving[rows] = True
        self._cache, self._rows = leave(self._cache, self._rows, jnp.asarray(leaving))
        self.counts[:, rows] = 0
        for row in rows:
            self._last.pop(row, None)

    def warm_up(self) -> None:
        """Compiles everything, by running a prompt of one token and one new one through an empty batch."""
        assert not self.counts.any(), "the batch is in use"
        threshold = np.zeros(len(self._spec.routed_layers), np.float32)
        self.run_prompt(0, np.zeros(1, np.int32), 0, threshold)
        self.join(0, entry(position=1, threshold=threshold, limit=1))
        self.decode(np.arange(self.shape.rows) == 0)
        self.leave([0])


def entry(
    *,
    position: int,
    threshold: Float32[np.ndarray, " r"],
    limit: int,
    count: int = 0,
    ignore_end: bool = False,
    seed: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> Entry:
    """An `Entry` of plain numbers, on the device."""
    numbers = {"position": position, "count": count, "limit": limit}
    fields: dict[str, np.ndarray] = {name: np.asarray(value, np.int32) for name, value in numbers.items()}
    fields |= {"ignore_end": np.asarray(ignore_end, np.bool_)}
    fields |= {"temperature": np.asarray(temperature, np.float32), "top_p": np.asarray(top_p, np.float32)}
    return Entry(**jax.device_put(fields | {"seed": np.asarray(seed, np.uint32), "threshold": threshold}))
