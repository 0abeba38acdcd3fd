"""Training that skips: a layer computes the tokens that execute it and, for its router, a sample of those that do not.

A router learns from what a layer would have made of the tokens that skip it, so masked execution computes them all. Of
the skipped tokens of a row a sample without replacement is enough: the gradient of their gates is multiplied by how
many there are for each that was drawn, that of the others is left out. Nothing else changes. In value a sampled token
has the gate 0 and leaves no key behind, so hidden states are those of masked execution up to rounding.

In expectation over the samples all gradients are those of masked execution:

- A gate's gradient at the layer's output is a sum over tokens, each of whose terms needs that token alone.
- A gate's gradient through attention (`eviction_gradient`) is a sum over pairs of a query and a key. Queries of skipped
  tokens pass nothing on: the result of such a query is multiplied by the gate 0. A query that executes is always
  there; what it says of an evicted key depends on that key, on the visible keys and on the strongest of these, which
  caps it, but not on other evicted keys (`gated_softmax`). So every term needs one sampled token at most.
- Layers draw independently, and each passes on a gradient that is linear in the one it receives.

Adapters and other weights are trained by executed tokens alone, for which nothing is sampled, and by what the router of
a later layer passes on to its input. The latter is multiplied as that router's gradient is, the same in expectation.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32, PRNGKeyArray

from qtale_jax.models.compaction import Compaction, static_sizes

SHARES = (1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 1.0)
"""Sizes that there are programs for, as shares of a row's tokens. More would waste less and take longer to compile."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skipping:
    """Asks for training that skips.

    Attributes:
        key: of the samples.
        share: least share of a row's skipped tokens that is computed, above 0. The program's size is filled up.
    """

    key: PRNGKeyArray
    share: float = field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Selection:
    """The tokens that one layer computes.

    Attributes:
        sizes: numbers of tokens in a row that there are programs for.
        index: of the one that is used, the same for all rows.
        compaction: the tokens: all that execute, and as many of the other present ones of each row as find room.
        weight: 1 for tokens that execute; for others one over the chance that they were drawn with.
    """

    sizes: tuple[int, ...] = field(metadata={"static": True})
    index: Int32[Array, ""]
    compaction: Compaction
    weight: Float[Array, "b t"]

    @classmethod
    def of(
        cls, execute: Bool[Array, "b t"], present: Bool[Array, "b t"], share: float, key: PRNGKeyArray
    ) -> "Selection":
        """Draws the sample of one layer; `share` is that of `Skipping`."""
        programs = static_sizes(execute.shape[1], SHARES)
        known = jnp.asarray(programs, jnp.int32)
        skipped = present & ~execute
        executing, skipping = (jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32) for x in (execute, skipped))
        least = jnp.ceil(share * skipping.astype(jnp.float32)).astype(jnp.int32)
        index = jnp.searchsorted(known, jnp.max(executing + least)).astype(jnp.int32)
        room = jnp.minimum(known[index] - executing, skipping)
        drawn = jnp.where(skipped, jax.random.uniform(key, execute.shape, jnp.float32), 2.0)
        rank = jnp.argsort(jnp.argsort(drawn, axis=1), axis=1)
        chosen = execute | (skipped & (rank < room))
        inverse = skipping.astype(jnp.float32) / jnp.maximum(room, 1).astype(jnp.float32)
        return cls(programs, index, Compaction.of(chosen, axis=1), jnp.where(execute, 1.0, inverse))


def weighted(gate: Float[Array, "b t"], weight: Float[Array, "b t"]) -> Float[Array, "b t"]:
    """The gate, with its gradient multiplied by `weight`."""
    value = jax.lax.stop_gradient(gate)
    return value + weight * (gate - value)
