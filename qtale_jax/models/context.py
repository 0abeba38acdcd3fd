"""What every layer needs to know about the tokens that it is run on: positions, rotations, which keys can be seen."""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qtale_jax.models.attention import in_window
from qtale_jax.models.compaction import Take
from qtale_jax.models.rotary import rotary_tables
from qtale_jax.models.specification import Architecture

Tables = tuple[Float[Array, "b t 1 h"], Float[Array, "b t 1 h"]]
"""Rotary cosine and sine of each token's position."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Context:
    """What every layer needs to know about the tokens; s is the number of keys.

    Attributes:
        tables: rotary cosine and sine of each token's position.
        causal: keys that a query sees when nothing is evicted: not later, and inside the window if there is one.
        own: the key that is the query's own token; a query always sees itself.
        present: tokens that are not padding; padding executes nothing.
        tokens: ids; only pseudo-random routers look at them.
        positions: of each token in its sequence; with a cache also the slots that its key and value go to.
        local: tables and causal keys of the local layers where only some layers are; `at_layer` chooses.
    """

    tables: Tables
    causal: Bool[Array, "b t s"]
    own: Bool[Array, "b t s"]
    present: Bool[Array, "b t"]
    tokens: Int[Array, "b t"]
    positions: Int[Array, "b t"]
    local: tuple[Tables, Bool[Array, "b t s"]] | None = None

    @classmethod
    def of(
        cls,
        architecture: Architecture,
        causal: Bool[Array, "b t s"],
        own: Bool[Array, "b t s"],
        present: Bool[Array, "b t"],
        tokens: Int[Array, "b t"],
        positions: Int[Array, "b t"],
        keys: Int[Array, "b s"] | None = None,
    ) -> "Context":
        """The context of tokens whose `causal` keys are those without a window.

        `keys` are the positions of the keys; None: as in a cache, 0, 1, 2 and so on.
        """

        def seen(local: bool) -> tuple[Tables, Bool[Array, "b t s"]]:
            inside = in_window(architecture, causal, positions, keys) if local else causal
            return rotary_tables(architecture, positions, local), inside

        rest = (own, present, tokens, positions)
        if architecture.global_layers:
            return cls(*seen(local=False), *rest, seen(local=True))
        return cls(*seen(local=architecture.sliding_window is not None), *rest)

    def at_layer(self, architecture: Architecture, layer: Int[Array, ""] | int) -> "Context":
        """The context as one layer has it; its index may be traced, as in a scan over layers of both kinds."""
        if self.local is None:
            return self
        everywhere = (self.tables, self.causal)
        if isinstance(layer, int):
            tables, causal = self.local if architecture.is_local(layer) else everywhere
        else:
            kinds = jnp.asarray([architecture.is_local(index) for index in range(architecture.num_layers)])
            is_local = jnp.take(kinds, layer)
            tables, causal = jax.tree.map(functools.partial(jnp.where, is_local), self.local, everywhere)
        return dataclasses.replace(self, tables=tables, causal=causal, local=None)

    def taken(self, take: Take) -> "Context":
        """The context of some tokens among themselves, from that of whole sequences as `at_layer` gives it."""
        assert self.local is None, "taken from what one layer sees"
        positions = take(self.positions)
        causal = jnp.swapaxes(take(jnp.swapaxes(take(self.causal), 1, 2)), 1, 2)
        own = jnp.broadcast_to(jnp.eye(positions.shape[1], dtype=jnp.bool_), causal.shape)
        tables = (take(self.tables[0]), take(self.tables[1]))
        return Context(tables, causal, own, take(self.present), take(self.tokens), positions)
