"""Generation with the skipping engine, from prompts to tokens, in chunks: what happens between compiled calls."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32, PRNGKeyArray

from qtale_jax.inference.decode import decode, first_token
from qtale_jax.inference.growth import LEAST_STEP, Growth, alive
from qtale_jax.inference.pages import PAGE, PagedCache, empty_pages, resized
from qtale_jax.inference.prefill import prefill
from qtale_jax.inference.rows import Rows, end_tokens
from qtale_jax.models.cache import cache_bytes
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import Architecture, ModelSpecification

ROOM = 32
"""What the most tokens that a row can keep are a multiple of."""

PREFILL_STEPS = 4
"""Sizes of the pool while a long prompt runs: its programs take longer to compile than those of decode."""


@dataclass(frozen=True)
class Options:
    """How the engine works; none of it changes the tokens.

    Attributes:
        chunk: tokens of a compiled call, and of what `stream` yields.
        width: tokens of a prompt that run at a time.
        page: slots of a page of the cache.
        least_step: bytes that the pool grows by at least.
        compute_dtype: type of activations.
        cache_dtype: type of cached keys and values, floating point or int8; None: `compute_dtype`.
    """

    chunk: int = 32
    width: int = 512
    page: int = PAGE
    least_step: int = LEAST_STEP
    compute_dtype: jnp.dtype = jnp.float32
    cache_dtype: jnp.dtype | None = None

    @property
    def stored_dtype(self) -> jnp.dtype:
        """Type of cached keys and values."""
        return jnp.dtype(self.compute_dtype if self.cache_dtype is None else self.cache_dtype)

    def growth(self, architecture: Architecture, rows: int, slots: int) -> Growth:
        """Sizes of the pool for rows that can keep `slots` tokens."""
        return Growth.of(architecture, rows, slots, self.stored_dtype, self.page, self.least_step)


@dataclass(frozen=True)
class Prefilled:
    """Prompts that have run: the cache, each one's last hidden state (b, d), what they executed (b, p, l)."""

    cache: PagedCache
    last: Float[Array, "b d"]
    execute: Bool[np.ndarray, "b p l"]


@dataclass(frozen=True)
class Progress:
    """What has come of one call: new tokens and what was executed, up to now or in one chunk.

    Attributes:
        tokens: (b, n) int32, -1 where a row had ended.
        execute: what they executed; nothing for a row's last token, which is not run.
        kept: tokens that each layer keeps of each row (l, b).
        row_bytes: of the pages that each row has.
        held_bytes: of the whole cache, unused pages and tables included.
        prompt_execute: what the prompts executed (b, p, l).
        finished: all rows have ended.
    """

    tokens: Int32[np.ndarray, "b n"]
    execute: Bool[np.ndarray, "b n l"]
    kept: Int32[np.ndarray, "l b"]
    row_bytes: Int[np.ndarray, " b"]
    held_bytes: int
    prompt_execute: Bool[np.ndarray, "b p l"]
    finished: bool

    @property
    def counts(self) -> Int32[np.ndarray, " b"]:
        """New tokens of each row."""
        return (self.tokens >= 0).sum(axis=1, dtype=np.int32)


