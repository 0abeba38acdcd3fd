"""Generation until a stop string: rounds of a fixed number of tokens, after which finished requests leave.

Stop strings are looked for in decoded text, so they may begin and end within tokens and span several. A round runs the
prompts anew together with what has been added to them: the cache of an earlier round would belong to a batch that is no
longer the same.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtale_jax.data.stops import first_stop, tokens_until
from qtale_jax.data.tokens import decode
from qtale_jax.evaluation.likelihood import Counted, count
from qtale_jax.inference.generation import Generated, generate
from qtale_jax.inference.rows import end_tokens
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.placement import everywhere, mesh_of, rows_on
from qtale_jax.models.policy import Policy
from qtale_jax.models.specification import ModelSpecification

ROUND = 32
"""Tokens added before stop strings are looked for: a compromise between tokens too many and prompts run anew."""

NARROWEST = 64
"""Shortest class of prompts. They double from here: each is a program of its own, and long to compile."""


def width_class(length: int) -> int:
    """The width that prompts of `length` tokens are padded to: 64, 128, 256, ..."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


@dataclass
class Request:
    """A prompt that is continued until a stop string, an end token or `max_new_tokens`."""

    prompt: list[int]
    stops: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    new: list[int] = field(default_factory=list)
    text: str | None = None
    """The continuation without its stop string, once it is finished."""

    @property
    def kind(self) -> tuple[float, float, int]:
        """What requests of one batch have in common."""
        return self.temperature, self.top_p, width_class(len(self.prompt) + len(self.new))


def continue_requests(
    spec: ModelSpecification,
    params: Parameters,
    tokenizer: Any,
    requests: Sequence[Request],
    policy: Policy,
    *,
    ends: Sequence[int],
    batch_size: int,
    compute_dtype: jnp.dtype,
    seed: int = 0,
    progress: Callable[[int], None] = lambda _: None,
) -> Counted | None:
    """Continues all requests in batches of one shape per length class, and fills in their `text`.

    Greedy continuations do not depend on the other requests; with a temperature the draws of a request depend on its
    place in the batch.

    Args:
        spec: the model.
        params: one tree per layer.
        tokenizer: of the model.
        requests: prompts of at least one token.
        policy: route policy, `Dense` or `Thresholded`.
        ends: tokens that end a request, see `end_ids`.
        batch_size: rows of every batch; short batches are filled up with copies that are not counted.
        compute_dtype: type of activations.
        seed: of sampling.
        progress: called with the number of requests that finished.

    Returns:
        What prompts and new tokens executed: every token once, up to the one that completes the stop string, and not
        the last one, which is never run. None without requests.
    """
    total: Counted | None = None
    waiting, turn = list(requests), 0
    while waiting:
        waiting.sort(key=lambda request: request.kind)
        unfinished: list[Request] = []
        position = 0
        while position < len(waiting):
            batch = [r for r in waiting[position : position + batch_size] if r.kind == waiting[position].kind]
            position += len(batch)
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), turn), position)
            found = _round(spec, params, batch, batch_size, policy, ends, key, compute_dtype)
            for row, request in enumerate(batch):
                counted = _take(spec, tokenizer, request, found, row, ends)
                if counted is None:
                    unfinished.append(request)
                else:
                    total = counted if total is None else jax.tree.map(np.add, total, counted)
                    progress(1)
        waiting, turn = unfinished, turn + 1
    return total


def _round(
    spec: ModelSpecification,
    params: Parameters,
    batch: Sequence[Request],
    batch_size: int,
    policy: Policy,
    ends: Sequence[int],
    key: jax.Array,
    compute_dtype: jnp.dtype,
) -> Generated:
    """Adds `ROUND` tokens, or as many as there are before an end token, to every request of a batch."""
    # Copies of the first fill the batch up: they end when it does, so that nobody waits for them.
    rows = [request.prompt + request.new for request in batch]
    rows += [rows[0]] * (batch_size - len(rows))
    tokens = np.zeros((batch_size, width_class(max(map(len, rows)))), np.int32)
    for index, ids in enumerate(rows):
        tokens[index, : len(ids)] = ids
    lengths = np.asarray([len(ids) for ids in rows], np.int32)
    mesh = mesh_of(params)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        placed = (jnp.asarray(tokens), jnp.asarray(lengths)) if mesh is None else rows_on(mesh, (tokens, lengths))
        out = generate(
            spec.structure,
            params,
            *placed,
            policy,
            key,
            jnp.float32(batch[0].temperature),
            jnp.float32(batch[0].top_p),
            end_tokens(ends),
            max_new_tokens=ROUND,
            compute_dtype=compute_dtype,
        )
        return jax.device_get(out if mesh is None else everywhere(mesh, out))


def _take(
    spec: ModelSpecification, tokenizer: Any, request: Request, found: Generated, row: int, ends: Sequence[int]
) -> Counted | None:
    """Takes a round's tokens over; if the request is finished by them, sets its text and returns what it executed."""

    def text_of(ids: Sequence[int]) -> str:
        return decode(tokenizer, ids, ends)

    before = len(request.new)
    added = found.tokens[row, : int(found.counts[row])].tolist()
    new = (request.new + added)[: request.max_new_tokens]
    text = text_of(new)
    stop = first_stop(text, request.stops)
    request.new = new
    ended = bool(new) and new[-1] in ends
    if stop is None and not ended and len(new) < request.max_new_tokens:
        return None
    kept = len(new) if stop is None else tokens_until(new, request.stops, text_of)
    request.text = text if stop is None else text[:stop]
    length = len(request.prompt) + before
    execute = np.concatenate([found.prompt_execute[row, :length], found.new_execute[row]])
    run = len(request.prompt) + kept - 1
    return _counted(spec, execute[None, :run])


def _counted(spec: ModelSpecification, execute: np.ndarray) -> Counted:
    """Counts of the tokens of one request, (1, tokens, layers) bool; generation does not give logits of routers."""
    width = execute.shape[1]
    # Padded to a length class, so that few shapes are compiled; what is padding executes nothing.
    padded = np.zeros((1, width_class(width), execute.shape[2]), bool)
    padded[:, :width] = execute
    present = np.arange(padded.shape[1])[None, :] < width
    logits = jnp.zeros((*padded.shape[:2], 0, 2), jnp.float32)
    eviction = spec.routing is None or spec.routing.eviction
    counted = count(jnp.asarray(padded), logits, jnp.asarray(present), padded.shape[1], spec.architecture, eviction)
    return jax.device_get(counted)
