"""Computing only some entries along an axis: they are gathered into one of a few static sizes, and put back.

How many there are is known only at run time, so `lax.switch` chooses among programs for fixed sizes and nothing is
compiled again. (`vmap` of a `lax.cond` would compute both branches for everyone.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Int32

Take = Callable[[Array], Array]
"""Takes from an array the entries that are computed."""


def static_sizes(total: int, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Ascending static sizes: the shares of `total`, rounded up."""
    return tuple(sorted({math.ceil(total * share) for share in shares}))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Compaction:
    """Where the chosen entries stand along one axis, and how to take them out and put them back."""

    chosen: Bool[Array, "b t"]
    order: Int[Array, "b t"]
    rank: Int[Array, "b t"]
    axis: int = field(metadata={"static": True})

    @classmethod
    def of(cls, chosen: Bool[Array, "b t"], axis: int) -> "Compaction":
        """Chosen entries come first, in their order."""
        order = jnp.argsort(~chosen, axis=axis, stable=True)
        return cls(chosen, order, jnp.maximum(jnp.cumsum(chosen, axis=axis, dtype=jnp.int32) - 1, 0), axis)

    @property
    def most(self) -> Int32[Array, ""]:
        """Entries that have to fit."""
        return jnp.max(jnp.sum(self.chosen, axis=self.axis, dtype=jnp.int32))

    def gather(self, x: Array, size: int) -> Array:
        """The first `size` entries of x, those that are chosen before all others."""
        index = jax.lax.slice_in_dim(self.order, 0, size, axis=self.axis)
        return jnp.take_along_axis(x, _expanded(index, x.ndim), axis=self.axis)

    def spread(self, x: Array, rest: Array) -> Array:
        """Chosen entries from x, where `gather` has put them, all others from `rest`."""
        found = jnp.take_along_axis(x, _expanded(self.rank, x.ndim), axis=self.axis, mode="clip")
        return jnp.where(_expanded(self.chosen, x.ndim), found, rest)


def _expanded(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))
