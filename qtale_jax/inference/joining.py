"""Rows that join a decoding batch and leave it, between chunks: one program each, whoever comes and goes."""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from qtale_jax.inference.pages import PagedCache
from qtale_jax.inference.rows import Rows, choose, end_tokens
from qtale_jax.models.decoder import Parameters
from qtale_jax.models.forward import unembed
from qtale_jax.models.specification import ModelSpecification


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entry:
    """How a row starts to decode; everything is an array, so that no request needs a program of its own.

    Attributes:
        position: of its first new token: how many tokens have been run.
        count: new tokens that it returned before it was interrupted; 0 for a row that starts.
        limit: most new tokens, those included.
        ignore_end: end tokens do not end it.
        seed: of sampling. The noise is that of the only row of `stream` with this seed.
        temperature: 0 for greedy.
        top_p: nucleus mass.
        threshold: theta of each routed layer; no entries for a dense model.
    """

    position: Int32[Array, ""]
    count: Int32[Array, ""]
    limit: Int32[Array, ""]
    ignore_end: Bool[Array, ""]
    seed: UInt32[Array, ""]
    temperature: Float32[Array, ""]
    top_p: Float32[Array, ""]
    threshold: Float32[Array, " r"]


def empty_rows(rows: int, stop: Sequence[int] = ()) -> Rows:
    """Rows that nobody has: all are done. Those that join end with any of the tokens `stop`, unless they ignore it."""
    return Rows(
        token=jnp.zeros((rows,), jnp.int32),
        position=jnp.zeros((rows,), jnp.int32),
        count=jnp.zeros((rows,), jnp.int32),
        limit=jnp.zeros((rows,), jnp.int32),
        stop=end_tokens(stop),
        ignore_end=jnp.zeros((rows,), jnp.bool_),
        done=jnp.ones((rows,), jnp.bool_),
        key=jax.random.split(jax.random.key(0), rows),
        temperature=jnp.zeros((rows,), jnp.float32),
        top_p=jnp.ones((rows,), jnp.float32),
    )


@functools.partial(jax.jit, static_argnames=("spec",), donate_argnames=("rows", "thresholds"))
def join(
    spec: ModelSpecification,
    params: Parameters,
    rows: Rows,
    thresholds: Float32[Array, "r b 1"],
    row: Int32[Array, ""],
    last: Float[Array, "1 d"],
    entry: Entry,
) -> tuple[Rows, Float32[Array, "r b 1"]]:
    """Lets a row decode whose prompt has run.

    Args:
        spec: the model (`spec.structure`); static.
        params: one tree per layer.
        rows: state of all rows.
        thresholds: theta of all rows, in the form that `Thresholded` takes.
        row: which one joins.
        last: hidden state of its prompt's last token; its first new token is chosen from it.
        entry: how it starts.
    """
    key = jax.random.fold_in(jax.random.key(entry.seed), 0)
    logits = unembed(spec, params, last[:, None])[:, 0]
    token = choose(logits, key[None], entry.count[None], entry.temperature[None], entry.top_p[None])[0]
    fields = {field.name: getattr(rows, field.name) for field in dataclasses.fields(Rows) if field.name != "stop"}
    same = ("position", "count", "limit", "ignore_end", "temperature", "top_p")
    new = {name: getattr(entry, name) for name in same}
    new |= {"token": token, "done": entry.count >= entry.limit, "key": key}
    changed = {name: field.at[row].set(new[name]) for name, field in fields.items()}
    return dataclasses.replace(rows, **changed), thresholds.at[:, row, 0].set(entry.threshold)


@functools.partial(jax.jit, donate_argnames=("cache", "rows"))
def leave(cache: PagedCache, rows: Rows, leaving: Bool[Array, " b"]) -> tuple[PagedCache, Rows]:
    """Takes rows out: they are done, and their pages come back."""
    return cache.released(leaving), dataclasses.replace(rows, done=rows.done | leaving)