def run_prompts(
    spec: ModelSpecification,
    params: Parameters,
    prompts: Int32[np.ndarray, "b p"],
    lengths: Int32[np.ndarray, " b"],
    policy: Policy,
    slots: int,
    options: Options,
) -> Prefilled:
    """Runs right-padded prompts against an empty cache whose rows can keep `slots` tokens.

    Args:
        spec: the model (`spec.structure`).
        params: one tree per layer.
        prompts: ids.
        lengths: real tokens per prompt, at least 1.
        policy: route policy.
        slots: most tokens per row, new ones included.
        options: how.

    Raises:
        ValueError: the type of the cache is neither floating point nor int8; a policy of training.
    """
    batch, longest = prompts.shape
    width = min(longest, options.width)
    # Lengths that are close to each other share a program.
    room = -(-max(slots, -(-longest // width) * width) // ROOM) * ROOM
    growth = options.growth(spec.architecture, batch, room)
    every = jnp.arange(batch, dtype=jnp.int32)
    counts = np.zeros((spec.architecture.num_layers, batch), np.int32)
    cache, used, decisions = None, 0, []
    last = jnp.zeros((batch, spec.architecture.hidden_size), options.compute_dtype)
    for start in range(0, longest, width):
        pages = growth.size(used + growth.missing(counts, np.full(batch, width)), PREFILL_STEPS)
        if cache is None:
            cache = empty_pages(spec.architecture, batch, room, pages, options.stored_dtype, options.page)
        elif pages > cache.pool.pages:
            cache = resized(cache, pages)
        part = np.zeros((batch, width), np.int32)
        part[:, : min(width, longest - start)] = prompts[:, start : start + width]
        cache, last, execute = prefill(
            spec,
            params,
            jnp.asarray(part),
            jnp.int32(start),
            jnp.asarray(lengths, jnp.int32),
            every,
            cache,
            last,
            policy,
            compute_dtype=jnp.dtype(options.compute_dtype),
        )
        counts, used = jax.device_get((cache.counts, cache.used))
        decisions.append(np.asarray(execute))
    assert cache is not None, "a prompt has a token"
    return Prefilled(cache, last, np.concatenate(decisions, axis=1)[:, :longest])


def stream(
    spec: ModelSpecification,
    params: Parameters,
    prompts: Int32[np.ndarray, "b p"],
    lengths: Int32[np.ndarray, " b"],
    policy: Policy,
    key: PRNGKeyArray,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    options: Options | None = None,
) -> Iterator[Progress]:
    """Continues right-padded prompts until one of `stop_ids` or `max_new_tokens`, chunk by chunk; see `run_prompts`.

    Args:
        spec: the model (`spec.structure`).
        params: one tree per layer.
        prompts: ids.
        lengths: real tokens per prompt, at least 1.
        policy: `Dense`, `Thresholded` or `Fixed`.
        key: seed of sampling; row i uses key folded with i.
        max_new_tokens: per row.
        temperature: 0 for greedy.
        top_p: nucleus mass.
        stop_ids: tokens that end a row; they are counted.
        options: how.

    Yields:
        The new tokens of each chunk.

    Raises:
        ValueError: as `run_prompts`.
    """
    options = options or Options()
    batch, slots = prompts.shape[0], prompts.shape[1] + max_new_tokens
    done = run_prompts(spec, params, prompts, lengths, policy, slots, options)
    cache = done.cache
    growth = options.growth(spec.architecture, batch, cache.table.shape[2] * options.page)
    rows = Rows(
        token=jnp.zeros((batch,), jnp.int32),
        position=jnp.asarray(lengths, jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
        limit=jnp.full((batch,), max_new_tokens, jnp.int32),
        stop=end_tokens(stop_ids),
        ignore_end=jnp.zeros((batch,), jnp.bool_),
        done=jnp.zeros((batch,), jnp.bool_),
        key=jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch)),
        temperature=jnp.full((batch,), temperature, jnp.float32),
        top_p=jnp.full((batch,), top_p, jnp.float32),
    )
    rows = dataclasses.replace(rows, token=first_token(spec, params, done.last, rows))
    ended = np.zeros(batch, np.bool_)
    counts, used = jax.device_get((cache.counts, cache.used))
    first = True
    while not ended.all():
        needed = int(used) + growth.missing(counts, alive(ended))
        # After the prompt the pool shrinks to what was kept; later it only grows.
        if first or needed > cache.pool.pages:
            cache = resized(cache, growth.size(needed))
        cache, rows, chunk = decode(
            spec, params, cache, rows, policy, chunk=options.chunk, compute_dtype=jnp.dtype(options.compute_dtype)
        )
        found, ended, counts, used = jax.device_get((chunk, rows.done, cache.counts, cache.used))
        steps, first = int(found.steps), False
        yield Progress(
            tokens=np.asarray(found.tokens)[:, :steps],
            execute=np.asarray(found.execute)[:, :steps],
            kept=counts,
            row_bytes=np.sum(-(-counts // options.page), axis=0) * growth.bytes_per_page,
            held_bytes=cache_bytes(cache),
            prompt_execute=done.execute,
            finished=bool(ended.all()),
        )


def joined(chunks: Sequence[Progress]) -> Progress:
    """All chunks of a call as one; what is held is what was held at the end."""
    tokens = np.concatenate([chunk.tokens for chunk in chunks], axis=1)
    return dataclasses.replace(
        chunks[-1], tokens=tokens, execute=np.concatenate([chunk.execute for chunk in chunks], axis=1)
    )
