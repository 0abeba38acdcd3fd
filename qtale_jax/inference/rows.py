"""The state of every row of a decoding batch, and the choice of its next token."""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PRNGKeyArray

from qtale_jax.inference.sampling import sample


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """b rows: where each is, when it ends, how it samples.

    Attributes:
        token: chosen and not yet returned.
        position: of that token.
        count: new tokens returned so far.
        limit: most new tokens.
        stop: tokens that end any of the rows; they are returned.
        ignore_end: these tokens do not end it.
        done: nothing more comes.
        key: seed of sampling, one per row.
        temperature: 0 for greedy.
        top_p: nucleus mass.
    """

    token: Int32[Array, " b"]
    position: Int32[Array, " b"]
    count: Int32[Array, " b"]
    limit: Int32[Array, " b"]
    stop: Int32[Array, " e"]
    ignore_end: Bool[Array, " b"]
    done: Bool[Array, " b"]
    key: PRNGKeyArray
    temperature: Float32[Array, " b"]
    top_p: Float32[Array, " b"]

    @property
    def at_end(self) -> Bool[Array, " b"]:
        """Whether the token of each row ends it."""
        return is_end(self.token, self.stop) & ~self.ignore_end


def end_tokens(ids: Sequence[int]) -> Int32[Array, " e"]:
    """Ids as `Rows.stop`; none are a -1, which no token is, so that none and one share a program."""
    return jnp.asarray(tuple(ids) or (-1,), jnp.int32)


def is_end(tokens: Int32[Array, " b"], stop: Int32[Array, " e"]) -> Bool[Array, " b"]:
    """Which of the tokens are among those that end a row."""
    return jnp.any(tokens[:, None] == stop[None, :], axis=1)


def choose(
    logits: Float[Array, "b v"],
    keys: PRNGKeyArray,
    counts: Int32[Array, " b"],
    temperature: Float32[Array, " b"],
    top_p: Float32[Array, " b"],
) -> Int32[Array, " b"]:
    """The next token of each row; its noise depends on the row's key and how many tokens it has returned."""

    def draw() -> Array:
        def one(logits, key, count, temperature, top_p):
            return sample(logits[None], jax.random.fold_in(key, count)[None], temperature, top_p)[0]

        return jax.vmap(one)(logits, keys, counts, temperature, top_p)

    # Sorting a vocabulary takes as long as a layer: greedy rows do not wait for it.
    return jax.lax.cond(jnp.any(temperature > 0), draw, lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32))
